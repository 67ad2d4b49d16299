"""One transformer at its published shape in many ways: time of a forward, and memory.

    python -m benchmarks.bench_model --model flux-dev --json flux.json --plot flux.png
    python -m benchmarks.bench_model --model pixart-sigma --batch 2 --variants bf16-eager w4a8-graph

benchmarks.model_variants lists the variants. Weights are random, in bf16, or those of a folder;
ours are quantized from the weights alone, saved, loaded from the file and run, or as a quantized
folder has them.

Each variant is timed on its own, after the same second of forwards: ms is the median of forwards
that follow each other without a gap, between CUDA events; spread the distance of their quartiles
over it. weights_gb counts all parameters and buffers of the transformer, each storage once. peak_gb
is the most that was allocated while forwards ran, for a graph while it was captured. compile_s is
the first forward of a compiled or captured model, with the compilation or capture in it.

--output-error compares the output of ours, and of bf16, to that of the same model as loaded: in
bf16 roundings alone make differences that are larger than what fusion changes, so that the row of
bf16-compiled is the measure for the others. Below 45 dB the line says so. --dtype float16 rounds
eight times finer: what fusion changes shows there; the variants named bf16 are then fp16 too.

--breakdown records some more forwards of each variant. It adds the ms by family of kernels and of
gaps between them to its row and to the picture, and to the row the slowest kernels and what GEMMs
and attention reach of the limits of the GPU, which it measures first; a table of variants and
families ends the output. --trace FOLDER does that too, and writes a Chrome trace of one forward to
VARIANT.json. `lrq profile` has more of lrq's own kernels.

Rows are written after each variant, so that a run cut short keeps what it has; a variant that fails
is a row with its error, and the exit code is 1 but for peers that are not installed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.model_breakdown import broken_down, product_operations, table
from benchmarks.model_plot import plot
from benchmarks.model_variants import (
    DEFAULT_VARIANTS,
    Models,
    Variant,
    cold_compiles,
    free,
    fusion_counts,
    peer_names,
    prepare,
    weight_bytes,
)
from benchmarks.peers import PeerMissing
from benchmarks.rows import error_text, write_json
from lrq_kernels.testing import sqnr_db
from lrq_quant.machine_limits import Limits, measure_limits
from lrq_quant.model_shapes import names_with_inputs
from lrq_quant.model_source import ModelSource
from lrq_quant.run_modes import COMPILE_KINDS, remove_compiled_and_graph

WARMUP_S, TIMED_S = 1.0, 1.5
MIN_FORWARDS, MAX_FORWARDS = 10, 200
EXPECTED_SQNR_DB = 45.0
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Run:
    """What the variants of one call share. loaded: outputs of each base as made, on the CPU;
    operations: of the bf16 model, as product_operations counts them."""

    models: Models
    inputs: dict[str, Any]
    device: str
    compile: str | None = None
    fusion: bool = True
    output_error: bool = False
    breakdown: bool = False
    traces: Path | None = None
    limits: Limits = Limits()
    loaded: dict[str, Tensor] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")


# ---- timing -------------------------------------------------------------------------------------


class Clock:
    """Marks between forwards: CUDA events, or the clock of the host where there is no GPU."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.marks: list[Any] = []

    def mark(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def intervals_ms(self) -> list[float]:
        pairs = zip(self.marks[:-1], self.marks[1:], strict=True)
        if not self.on_gpu:
            return [1e3 * (end - begin) for begin, end in pairs]
        torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in pairs]


def forward(run: Run, model: nn.Module) -> Tensor:
    output = model(**run.inputs, return_dict=False)[0]
    return output if isinstance(output, Tensor) else torch.stack(list(output))  # Z-Image: a list


def first_forward(run: Run, model: nn.Module) -> tuple[Tensor, float]:
    """Its output and seconds. Raises RuntimeError for NaN and inf."""
    start = time.perf_counter()
    output = forward(run, model)
    if not bool(torch.isfinite(output).all()):  # waits for the GPU
        raise RuntimeError("the output holds NaN or inf")
    return output, time.perf_counter() - start


def time_forwards(run: Run, model: nn.Module) -> dict[str, float]:
    """ms, spread and forwards of a model that has run before."""
    start, warmed = time.perf_counter(), 0
    while warmed < 2 or time.perf_counter() - start < WARMUP_S:
        forward(run, model)
        warmed += 1
        if run.on_gpu:
            torch.cuda.synchronize()
    each = (time.perf_counter() - start) / warmed
    count = min(MAX_FORWARDS, max(MIN_FORWARDS, round(TIMED_S / each)))
    clock = Clock(run.on_gpu)
    clock.mark()
    for _ in range(count):
        forward(run, model)
        clock.mark()
    low, middle, high = statistics.quantiles(clock.intervals_ms(), n=4)
    return {"ms": middle, "spread": (high - low) / middle, "forwards": count}


def reset_peak(run: Run) -> None:
    free()
    if run.on_gpu:
        torch.cuda.reset_peak_memory_stats()


# ---- rows ---------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, str]:
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else "none, CPU"
    return {"gpu": gpu, "torch": torch.__version__, "date": datetime.date.today().isoformat()}


@torch.no_grad()
def measure(run: Run, variant: Variant) -> dict[str, Any]:
    """What a row says of one variant. Raises what the packages that it runs raise."""
    if variant.mode == "graph" and not run.on_gpu:
        raise RuntimeError("a CUDA graph needs a CUDA device")
    if run.breakdown and not variant.is_lrq and not run.operations:
        run.operations = product_operations(run.models.dense(), run.inputs)
    model, row = run.models.make(variant)
    operations = run.operations
    if run.breakdown and variant.is_lrq:  # a low-rank branch has products of its own
        operations = product_operations(model, run.inputs)
    try:
        compare = run.output_error and (variant.is_lrq or variant.base == "bf16")
        if compare and variant.base not in run.loaded:
            run.loaded[variant.base] = forward(run, model).cpu()
        row |= prepare(model, variant, compile=run.compile, fusion=run.fusion)
        row["weights_gb"] = weight_bytes(model) / 1e9
        reset_peak(run)
        with cold_compiles() if variant.mode == "compiled" else contextlib.nullcontext():
            output, seconds = first_forward(run, model)
        if variant.mode in ("compiled", "graph"):
            row["compile_s"] = seconds
        if variant.mode == "compiled" and variant.is_lrq:
            row["fusion"] = fusion_counts()
        if compare:
            row |= output_errors(run.loaded[variant.base], output.cpu())
        del output
        if variant.mode != "graph":  # compiling and tuning allocate too; a replay does not
            reset_peak(run)
        row |= time_forwards(run, model)
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if run.on_gpu else None
        if run.breakdown:
            row |= try_breakdown(run, model, variant, operations)
        return row
    finally:
        if variant.base == "bf16":
            remove_compiled_and_graph(model)


def try_breakdown(
    run: Run, model: nn.Module, variant: Variant, operations: dict[str, int]
) -> dict[str, Any]:
    """broken_down; where that fails, the reason: what was timed before stands."""
    trace = None if run.traces is None else run.traces / f"{variant.name}.json"
    try:
        return broken_down(model, run.inputs, variant, operations, run.limits, trace)
    except RuntimeError as error:
        return {"breakdown_error": error_text(error)}


def output_errors(loaded: Tensor, output: Tensor) -> dict[str, float | None]:
    """Relative error and SQNR in dB; None where the outputs are equal."""
    db = sqnr_db(loaded, output)
    equal = db == float("inf")
    return {"output_error": 10 ** (-db / 20), "output_sqnr_db": None if equal else db}


def rows_of(run: Run, variants: list[Variant], facts: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each variant; that of a variant that failed says why."""
    for variant in variants:
        row = {**facts, "variant": variant.name, "lrq": variant.is_lrq}
        try:
            row |= measure(run, variant)
        except PeerMissing as error:
            row |= {"error": error_text(error), "missing": True}
        except Exception as error:  # a package may fail in any way; the other variants still count
            row |= {"error": error_text(error), "traceback": traceback.format_exc()}
        free()
        yield row


COLUMNS = (  # key, title, width, digits
    ("weights_gb", "weights", 8, 2),
    ("peak_gb", "peak GB", 8, 2),
    ("compile_s", "comp s", 8, 1),
    ("quantize_s", "quant s", 8, 1),
    ("load_s", "load s", 7, 1),
    ("weight_bits", "bits", 7, 3),
)
HEADER = f"{'variant':23}{'ms':>9}{'iqr':>7}" + "".join(f"{t:>{w}}" for _, t, w, _ in COLUMNS)


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    if "error" in row:
        return f"{row['variant']:23} failed: {row['error']}"
    cells = []
    for key, _, width, digits in COLUMNS:
        value = row.get(key)
        cells.append(f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}")
    figures = f"{row['variant']:23}{row['ms']:9.2f}{100 * row['spread']:6.1f}%" + "".join(cells)
    return f"{figures}  {'; '.join(notes(row))}".rstrip()


def notes(row: dict[str, Any]) -> Iterator[str]:
    if "compile" in row:
        yield row["compile"]
    if "fused_blocks" in row:
        yield f"blocks fused: {row['fused_blocks']}"
    if "fusion" in row:
        yield " ".join(f"{name} {n}" for name, n in row["fusion"].items()) or "no fusion"
    if "output_error" in row:
        db = row["output_sqnr_db"]
        low = " (below 45)" if db is not None and db < EXPECTED_SQNR_DB else ""
        yield "output equal" if db is None else f"output {db:.1f} dB{low}"
    if "breakdown_error" in row:
        yield f"no breakdown, {row['breakdown_error']}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model",
        default="flux-dev",
        help=f"a folder of a pipeline or transformer, or one of {' '.join(names_with_inputs())}",
    )
    parser.add_argument("--size", type=int, default=1024, help="pixels along a side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the model")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[*DEFAULT_VARIANTS],
        help=f"of {' '.join(peer_names())} and SCHEME-eager, -loaded, -compiled, -graph",
    )
    parser.add_argument("--compile", choices=COMPILE_KINDS, help="what compiled compiles")
    parser.add_argument("--no-fusion", action="store_true", help="compile ours without its pass")
    parser.add_argument(
        "--output-error",
        action="store_true",
        help="compare outputs to those of the model as loaded",
    )
    parser.add_argument("--breakdown", action="store_true", help="ms by family of kernels too")
    parser.add_argument(
        "--trace",
        type=Path,
        metavar="FOLDER",
        help="breakdown, and a Chrome trace of each in FOLDER",
    )
    parser.add_argument("--cache", type=Path, help="folder to keep quantized checkpoints in")
    parser.add_argument("--device", default="cuda", help="cpu: to try it with a tiny model")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--plot", type=Path, help="draw bars of time and memory into this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The exit code: 1 where a variant failed."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    facts = {name: getattr(arguments, name) for name in ("model", "size", "batch", "dtype")}
    try:
        variants = [Variant.parse(name) for name in arguments.variants]
        if arguments.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("needs a CUDA GPU")
        inputs = ModelSource(arguments.model).inputs(
            size=arguments.size,
            batch=arguments.batch,
            device=arguments.device,
            dtype=DTYPES[arguments.dtype],
        )
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    facts |= machine(arguments.device)
    breakdown = arguments.breakdown or arguments.trace is not None
    limits = Limits()
    if breakdown and arguments.device.startswith("cuda"):
        limits = measure_limits()
        free()
    if breakdown:
        facts["limits"] = limits._asdict()
    if arguments.trace is not None:
        arguments.trace.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{key} {value}" for key, value in facts.items()), HEADER, sep="\n", flush=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        run = Run(
            Models(arguments.model, arguments.device, folder, DTYPES[arguments.dtype]),
            inputs,
            arguments.device,
            compile=arguments.compile,
            fusion=not arguments.no_fusion,
            output_error=arguments.output_error,
            breakdown=breakdown,
            traces=arguments.trace,
            limits=limits,
        )
        for row in rows_of(run, variants, facts):
            rows.append(row)
            print(line(row), flush=True)
            if arguments.json:
                write_json(rows, arguments.json)
    if breakdown:
        print(table(rows))
    if arguments.plot:
        plot(rows, arguments.plot)
    failed = ("breakdown_error" in row or ("error" in row and "missing" not in row) for row in rows)
    return int(any(failed))


if __name__ == "__main__":
    sys.exit(main())
