"""Work in processes of their own, where one that crashes takes no other with it."""
import collections
import concurrent.futures
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from concurrent.futures.process import BrokenProcessPool

CRASHED = "its process crashed"  # the answer of a job that killed its process


def in_processes(function, jobs, workers):
    """Yield (job, function(job)) in the order of `jobs`, or (job, CRASHED); few are in flight, so that memory stays flat.

    A crash breaks all that are in flight: the first of them is tried by itself, the others again together.
    """
    jobs, waiting, processes = iter(jobs), collections.deque(), pool(workers, function)
    try:
        while True:
            waiting += [(job, submit(processes, function, job)) for job in itertools.islice(jobs, 16 * workers - len(waiting))]
            if not waiting:
                return
            job, future = waiting.popleft()
            try:
                answer = future.result()
            except BrokenProcessPool:
                processes.shutdown()  # none of its processes is left when the job is tried again
                answer = alone(function, job)
                processes = pool(workers, function)
                waiting = collections.deque((job, future if answered(future) else submit(processes, function, job)) for job, future in waiting)
            yield job, answer
    finally:
        processes.shutdown(cancel_futures=True)


def pool(workers, function):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__])  # imported once, not in each process
    return concurrent.futures.ProcessPoolExecutor(workers, context, initializer=start)


def start():
    """In each process: Ctrl-C is the parent's to handle, and none outlives it, even where it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel
    threading.Thread(target=lambda: multiprocessing.connection.wait([parent]) and os._exit(1), daemon=True).start()


def submit(processes, function, job):
    try:
        return processes.submit(function, job)
    except BrokenProcessPool as error:
        future = concurrent.futures.Future()
        future.set_exception(error)
        return future


def answered(future):
    return future.done() and not isinstance(future.exception(), BrokenProcessPool)


def alone(function, job):
    with pool(1, function) as process:
        try:
            return process.submit(function, job).result()
        except BrokenProcessPool:
            return CRASHED
