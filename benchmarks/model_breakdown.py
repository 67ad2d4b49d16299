"""What a forward of a variant is made of, for benchmarks.bench_model: ms by family of kernels, and
what its products reach.

Operations are those that the model asks for: of linears and convolutions, and of attention. What a
package multiplies beyond those (SDNQ its Hadamard transform) takes time of GEMM and adds none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.model_variants import Variant
from lrq_quant.kernel_families import (
    ATTENTION,
    FAMILIES,
    GEMM,
    LAUNCH_GAPS,
    OTHER_GEMM,
    OUR_A16,
    OUR_GEMM,
)
from lrq_quant.machine_limits import Limits
from lrq_quant.op_work import count_work
from lrq_quant.profiling import record_forwards

# How many forwards are recorded, and kernels named.
RECORDED_FORWARDS, NAMED_KERNELS = 3, 12
_KINDS = {GEMM: (OUR_GEMM, OUR_A16, OTHER_GEMM), ATTENTION: (ATTENTION,)}


def product_operations(model: nn.Module, inputs: dict[str, Any]) -> dict[str, int]:
    """GEMM and ATTENTION -> operations of one forward, which runs: before the model is compiled or
    captured, in bf16 or by lrq."""
    work = count_work(model, inputs)
    return {
        family: sum(work[kind].operations for kind in kinds if kind in work)
        for family, kinds in _KINDS.items()
    }


def broken_down(
    model: nn.Module,
    inputs: dict[str, Any],
    variant: Variant,
    operations: Mapping[str, int],
    limits: Limits,
    trace: Path | None = None,
) -> dict[str, Any]:
    """families: ms of a recorded forward by family; kernels: the slowest, with their family;
    gemm_tops and gemm_share: TOPS and their share of the limit, None where that is not known; so of
    attention. trace: as of record_forwards.

    Raises RuntimeError where the profiler saw nothing.
    """
    recording = record_forwards(model, inputs, RECORDED_FORWARDS, trace=trace)
    row: dict[str, Any] = {
        "recorded_ms": recording.wall_ms,
        "families": {family.name: family.ms for family in recording.families},
        "kernels": [asdict(kernel) for kernel in recording.kernels[:NAMED_KERNELS]],
    }
    for family, limit in ((GEMM, _gemm_limit(variant, limits)), (ATTENTION, limits.tops_16)):
        ms = row["families"].get(family)
        if ms:
            tops = row[f"{family}_tops"] = operations[family] / ms / 1e9
            row[f"{family}_share"] = None if limit is None else tops / limit
    return row


def _gemm_limit(variant: Variant, limits: Limits) -> float | None:
    """Of what the linears of the blocks multiply, nearly all of a forward."""
    in_16_bits = variant.base in ("bf16", "nf4") or "a16" in variant.base
    return limits.tops_16 if in_16_bits else limits.tops_8


def table(rows: list[dict[str, Any]]) -> str:
    """Variants x families, of the rows that have them."""
    rows = [row for row in rows if "families" in row]
    names = [
        name for name in (*FAMILIES, LAUNCH_GAPS) if any(name in row["families"] for row in rows)
    ]
    widths = [2 + max(len(name), 7) for name in names]
    titles = "".join(f"{name:>{width}}" for name, width in zip(names, widths, strict=True))
    products = "".join(f"{f'TOPS of {family}':>19}" for family in _KINDS)
    lines = [
        "of a recorded forward: ms by family, TOPS of what the model asks for (share of the limit)",
        f"{'variant':23}{'ms':>9}{titles}{products}",
    ]
    for row in rows:
        values = (row["families"].get(name, 0.0) for name in names)
        cells = "".join(f"{ms:{width}.2f}" for ms, width in zip(values, widths, strict=True))
        reached = "".join(f"{text:>19}" for text in _reached(row))
        lines.append(f"{row['variant']:23}{row['recorded_ms']:9.2f}{cells}{reached}")
    return "\n".join(lines)


def _reached(row: dict[str, Any]) -> Iterator[str]:
    for family in _KINDS:
        tops, share = row.get(f"{family}_tops"), row.get(f"{family}_share")
        figures = "-" if tops is None else f"{tops:.0f}"
        yield figures if share is None else f"{figures} ({share:.0%})"
