"""What this GPU reaches at most, measured in a second: the limits that kernels are held to."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

SIDE = 8192  # of the products that are timed


class Limits(NamedTuple):
    """copy_gbps: bytes read and written by a copy; tops_8, tops_16: operations a second, in 1e12,
    of torch's best product of 8-bit and of bf16 matrices. None: not known."""

    copy_gbps: float | None = None
    tops_8: float | None = None
    tops_16: float | None = None


def measure_limits() -> Limits:
    """Of the current CUDA device, warm."""
    return Limits(copy_gbps(), product_tops(8), product_tops(16))


def copy_gbps(size: int = 1 << 29) -> float:
    """GB/s of a large copy, bytes read and written: the ceiling of what memory can give."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2e-9 * size / _median_seconds(lambda: target.copy_(source))


def product_tops(bits: int) -> float | None:
    """1e12 operations a second of an 8192 x 8192 x 8192 product; of 8 bits the better of fp8 and
    int8, None where torch has neither here."""
    calls = [_bf16_product] if bits == 16 else [_fp8_product, _int8_product]
    best = None
    for make in calls:
        try:
            seconds = _median_seconds(make())
        except RuntimeError:  # torch refuses the type on this GPU; the other may run
            continue
        best = seconds if best is None else min(best, seconds)
    return None if best is None else 2e-12 * SIDE**3 / best


def _bf16_product() -> Callable[[], object]:
    a, b = (torch.randn(SIDE, SIDE, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return lambda: a @ b.t()


def _fp8_product() -> Callable[[], object]:
    a, b = (torch.randn(SIDE, SIDE, device="cuda").to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device="cuda")
    options = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    return lambda: torch._scaled_mm(a, b.t(), one, one, **options)


def _int8_product() -> Callable[[], object]:
    a, b = (torch.randint(-99, 99, (SIDE, SIDE), device="cuda").to(torch.int8) for _ in range(2))
    return lambda: torch._int_mm(a, b.t())


def _median_seconds(call: Callable[[], object], warmup: int = 10, repeats: int = 20) -> float:
    for _ in range(warmup):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    pairs = zip(marks[:-1], marks[1:], strict=True)
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3
