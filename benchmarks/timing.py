"""Timers shared by the benchmarks, in microseconds of one call.

bench_us   triton.testing.do_bench: L2 flushed before each call, about 5 us of fixed cost in it.
graph_us   calls over rotating buffers in a CUDA graph: no launch cost, operands from DRAM.

Both bars and yardsticks are ratios of two figures of the same timer in the same run: neither timer
says alone how fast a kernel of a few microseconds is.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

import torch

Call = Callable[[], Any]
Job = TypeVar("Job")
Result = TypeVar("Result")

# A graph of more than about 2 ms was seen to take twice its length (H200, November 2026).
GRAPH_US = 900.0
GRAPH_WARMUP, GRAPH_REPEATS = 3, 10


def bench_us(call: Call, warmup_ms: float = 5, rep_ms: float = 25) -> float:
    """Median of `call` with L2 flushed before each, by triton.testing.do_bench."""
    import triton

    options = {"warmup": warmup_ms, "rep": rep_ms, "return_mode": "median"}
    return float(triton.testing.do_bench(call, **options)) * 1e3


def num_buffers(bytes_per_call: int) -> int:
    """How many sets of buffers of one call exceed four times the L2 of this GPU.

    Twice would do if L2 always gave up what was used least recently.
    """
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(2, 4 * l2 // bytes_per_call + 1)


def graph_plan(num_calls: int, estimate_us: float) -> list[range]:
    """Which of the calls 0..num_calls-1, counted on past the end, each graph runs.

    One graph that goes round several times when that takes less than GRAPH_US, else as many as
    it takes to keep each below that: L2 is as cold between graphs as between calls.
    """
    per_graph = max(1, int(GRAPH_US / max(estimate_us, 1.0)))
    if per_graph >= num_calls:
        return [range(per_graph // num_calls * num_calls)]
    starts = range(0, num_calls, per_graph)
    return [range(start, min(start + per_graph, num_calls)) for start in starts]


def _capture(calls: Sequence[Call]) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Outputs live until the end: else all calls would write to the same memory, and L2 would
        # swallow most of what they write.
        kept = [call() for call in calls]
    del kept
    return graph


def graph_us(calls: Sequence[Call], estimate_us: float) -> float:
    """Median time of one call; each call has its own inputs, num_buffers of them, and output.

    Calls must have run before (compiled, libraries initialized). estimate_us: of one call, not
    less than half of what it takes.
    """
    plan = graph_plan(len(calls), estimate_us)
    torch.cuda.synchronize()
    graphs = [_capture([calls[i % len(calls)] for i in indices]) for indices in plan]
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    times = []
    for repeat in range(GRAPH_WARMUP + GRAPH_REPEATS):
        total = 0.0
        for graph in graphs:
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            total += start.elapsed_time(stop) * 1e3
        if repeat >= GRAPH_WARMUP:
            times.append(total / sum(map(len, plan)))
    return sorted(times)[len(times) // 2]


def in_parallel(function: Callable[[Job], Result], jobs: Sequence[Job]) -> list[Result]:
    """function(job) in other processes, to fill the compilers' caches on disk; results in order.

    Where other processes cannot run, in this one.
    """
    workers = max(1, min(len(jobs), (os.cpu_count() or 2) - 1, 16))
    try:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            return list(pool.map(function, jobs, chunksize=1))
    except Exception:  # a process killed for memory, no processes at all: slower, not fatal
        traceback.print_exc()
        return [function(job) for job in jobs]
