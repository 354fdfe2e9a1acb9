"""A process that has imported the scripts and forks for each command line, since importing takes seconds; a command line may be that of several ranks.

It reads jobs, a line of JSON each, and writes two lines for each: the process ids as they start, and the exit codes when all have ended.
"""
import gc
import importlib
import itertools
import json
import os
import pathlib
import signal
import socket
import sys
import traceback

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent), str(pathlib.Path(__file__).resolve().parent)]
import pretend
import torch._dynamo  # noqa: F401  which an optimizer's first step imports: here once, not in each child
import torchvision.utils  # noqa: F401  the first picture

from distill_utils.processes import run_script

SCRIPTS = {name: importlib.import_module(name) for name in (
    "buffer", "distill_DC", "distill_DM", "distill_FRePo", "distill_MTT", "distill_s2d", "distill_utils.coreset", "distill_utils.evaluate", "distill_utils.export",
    "pretend", "ranks")}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_at_replace(number):
    """kill -9 before this process's n-th renaming of a file (n > 0) or right after it (n < 0)."""
    replace, calls = os.replace, []

    def counted(source, target):
        calls.append(target)
        if len(calls) == number:
            die()
        replace(source, target)
        if len(calls) == -number:
            die()
    os.replace = counted


def die_at_call(number):
    """kill -9 before the n-th call of any function, of Python or of C; 0: never. Returns a counter of the calls."""
    calls = itertools.count(1)

    def profile(frame, event, argument):
        if event in ("call", "c_call") and next(calls) == number:
            die()
    sys.setprofile(profile)
    return calls


def run(script, arguments, output, environment, replace, call):
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(0)  # whoever asks a question gets no answer
    os.environ.update(environment)
    sys.argv = [script + ".py", *arguments]
    if replace:
        die_at_replace(replace)
    calls = None if call is None else die_at_call(call)
    if "pretend" in arguments:
        pretend.register()
    try:
        run_script(SCRIPTS[script].main, SCRIPTS[script].parser(), arguments)
        return 0
    except SystemExit as stop:
        return stop.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.setprofile(None)
        if calls is not None:
            pathlib.Path(output + ".calls").write_text(str(next(calls)))


def fork(job, environment):
    """The process id of a process that does the job."""
    child = os.fork()
    if child:
        return child
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal: what runs in a shell's background ignores it
    code = run(**job | {"environment": job["environment"] | environment})
    sys.stdout.flush()
    os._exit(code)


def ranks(count, output):
    """Environments of several processes, as torchrun sets them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": count, "GROUP_WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    return [{name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank, "TORCHELASTIC_ERROR_FILE": f"{output}.{rank}"}).items()}
            for rank in range(count)]


if __name__ == "__main__":
    gc.freeze()  # a child's collections do not copy the pages of what is imported
    for line in sys.stdin:
        job = json.loads(line)
        count = job.pop("processes")
        children = [fork(job, environment) for environment in ([{}] if count == 1 else ranks(count, job["output"]))]
        print(json.dumps(children), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
    os._exit(0)  # at once
