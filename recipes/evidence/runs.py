"""Run the jobs of an experiment in worker processes, with a progress bar; each result is in a .jsonl at once.

A part of an experiment is a module with two functions: `jobs(quick)`, which returns its runs as dicts of plain values
(part, arm, regime, seed, ...), and `work(job)`, which does one of them and returns what it measured, as a dict too.
"""

import json
import multiprocessing
import os
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Of the workers, before they import anything: a tiny model is slower on several threads than on one.
QUIET = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def run_all(jobs, work, *, out, title, console, workers=2, paths=(), resume=False):
    """Do `work(job)` for every job, `workers` at a time; returns the results, in the order of the jobs.

    A result is the job and what `work` returned for it, with its `seconds`. All of them are in the file `out`, and
    what the workers print is in `out` with the ending .log.

    Args:
        jobs: Dicts of plain values.
        work: A function of a module, so that worker processes can import it.
        out: Path of the .jsonl. An earlier one is replaced.
        title: What the progress bar is called.
        console: A `rich.console.Console`.
        workers: Processes. Each imports what `work` needs once.
        paths: Folders that go in front of the workers' `sys.path`, for another version of a host.
        resume: Keep the results that `out` has, and only do the other jobs. Which code a result is from isn't known:
            start anew after a change.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    done = _read(out) if resume else []
    results = {i: row for i, job in enumerate(jobs) for row in done if job.items() <= row.items()}
    waiting = [i for i in range(len(jobs)) if i not in results]
    out.write_text("".join(json.dumps(row) + "\n" for row in done))
    log = out.with_suffix(".log")
    log.write_text("")
    if waiting:
        with _pool(min(workers, len(waiting)), log, paths) as pool, _bar(title, len(jobs), console) as advance:
            advance(len(results))
            futures = {pool.submit(_timed, work, jobs[i]): i for i in waiting}
            try:
                for future in as_completed(futures):
                    i = futures[future]
                    results[i] = {**jobs[i], **future.result()}
                    with out.open("a") as file:
                        file.write(json.dumps(results[i]) + "\n")
                    advance(1)
            except KeyboardInterrupt:
                pool.shutdown(wait=False, cancel_futures=True)
                sys.exit(f"Interrupted after {len(results)} of {len(jobs)} runs; --resume goes on from {out}")
            except _JobFailed as error:
                pool.shutdown(wait=False, cancel_futures=True)
                sys.exit(f"{title}: {error}")
            except BrokenProcessPool:
                tail = "\n".join(log.read_text().splitlines()[-20:])
                sys.exit(f"{title}: a worker process died (out of memory?); the end of {log}:\n{tail}")
    return [results[i] for i in range(len(jobs))]


class _JobFailed(Exception):
    """What went wrong in a worker, with the job it was."""


def _timed(work, job):
    start = time.perf_counter()
    try:
        found = work(job)
    except Exception as error:  # whatever it is, it has to name the job on its way through the pool
        raise _JobFailed(f"{job} failed:\n{traceback.format_exc()}") from error
    return {**found, "seconds": round(time.perf_counter() - start, 2)}


@contextmanager
def _pool(workers, log, paths):
    """A pool of fresh processes: no thread or import of this one is in them."""
    with mock.patch.dict(os.environ, QUIET):
        pool = ProcessPoolExecutor(
            workers, multiprocessing.get_context("spawn"), initializer=_start, initargs=(log, list(map(str, paths)))
        )
        with pool:
            yield pool


def _start(log, paths):
    """Send what a worker prints, also what is not Python, to the log."""
    sys.path[:0] = paths
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)


@contextmanager
def _bar(title, total, console):
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task(title, total=total)
        yield lambda runs: progress.advance(bar, runs)


def _read(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
