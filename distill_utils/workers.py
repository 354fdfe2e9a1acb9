"""Run jobs in separate processes, where a crash of one does not affect the others, or in threads.

Each process has a pipe to the parent. The standard library's pools need semaphores, which are missing on a machine
without a writable /dev/shm.
"""
import concurrent.futures
import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import multiprocessing.util
import os
import signal
import tempfile
import threading

from tqdm import tqdm

CRASHED = "its process crashed"  # the answer of a job whose process crashed
LONGEST = 60  # bytes: with a longer temporary folder, a socket path exceeds its limit (103 bytes on macOS)


def in_threads(function, items) -> list:
    """Return function(item) for each item, in order; a network disk answers many requests about files at once."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        return list(mapped(pool, function, items))


def mapped(pool, function, items, batch=1024):
    """Like pool.map, with at most a batch of items in flight, so that memory does not grow with their number."""
    for start in range(0, len(items), batch):
        yield from pool.map(function, items[start:start + batch])


def in_processes(function, jobs, workers):
    """Yield (job, function(job)) in the order of `jobs`, or (job, CRASHED), with few jobs and results in memory."""
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
        context.set_forkserver_preload([function.__module__])  # import it once, not in each process
        shorten_sockets()
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()  # the pipe then closes when the process ends

    def send(self, job):
        with contextlib.suppress(BrokenPipeError):  # the process has ended; the answer will be CRASHED
            self.connection.send(job)

    def answer(self):
        """Return the answer of the job, or CRASHED; raise the error that the function raised."""
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
    """Answer jobs in a worker process: leave Ctrl-C to the parent, and exit when the parent ends or is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # its own lock between processes would be reported as leaked at the end
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
    """Put multiprocessing's sockets into /tmp if TMPDIR is too long for their paths; newer Pythons do this."""
    if len(os.fsencode(tempfile.gettempdir())) > LONGEST:
        given, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            multiprocessing.util.get_temp_dir()  # creates and remembers the folder
        finally:
            tempfile.tempdir = given
