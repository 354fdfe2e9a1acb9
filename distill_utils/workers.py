"""Work in processes of their own, where one that crashes takes no other with it.

Each is spoken to through a pipe. The standard library's pools need semaphores, which a machine without a writable /dev/shm does not have.
"""
import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import tempfile
import threading

CRASHED = "its process crashed"  # the answer of a job that killed its process
LONGEST = 60  # bytes of the temporary folder's path below which a socket's path (of at most 103 bytes on macOS) fits


def in_processes(function, jobs, workers):
    """Yield (job, function(job)) in the order of `jobs`, or (job, CRASHED); few are in flight, so that memory stays flat."""
    jobs, idle, busy, answers, wanted = enumerate(jobs), [], {}, {}, 0
    try:
        while True:
            room = min(workers - len(busy), 16 * workers - len(busy) - len(answers))
            for number, job in itertools.islice(jobs, room):
                worker = idle.pop() if idle else Worker(function)
                worker.send(job)
                busy[worker.connection] = worker, number, job
            if not busy:
                return
            for connection in multiprocessing.connection.wait(busy):
                worker, number, job = busy[connection]
                answers[number] = job, worker.answer()
                del busy[connection]
                if worker.process.is_alive():
                    idle.append(worker)
            while wanted in answers:
                yield answers.pop(wanted)
                wanted += 1
    finally:
        for worker in (*idle, *(worker for worker, _, _ in busy.values())):
            worker.end()


def alone(function, job):
    (_, answer), = in_processes(function, [job], 1)
    return answer


class Worker:
    """A process that answers one job at a time."""

    def __init__(self, function):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([function.__module__])  # imported once, not in each process
        shorten_sockets()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def send(self, job):
        with contextlib.suppress(BrokenPipeError):  # the process is gone, and the answer will be CRASHED
            self.connection.send(job)

    def answer(self):
        """Of the job that was sent, or CRASHED; raises what the function raised."""
        try:
            error, answer = self.connection.recv()
        except (EOFError, OSError):
            self.end()
            return CRASHED
        if error:
            raise error
        return answer

    def end(self):
        self.process.terminate()
        self.process.join()
        self.connection.close()


def serve(function, connection):
    """In each process: Ctrl-C is the parent's to handle, and none outlives it, even where it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: multiprocessing.connection.wait([parent]) and os._exit(1), daemon=True).start()
    while True:
        job = connection.recv()
        try:
            answer = None, function(job)
        except Exception as error:
            answer = error, None
        connection.send(answer)


def shorten_sockets():
    """Puts the sockets of multiprocessing, whose paths have a limit, into /tmp where TMPDIR is too long for them; newer Pythons do so themselves."""
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST:
        given, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            multiprocessing.util.get_temp_dir()  # made now, and kept
        finally:
            tempfile.tempdir = given
