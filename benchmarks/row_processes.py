"""Rows of a benchmark by several processes on each GPU: for rows that leave most of a GPU idle.

Each process takes jobs from one queue and keeps what it has loaded for the job before.
"""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from queue import Empty
from typing import Any, TypeVar

import torch

from benchmarks.rows import Row

Job = TypeVar("Job")
# The rows of jobs, one each and in their order, on a device.
MeasureRows = Callable[[Iterable[Job], torch.device], Iterable[Row]]
_LOOK_SECONDS = 2.0  # between two looks at whether all processes live


def devices_of(device: torch.device) -> list[torch.device]:
    """All GPUs for "cuda", else the one that is named."""
    if device.type != "cuda" or device.index is not None:
        return [device]
    return [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def rows_in_processes(
    measure: MeasureRows[Job], jobs: Sequence[Job], devices: Sequence[torch.device], processes: int
) -> Iterator[Row]:
    """Rows of `jobs` in the order in which they are done, by `processes` dealt over `devices`.

    measure: must be possible to pickle. Raises RuntimeError with the traceback of a process that
    failed, or the exit code of one that died; what others measured before has been handed out.
    """
    context = multiprocessing.get_context("spawn")
    queue, results = context.Queue(), context.Queue()
    for job in [*jobs, *[None] * processes]:
        queue.put(job)
    pool = [
        context.Process(
            target=_work, args=(measure, queue, results, devices[i % len(devices)]), daemon=True
        )
        for i in range(processes)
    ]
    for process in pool:
        process.start()
    try:
        for _ in jobs:
            yield _next_row(results, pool)
    finally:
        for process in pool:
            process.terminate()
            process.join()


def _next_row(results: Any, pool: Sequence[Any]) -> Row:
    while True:
        try:
            row = results.get(timeout=_LOOK_SECONDS)
        except Empty:
            # One that failed in Python has said so, and ended with 0.
            died = [process.exitcode for process in pool if process.exitcode]
            if died:
                raise RuntimeError(f"a process ended with exit code {died[0]}") from None
            continue
        if isinstance(row, str):
            raise RuntimeError(f"a process failed:\n{row}")
        return dict(row)


def _work(measure: MeasureRows[Any], queue: Any, results: Any, device: torch.device) -> None:
    """Gives back the row of every job until it gets None, or the text of an error."""
    try:
        torch.set_num_threads(1)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        for row in measure(iter(queue.get, None), device):
            results.put(row)
    except Exception:  # whatever it is, the process that waits has to know it
        results.put(traceback.format_exc())
