"""Few rows, 16-bit activations, against the products that torch has for them.

    python -m benchmarks.bench_gemv --json gemv.json
    python -m benchmarks.bench_gemv --shapes 18432x3072 --rows 1 4 --variants w4a16 tinygemm

Modulation linears of real models, M = 1, 2, 4, 8, 16. Calls run in a CUDA graph over buffers that
rotate through four times the L2 (benchmarks/timing.py): weights come from DRAM and launching is
not what is measured. A row: op, variant, m, n, k, us (median over rounds, in which variants take
turns), spread (largest less smallest of them over us), tops (2 M N K), gbps (bytes of weights, x
and y, each once), copy (gbps over that of a large copy in this run, bytes read and written),
vs_bf16 and vs_tinygemm (their us over this one's; null where they did not run).

w4a16, w3a16, w2a16   lrq::gemv
bf16                  torch.nn.functional.linear
tinygemm              torch.ops.aten._weight_int4pack_mm, uniform 4 bits in groups of 128
nf4                   bitsandbytes.matmul_4bit, where it is installed: 4 bits in blocks of 64
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import PeerMissing, nf4, tinygemm
from benchmarks.timing import graph_us, num_buffers
from lrq_kernels.ops import GEMV_MAX_ROWS
from lrq_quant.machine_limits import copy_gbps

Row = dict[str, Any]
Shape = tuple[int, int]  # N, K
Call = Callable[[], Tensor]

# N x K of the modulation linears of a model, more of them in dit_shapes.py.
SHAPES = {
    (18432, 3072): "FLUX.1 double blocks, Qwen-Image",
    (9216, 3072): "FLUX.1 single blocks",
    (6144, 3072): "FLUX.1 norm_out",
    (6912, 1152): "PixArt-Sigma",
    (13824, 1536): "SD3.5-medium, blocks with two attentions",
    (9216, 1536): "SD3.5-medium",
    (14592, 2432): "SD3.5-large",
}
ROWS = (1, 2, 4, 8, 16)
LRQ_BITS = {"w4a16": 4, "w3a16": 3, "w2a16": 2}
VARIANTS = (*LRQ_BITS, "bf16", "tinygemm", "nf4")


# ---- what is timed ------------------------------------------------------------------------------


def weight_bytes(variant: str, n: int, k: int) -> int:
    """Of everything that a call reads beside x: codes, levels, scales."""
    if variant in LRQ_BITS:
        bits = LRQ_BITS[variant]
        return n * k * bits // 8 + n * (2**bits + 4)
    if variant == "tinygemm":
        return n * k // 2 + 4 * n * (k // 128)
    if variant == "nf4":
        return n * k // 2 + 4 * n * (k // 64)
    return 2 * n * k


def make_call(variant: str, x: Tensor, n: int) -> Call:
    """A call on a weight of its own, [N, K] of random values, and x bf16 [M, K]."""
    k = x.shape[1]
    if variant in LRQ_BITS:
        from lrq_kernels.testing import make_problem

        bits = LRQ_BITS[variant]
        problem = make_problem(1, n, k, bits, device=x.device)
        arguments = (problem.weight, problem.levels, problem.weight_scale, None, bits, n)
        return lambda: torch.ops.lrq.gemv.default(x, *arguments)
    weight = torch.randn(n, k, device=x.device, dtype=torch.bfloat16)
    if variant == "tinygemm":
        return tinygemm(x, weight)
    if variant == "nf4":
        return nf4(x, weight)
    return lambda: torch.nn.functional.linear(x, weight)


def time_variant(variant: str, m: int, n: int, k: int) -> float:
    """Median us of one call."""
    size = weight_bytes(variant, n, k)
    calls = []
    for _ in range(num_buffers(size)):
        calls.append(make_call(variant, torch.randn(m, k, device="cuda").bfloat16(), n))
        torch.cuda.empty_cache()  # of what packing left
    calls[0]()
    torch.cuda.synchronize()
    return graph_us(calls, estimate_us=max(2.0, size / 1e6))  # about a quarter of copy bandwidth


def rows_of(samples: dict[str, list[float]], m: int, n: int, k: int, ceiling: float) -> list[Row]:
    """A row for each variant of one problem, from its us in each round; `ceiling` in GB/s."""
    us = {variant: statistics.median(rounds) for variant, rounds in samples.items()}
    rows = []
    for variant, time_us in us.items():
        gbps = (weight_bytes(variant, n, k) + 2 * m * (n + k)) / time_us / 1e3
        row: Row = {"op": "gemv", "variant": variant, "m": m, "n": n, "k": k, "us": time_us}
        row["spread"] = (max(samples[variant]) - min(samples[variant])) / time_us
        row |= {"tops": 2e-6 * m * n * k / time_us, "gbps": gbps, "copy": gbps / ceiling}
        for peer in ("bf16", "tinygemm"):
            row[f"vs_{peer}"] = us[peer] / time_us if peer in us else None
        rows.append(row)
    return rows


def measure(m: int, shape: Shape, variants: Iterable[str], rounds: int) -> dict[str, list[float]]:
    """us of every variant that runs here, in each of the rounds."""
    samples: dict[str, list[float]] = {}
    for _ in range(rounds):
        for variant in variants:
            try:
                samples.setdefault(variant, []).append(time_variant(variant, m, *shape))
            except (PeerMissing, RuntimeError) as error:
                print(f"{variant} skipped: {str(error).splitlines()[0]}", flush=True)
    return {variant: rounds for variant, rounds in samples.items() if rounds}


# ---- reports ------------------------------------------------------------------------------------

HEADER = (
    f"{'M':>3} {'N x K':>14} {'variant':10}{'us':>8}{'spread':>7}{'GB/s':>8}{'of copy':>9}"
    f"{'xbf16':>7}{'xtinygemm':>11}"
)


def line(row: Row) -> str:
    ratios = [row["vs_bf16"], row["vs_tinygemm"]]
    bf16, tiny = ("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
    size = f"{row['n']} x {row['k']}"
    return (
        f"{row['m']:>3} {size:>14} {row['variant']:10}{row['us']:8.2f}{100 * row['spread']:6.1f}%"
        f"{row['gbps']:8.0f}{100 * row['copy']:8.0f}%{bf16:>7}{tiny:>11}"
    )


def parse_shape(text: str) -> Shape:
    n, _, k = text.partition("x")
    if not (n.isdigit() and k.isdigit() and int(n) and int(k)):
        raise argparse.ArgumentTypeError(f"expected NxK, got {text!r}")
    return int(n), int(k)


def parse_arguments(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=[*SHAPES], metavar="NxK")
    parser.add_argument(
        "--rows",
        nargs="+",
        type=int,
        choices=range(1, GEMV_MAX_ROWS + 1),
        default=ROWS,
        metavar="M",
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser.parse_args(words)


def main() -> None:
    arguments = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gemv: needs a CUDA device")
    ceiling = copy_gbps()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {ceiling:.0f} GB/s")
    print(HEADER)
    rows: list[Row] = []
    for shape in arguments.shapes:
        for m in arguments.rows:
            samples = measure(m, shape, arguments.variants, arguments.rounds)
            new = rows_of(samples, m, *shape, ceiling)
            print("\n".join(map(line, new)), flush=True)
            rows += new
            if arguments.json:  # after each problem: a run that is stopped keeps what it has
                arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
