"""torchrun on one machine, ending as a single process does: with a sentence and exit code of the process that failed first.

    python -m distill_utils.torchrun --nproc_per_node 4 distill_DM.py …

torchrun itself would add forty lines and a traceback of its own; it has ended the other processes by then. With --standalone it would also have
them find each other by this machine's own name, which need not resolve.
"""
import logging
import math
import os
import signal
import sys

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from distill_utils.machine import cores
from distill_utils.processes import PEER_ENDED, speak_plainly

HERE = "--nnodes", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "--rdzv_id", "here", "--local_addr", "127.0.0.1"
GOES_ON = "the same command goes on from the last checkpoint, with any number of processes"


def account(failures):
    """Sentence and exit code for failed processes by their rank: of the first that failed by itself, as far as can be told."""
    def doubts(failure):
        consequences = PEER_ENDED, -signal.SIGTERM  # of waiting for another; of torchrun, which ends the others
        return consequences.index(failure.exitcode) + 2 if failure.exitcode in consequences else not os.path.isfile(failure.error_file)

    number = min(failures, key=lambda number: (doubts(failures[number]), failures[number].timestamp))
    failure = failures[number]
    if os.path.isfile(failure.error_file):
        return failure.message, failure.exitcode
    if failure.exitcode < 0:
        return f"process {number} was ended by {signal.Signals(-failure.exitcode).name}: {GOES_ON}", 128 - failure.exitcode
    return f"process {number} ended with exit code {failure.exitcode}", failure.exitcode


def main(arguments):
    speak_plainly()
    if not os.environ.get("TRACEBACK"):
        logging.disable(logging.ERROR)
    try:
        flags = run.parse_args([*HERE, *arguments])
        os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(math.ceil(cores() / run.determine_local_world_size(flags.nproc_per_node)))
        run.run(flags)
    except ChildFailedError as error:
        sentence, code = account(error.failures)
    except SignalException as stop:
        sentence, code = f"stopped; {GOES_ON}", 128 + stop.sigval
    else:
        return
    print(sentence, file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
