"""The quantized GEMM against the matrix products that torch has, on the linears of real models.

    python -m benchmarks.bench_gemm --json gemm.json
    python -m benchmarks.bench_gemm --shapes 4608,3072,3072 --variants w4a8 fp8_row --configs

Every variant of a shape runs in the same process, in turns, on random data. Two regimes, which on a
GPU at its power limit differ by 15 %:

    sustained   200 ms of warm-up, then at least 300 ms back to back
    burst       0.4 s idle, 4 warm-up calls, then 28

Operands rotate over at least 220 MB, so that they come from DRAM; calls shorter than 100 us run in
a CUDA graph, so that launching them is not what is measured. us is the median over batches of the
regime and over rounds, spread the distance of their quartiles over it; tops counts 2 M N K and
gbps the bytes of all operands and the result, each once. roof is the larger share of two ceilings
that this run measures first, in a burst: the copy bandwidth, and the rate of torch's products of
8192 x 8192 x 8192 in the width in which the variant multiplies: bf16, or the better of fp8 and
int8. sdnq and gemlite quantize their 16-bit tokens within the call, the others are given codes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers
from benchmarks.dit_shapes import FLUX_DEV, PIXART_SIGMA
from lrq_kernels import _planner
from lrq_kernels.op_checks import GEMV_MAX_ROWS
from lrq_kernels.testing import make_problem
from lrq_quant.machine_limits import copy_gbps

ROTATED_BYTES = 220_000_000
GRAPH_BELOW_US, GRAPH_US = 100.0, 900.0
SUSTAINED_WARMUP_S, SUSTAINED_S, BATCH_S = 0.2, 0.3, 0.003
BURST_IDLE_S, BURST_WARMUP, BURST_BATCH, BURST_BATCHES = 0.4, 4, 4, 7
CEILING_SHAPE = (8192, 8192, 8192)
# The best of which is a ceiling, by the bits of what is multiplied.
CEILING_PEERS = {8: ("fp8_tensor", "int_mm"), 16: ("bf16",)}
LRQ_BITS = {"w4a8": 4, "w3a8": 3, "w2a8": 2}
LRQ_A16_BITS = {"w4a16": 4, "w3a16": 3, "w2a16": 2}
PEERS = ("bf16", "fp8_row", "fp8_tensor", "int_mm", *peers.FUNCTIONS)
MULTIPLIES_16 = ("bf16", "tinygemm", "nf4", *LRQ_A16_BITS)  # the others multiply 8 bits
NAMES = (*LRQ_BITS, "w4a16", *PEERS)
EPILOGUES = ("none", "bias", "gelu", "residual")

Shape = tuple[int, int, int]
Call = Callable[[], Tensor]


@dataclass
class Variant:
    """One way to compute a product: a call for each set of operands, results kept in turn."""

    name: str
    calls: list[Call]
    bytes_per_call: int
    samples: dict[str, list[float]] = field(default_factory=dict)  # regime -> us of each batch
    graph: Any = None

    def __post_init__(self) -> None:
        self.results: list[Tensor | None] = [None] * len(self.calls)
        self.turn = 0

    def run(self, count: int) -> None:
        for _ in range(count):
            self.turn = (self.turn + 1) % len(self.calls)
            self.results[self.turn] = self.calls[self.turn]()

    def capture(self, estimate_us: float) -> None:
        """From now on `run_batch` replays a graph of several calls."""
        per_graph = max(1, int(GRAPH_US / max(estimate_us, 1.0)))
        self.per_graph = per_graph
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run(per_graph)

    def run_batch(self, count: int) -> int:
        """Runs at least `count` calls and says how many."""
        if self.graph is None:
            self.run(count)
            return count
        replays = -(-count // self.per_graph)
        for _ in range(replays):
            self.graph.replay()
        return replays * self.per_graph


def sets_for(bytes_per_call: int) -> int:
    return max(2, -(-ROTATED_BYTES // bytes_per_call))


# ---- what is compared ---------------------------------------------------------------------------


def lrq_variant(
    name: str, shape: Shape, epilogue: str, device: str, config: int | None = None
) -> Variant:
    """lrq::gemm to bf16, or lrq::gemm_config on a row of the planner's table."""
    m, n, k = shape
    bits = LRQ_BITS[name]
    size = m * k + n * k * bits // 8 + 2 * m * n * (2 if epilogue == "residual" else 1)
    op, extra = torch.ops.lrq.gemm.default, ()
    if config is not None:
        op, extra = torch.ops.lrq.gemm_config.default, (config,)
        name = f"{name}:{_planner.gemm_configs()[config].name}"
    problem = make_problem(m, n, k, bits, device=device)

    def call() -> Call:
        x_q, weight = problem.x_q.clone(), problem.weight.clone()
        residual = gate = None
        if epilogue == "residual":
            residual = torch.randn(m, n, device=device, dtype=torch.bfloat16)
            gate = torch.randn(1, n, device=device, dtype=torch.bfloat16)
        arguments = (
            x_q,
            problem.x_scale,
            weight,
            problem.levels,
            problem.weight_scale,
            None if epilogue == "none" else problem.bias,
            residual,
            gate,
            bits,
            n,
            "gelu_tanh" if epilogue == "gelu" else "none",
            torch.bfloat16,
            *extra,
        )
        return lambda: op(*arguments)

    return Variant(name, [call() for _ in range(sets_for(size))], size)


def a16_variant(name: str, shape: Shape, device: str, tile: int = -1) -> Variant:
    """lrq::gemm_a16 with a bias, on bf16."""
    m, n, k = shape
    bits = LRQ_A16_BITS[name]
    size = 2 * m * k + n * k * bits // 8 + 2 * m * n
    problem = make_problem(1, n, k, bits, device=device)
    x = torch.randn(m, k, device=device)

    def call() -> Call:
        constants = (problem.weight.clone(), problem.levels, problem.weight_scale, problem.bias)
        arguments = (x.to(torch.bfloat16), *constants, bits, n, tile)
        return lambda: torch.ops.lrq.gemm_a16.default(*arguments)

    if tile >= 0:
        name = "{}:m{}n{}".format(name, *_planner.a16_tiles()[tile])
    return Variant(name, [call() for _ in range(sets_for(size))], size)


def dequantize_variant(name: str, shape: Shape, device: str) -> Variant:
    """lrq::dequantize and torch's linear, what lrq::gemm_a16 does where it has no better way."""
    m, n, k = shape
    bits = LRQ_A16_BITS[name]
    problem = make_problem(1, n, k, bits, device=device)
    x, bias = torch.randn(m, k, device=device), problem.bias.to(torch.bfloat16)

    def call() -> Call:
        rows, weight = x.to(torch.bfloat16), problem.weight.clone()
        arguments = (weight, problem.levels, problem.weight_scale, n, k, bits, torch.bfloat16)
        dequantize = torch.ops.lrq.dequantize.default
        return lambda: torch.nn.functional.linear(rows, dequantize(*arguments), bias)

    size = 2 * m * k + n * k * bits // 8 + 2 * m * n
    return Variant(f"{name}:dequantize", [call() for _ in range(sets_for(size))], size)


def peer_variant(name: str, shape: Shape, device: str) -> Variant:
    """A plain product of torch without an epilogue."""
    m, n, k = shape
    x = torch.randn(m, k, device=device)
    w = torch.randn(n, k, device=device)
    if name == "bf16":
        size = 2 * (m * k + n * k + m * n)

        def call() -> Call:
            a, b = x.to(torch.bfloat16), w.to(torch.bfloat16)
            return lambda: torch.nn.functional.linear(a, b)
    elif name == "int_mm":
        size = m * k + n * k + 4 * m * n

        def call() -> Call:
            a, b = (x * 30).to(torch.int8), (w * 30).to(torch.int8)
            return lambda: torch._int_mm(a, b.t())
    elif name in peers.FUNCTIONS:
        size = 2 * m * k + n * k * peers.WEIGHT_BITS[name] // 8 + 2 * m * n

        def call() -> Call:
            return peers.FUNCTIONS[name](x.to(torch.bfloat16), w.to(torch.bfloat16))
    else:
        size = m * k + n * k + 2 * m * n
        scales = (torch.ones((), device=device), torch.ones((), device=device))
        if name == "fp8_row":
            scales = (torch.ones(m, 1, device=device), torch.ones(1, n, device=device))

        def call() -> Call:
            a, b = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
            return lambda: torch._scaled_mm(
                a, b.t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=True
            )

    return Variant(name, [call() for _ in range(sets_for(size))], size)


def make_variants(
    shape: Shape, names: list[str], epilogue: str, sweep: bool, device: str
) -> Iterator[Variant]:
    """Variants that run here; the others are named with the reason."""
    for name in names:
        if name in LRQ_BITS:
            configs: list[int | None] = [None]
            if sweep:
                arch = 10 * torch.cuda.get_device_capability()[0]
                arch += torch.cuda.get_device_capability()[1]
                configs += [
                    index
                    for index, config in enumerate(_planner.gemm_configs())
                    if config.is_legal(*shape, LRQ_BITS[name], arch)
                ]
            for config in configs:
                yield lrq_variant(name, shape, epilogue, device, config)
            continue
        if name in LRQ_A16_BITS:
            kernel = torch.cuda.get_device_capability() == (9, 0)
            tiles = range(len(_planner.a16_tiles())) if sweep and kernel else ()
            for tile in (-1, *tiles):
                yield a16_variant(name, shape, device, tile)
            if sweep:
                yield dequantize_variant(name, shape, device)
            continue
        try:
            variant = peer_variant(name, shape, device)
            variant.run(1)
        except (peers.PeerMissing, RuntimeError, AttributeError, ValueError) as error:
            print(f"{name} skipped for {shape}: {str(error).splitlines()[0]}", flush=True)
            continue
        yield variant


# ---- timing -------------------------------------------------------------------------------------


def batch_us(variant: Variant, count: int, batches: int) -> list[float]:
    """us of a call in each of `batches` batches that follow without a gap."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(batches + 1)]
    events[0].record()
    calls = 1
    for event in events[1:]:
        calls = variant.run_batch(count)
        event.record()
    torch.cuda.synchronize()
    return [
        1e3 * begin.elapsed_time(end) / calls
        for begin, end in zip(events[:-1], events[1:], strict=True)
    ]


def prepare(variant: Variant) -> float:
    """Warms up, estimates us of a call, and captures a graph where launching would count."""
    variant.run(3)
    torch.cuda.synchronize()
    estimate = statistics.median(batch_us(variant, 10, 3))
    if estimate < GRAPH_BELOW_US:
        variant.capture(estimate)
        variant.run_batch(1)
        estimate = statistics.median(batch_us(variant, 1, 3))
    return estimate


def sustained(variant: Variant, estimate_us: float) -> list[float]:
    per_batch = max(1, int(BATCH_S * 1e6 / estimate_us))
    variant.run_batch(int(SUSTAINED_WARMUP_S * 1e6 / estimate_us) + 1)
    batches = int(SUSTAINED_S * 1e6 / (per_batch * estimate_us)) + 1
    return batch_us(variant, per_batch, batches)


def burst(variant: Variant, estimate_us: float) -> list[float]:
    torch.cuda.synchronize()
    time.sleep(BURST_IDLE_S)
    variant.run_batch(BURST_WARMUP)
    return batch_us(variant, BURST_BATCH, BURST_BATCHES)


REGIMES = {"sustained": sustained, "burst": burst}


def spread(samples: list[float]) -> float:
    if len(samples) < 4:
        return 0.0
    low, middle, high = statistics.quantiles(samples, n=4)
    return (high - low) / middle


@dataclass
class Ceilings:
    """What this GPU reaches at most: bytes, and operations by the bits that are multiplied."""

    copy_gbps: float
    tops: dict[int, float]

    def tops_of(self, variant: str) -> float:
        return self.tops[16 if variant.partition(":")[0] in MULTIPLIES_16 else 8]


def measure_ceilings() -> Ceilings:
    """Of peers that do not run here none is taken; without any the ceiling is infinite."""
    m, n, k = CEILING_SHAPE
    tops = {}
    for bits, names in CEILING_PEERS.items():
        best = float("inf")
        for variant in make_variants(CEILING_SHAPE, list(names), "none", False, "cuda"):
            best = min(best, statistics.median(burst(variant, prepare(variant))))
        tops[bits] = 2e-6 * m * n * k / best if best < float("inf") else float("inf")
    return Ceilings(copy_gbps(), tops)


def rows_of(variants: list[Variant], shape: Shape, epilogue: str, ceilings: Ceilings) -> list[dict]:
    """One row for each variant and regime, with its ratios to bf16 and to the better fp8."""
    m, n, k = shape
    rows = []
    for regime in REGIMES:
        us = {v.name: statistics.median(v.samples[regime]) for v in variants if regime in v.samples}
        fp8 = min((us[name] for name in ("fp8_row", "fp8_tensor") if name in us), default=None)
        for variant in variants:
            if variant.name not in us:
                continue
            time_us = us[variant.name]
            tops, gbps = 2e-6 * m * n * k / time_us, variant.bytes_per_call / time_us / 1e3
            ceiling = ceilings.tops_of(variant.name)
            rows.append(
                {
                    "op": "gemm",
                    "variant": variant.name,
                    "regime": regime,
                    "epilogue": epilogue if variant.name[:4] in LRQ_BITS else "none",
                    "m": m,
                    "n": n,
                    "k": k,
                    "us": time_us,
                    "spread": spread(variant.samples[regime]),
                    "tops": tops,
                    "gbps": gbps,
                    "ceiling_tops": ceiling if ceiling < float("inf") else None,
                    "ceiling_gbps": ceilings.copy_gbps,
                    "roof": max(tops / ceiling, gbps / ceilings.copy_gbps),
                    "vs_bf16": us["bf16"] / time_us if "bf16" in us else None,
                    "vs_fp8": fp8 / time_us if fp8 else None,
                }
            )
    return rows


def measure(
    shape: Shape, variants: list[Variant], regimes: list[str], rounds: int
) -> list[Variant]:
    """Fills the samples: rounds of every variant in turn, so that clock drift meets all alike."""
    estimates = [prepare(variant) for variant in variants]
    for _ in range(rounds):
        for regime in regimes:
            for variant, estimate in zip(variants, estimates, strict=True):
                samples = REGIMES[regime](variant, estimate)
                variant.samples.setdefault(regime, []).extend(samples)
    return variants


def print_rows(rows: list[dict]) -> None:
    for row in rows:
        ratios = "".join(
            f" {row[key]:6.2f}" if row[key] is not None else "      -"
            for key in ("vs_bf16", "vs_fp8")
        )
        print(
            f"{row['m']:>6} {row['n']:>6} {row['k']:>6} {row['variant']:22} {row['regime']:10}"
            f"{row['us']:9.1f} {100 * row['spread']:4.1f}% {row['tops']:7.0f} {row['gbps']:7.0f}"
            f" {100 * row['roof']:4.0f}%{ratios}",
            flush=True,
        )


def plot(rows: list[dict], path: Path) -> None:
    """Roofline: operations a second over operations a byte, best regime of each variant and shape,
    below the ceilings of this run. A word where matplotlib lacks."""
    try:
        import matplotlib

        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        print(f"no plot {path}: matplotlib is not installed")
        return
    best: dict[tuple, dict] = {}
    for row in rows:
        key = (row["variant"], row["m"], row["n"], row["k"])
        if key not in best or row["us"] < best[key]["us"]:
            best[key] = row
    figure, axes = pyplot.subplots(figsize=(9.0, 6.0))
    names = [*dict.fromkeys(row["variant"] for row in best.values())]
    for index, name in enumerate(names):
        points = [row for row in best.values() if row["variant"] == name]
        axes.plot(
            [1e3 * row["tops"] / row["gbps"] for row in points],
            [row["tops"] for row in points],
            "o^sD"[index // 10 % 4],
            color=pyplot.get_cmap("tab10")(index % 10),
            label=name,
        )
    intensities = [1e3 * row["tops"] / row["gbps"] for row in best.values()]
    low, high = min(intensities) / 1.5, max(intensities) * 1.5
    copy = rows[0]["ceiling_gbps"]
    for ceiling in sorted({row["ceiling_tops"] for row in rows} - {None}):
        knee = 1e3 * ceiling / copy
        xs = [low, min(max(low, knee), high), high]
        axes.plot(xs, [min(ceiling, x * copy / 1e3) for x in xs], color="0.4", linewidth=1)
        axes.annotate(f"{ceiling:.0f} TOPS", (high, min(ceiling, high * copy / 1e3)), ha="right")
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="TOPS")
    axes.set_title(f"{copy:.0f} GB/s copy; ceilings measured in the same run")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def default_shapes() -> list[Shape]:
    shapes = [shape[1:4] for shape in (*FLUX_DEV, *PIXART_SIGMA) if shape.m > GEMV_MAX_ROWS]
    return [*dict.fromkeys(shapes), (4608, 3072, 3072), (8192, 8192, 8192)]


def parse_shape(text: str) -> Shape:
    m, n, k = (int(size) for size in text.split(","))
    return m, n, k


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="M,N,K")
    parser.add_argument("--variants", nargs="+", default=[*NAMES])
    parser.add_argument("--regimes", nargs="+", choices=[*REGIMES], default=[*REGIMES])
    parser.add_argument("--epilogue", choices=EPILOGUES, default="bias", help="of lrq alone")
    parser.add_argument("--configs", action="store_true", help="every legal tile configuration too")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--plot", type=Path, help="draw a roofline of the rows into this file")
    arguments = parser.parse_args()
    known = (*NAMES, *LRQ_A16_BITS)
    if unknown := [name for name in arguments.variants if name not in known]:
        parser.error(f"no variant {unknown}; there are {[*dict.fromkeys(known)]}")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA GPU")

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    ceilings = measure_ceilings()
    of_bits = ", ".join(f"{tops:.0f} TOPS in {bits} bits" for bits, tops in ceilings.tops.items())
    print(f"ceilings: copy {ceilings.copy_gbps:.0f} GB/s, {of_bits}")
    sizes = f"{'M':>6} {'N':>6} {'K':>6} {'variant':22} {'regime':10}"
    print(
        f"{sizes}{'us':>9} {'iqr':>5} {'TOPS':>7} {'GB/s':>7} {'roof':>5} {'xbf16':>6} {'xfp8':>6}"
    )
    rows = []
    for shape in arguments.shapes or default_shapes():
        variants = [
            *make_variants(shape, arguments.variants, arguments.epilogue, arguments.configs, "cuda")
        ]
        measure(shape, variants, arguments.regimes, arguments.rounds)
        rows += rows_of(variants, shape, arguments.epilogue, ceilings)
        print_rows(rows[-sum(len(variant.samples) for variant in variants) :])
        del variants
        torch.cuda.empty_cache()
        if arguments.json:  # after every shape: a run cut short keeps what it has
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.plot:
        plot(rows, arguments.plot)


if __name__ == "__main__":
    main()
