"""Work on all cores: jobs done by processes of one thread each, results in the order of the jobs."""
import contextlib
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import wait

from shards import Fault, first_line


def cores():
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextlib.contextmanager
def heartbeat(bar, seconds=1.0):
    """Around long work: draws a tqdm bar every second, so that its clock moves also while its count does not."""
    over = threading.Event()

    def beat():
        while not over.wait(seconds):
            bar.refresh()
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def serve(work, pipe):
    """A worker process: does the jobs that come through the pipe until it is closed."""
    with contextlib.suppress(EOFError, OSError):  # the parent is gone
        while True:
            job = pipe.recv()
            try:
                result = work(job, lambda count: pipe.send(("progress", count)))
            except Exception as error:
                pipe.send(("fault", f"{type(error).__name__}: {first_line(error)}"))
                return
            pipe.send(("result", result))


@contextlib.contextmanager
def processes(work, count):
    """Pipes to `count` fresh worker processes, which end with this context. Ctrl-C reaches this process alone."""
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads, as torch has them, can hang
    pipes, workers = [], []
    try:
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited by the workers
        try:
            for _ in range(count):
                mine, theirs = context.Pipe()
                workers.append(context.Process(target=serve, args=(work, theirs), daemon=True))
                workers[-1].start()
                theirs.close()
                pipes.append(mine)
        finally:
            signal.signal(signal.SIGINT, before)
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()  # a worker ends when it next reads from its pipe or writes to it
        patience = time.monotonic() + 5
        for worker in workers:
            worker.join(max(0, patience - time.monotonic()))
        for worker in workers:
            worker.terminate()
            worker.join()


def results(work, jobs, count, progress):
    """Yield work(job, report) for every job, in their order, from `count` processes; progress(n) for each report(n).

    work and jobs have to be picklable. The other processes get a job once the first one has reported something: what it
    has compiled, they find in the compiler's cache. Fault if a job fails or a process dies.
    """
    with processes(work, min(count, len(jobs))) as pipes:
        idle, doing, done = list(pipes), {}, {}  # doing: {pipe: number of its job}; done: {number: result}
        given = yielded = 0
        warm = False
        while yielded < len(jobs):
            most = yielded + 2 * len(pipes) if warm else 1  # a slow job does not let the others run far ahead
            try:
                while idle and given < min(most, len(jobs)):
                    idle[0].send(jobs[given])
                    doing[idle.pop(0)] = given
                    given += 1
                messages = [(pipe, *pipe.recv()) for pipe in wait(pipes)]
            except (EOFError, OSError):
                raise Fault("a worker process was killed; is there enough memory?") from None
            warm = True
            for pipe, kind, value in messages:
                if kind == "fault":
                    raise Fault(f"a worker process failed ({value})")
                if kind == "progress":
                    progress(value)
                else:
                    done[doing.pop(pipe)] = value
                    idle.append(pipe)
            while yielded in done:
                yield done.pop(yielded)
                yielded += 1
