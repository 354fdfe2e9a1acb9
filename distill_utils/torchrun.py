"""Run torchrun on one machine, and report a failure like a single process: the first failure's message and exit code.

    python -m distill_utils.torchrun --nproc_per_node 4 distill_DM.py …

torchrun itself would print forty lines and its own traceback; by then it has ended the other processes. Its
--standalone would let processes find each other by the machine's host name, which may not resolve.
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
from distill_utils.processes import PEER_ENDED, set_ascii_fallback

HERE = ("--nnodes", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", "127.0.0.1:0", "--rdzv_id", "here",
        "--local_addr", "127.0.0.1")
GOES_ON = "run the same command to resume from the last checkpoint, with any number of processes"


def account(failures):
    """Return the message and exit code of the first process that failed by itself; failures: {rank: failure}."""
    def doubts(failure):
        consequences = PEER_ENDED, -signal.SIGTERM  # another rank ended; torchrun ended this one
        return (consequences.index(failure.exitcode) + 2 if failure.exitcode in consequences
                else not os.path.isfile(failure.error_file))

    number = min(failures, key=lambda number: (doubts(failures[number]), failures[number].timestamp))
    failure = failures[number]
    if os.path.isfile(failure.error_file):
        return failure.message, failure.exitcode
    if failure.exitcode < 0:
        return (f"process {number} was killed by {signal.Signals(-failure.exitcode).name}: {GOES_ON}",
                128 - failure.exitcode)
    return f"process {number} ended with exit code {failure.exitcode}", failure.exitcode


def main(arguments):
    set_ascii_fallback()
    if not os.environ.get("TRACEBACK"):
        logging.disable(logging.ERROR)
    try:
        flags = run.parse_args([*HERE, *arguments])
        os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(
            math.ceil(cores() / run.determine_local_world_size(flags.nproc_per_node)))
        run.run(flags)
    except ChildFailedError as error:
        sentence, code = account(error.failures)
    except SignalException as stop:
        sentence, code = f"stopped: {GOES_ON}", 128 + stop.sigval
    else:
        return
    print(f"\n{sentence}", file=sys.stderr)  # on its own line, where a killed process left its progress bar
    sys.exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
