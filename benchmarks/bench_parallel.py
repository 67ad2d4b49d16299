"""One transformer on several GPUs: diffusers' context parallelism, which splits the tokens.

    torchrun --nproc-per-node 2 -m benchmarks.bench_parallel --model flux-dev --json two.json
    torchrun --nproc-per-node 2 -m benchmarks.bench_parallel --ways ulysses ring \
        --variants bf16-eager w4a8-eager w4a8-graph

Every process times the whole model on its own GPU first, then its part of it together with the
others. A row: way (ulysses: heads are exchanged around attention; ring: keys and values go round),
gpus, one_ms and ms (medians of forwards on one GPU and on all), speedup, output_sqnr_db of the
common output against that of one GPU, weights_gb and peak_gb of one of the GPUs. Weights are
random; variants are those of benchmarks.bench_model.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn

from benchmarks.bench_model import Clock, machine
from benchmarks.model_variants import Models, Variant, free, prepare, weight_bytes
from benchmarks.rows import Row, cells, error_text, titles, write_json
from lrq_kernels import ungraph
from lrq_kernels.testing import sqnr_db

WAYS = ("ulysses", "ring")
DEFAULT_VARIANTS = ("bf16-eager", "w4a8-eager", "w4a8-graph")
# The same in every process, which wait for each other in each forward.
WARM_FORWARDS, TIMED_FORWARDS = 4, 12


def time_forwards(model: nn.Module, inputs: dict[str, Any], on_gpu: bool) -> tuple[float, Tensor]:
    """Median ms and the last output."""
    for _ in range(WARM_FORWARDS):
        output = model(**inputs, return_dict=False)[0]
    clock = Clock(on_gpu)
    clock.mark()
    for _ in range(TIMED_FORWARDS):
        output = model(**inputs, return_dict=False)[0]
        clock.mark()
    return statistics.median(clock.intervals_ms()), output


def _split(model: Any, way: str, attention: str | None) -> None:
    from diffusers import ContextParallelConfig

    if attention is not None:
        model.set_attention_backend(attention)
    degree = {f"{way}_degree": distributed.get_world_size()}
    model.enable_parallelism(config=ContextParallelConfig(**degree))


def say(what: str) -> None:
    """Progress, by the first process: where it would stand if the others never came."""
    if distributed.get_rank() == 0:
        print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


@torch.no_grad()
def measure(
    models: Models, variant: Variant, way: str, inputs: dict[str, Any], attention: str | None
) -> dict[str, Any]:
    """What a row says of one variant. Raises what the packages that it runs raise."""
    on_gpu = models.device.startswith("cuda")
    model, row = models.make(variant)
    # A graph is captured again with the exchange between GPUs in it.
    row |= prepare(model, variant)
    say(f"{variant.name}: one GPU")
    row["one_ms"], alone = time_forwards(model, inputs, on_gpu)
    say(f"{variant.name}: {row['one_ms']:.2f} ms; {way}")
    if variant.mode == "graph":
        ungraph(model)
    _split(model, way, attention)
    if variant.mode == "graph":
        prepare(model, variant)
    row["weights_gb"] = weight_bytes(model) / 1e9
    free()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    distributed.barrier()
    row["ms"], together = time_forwards(model, inputs, on_gpu)
    row["speedup"] = row["one_ms"] / row["ms"]
    db = sqnr_db(alone, together)
    row["output_sqnr_db"] = None if db == float("inf") else db
    row["peak_gb"] = _peak_bytes() / 1e9 if on_gpu else None
    ungraph(model)  # an exchange in a graph keeps its process group from ending
    models.release()  # a model that was split stays so
    return row


def _peak_bytes() -> int:
    """With what torch allocates for the exchange beside its caching allocator."""
    from lrq_kernels import peer_memory  # needs Triton

    return torch.cuda.max_memory_allocated() + peer_memory.allocated_bytes()


def make_checkpoints(models: Models, variants: list[Variant]) -> None:
    """By the first process; the others find them."""
    if distributed.get_rank() == 0:
        for variant in variants:
            if variant.is_lrq:
                say(f"{variant.name}: checkpoint")
                models.make(variant)
                models.release()
    distributed.barrier()


COLUMNS = (
    ("one_ms", "one GPU ms", 2),
    ("ms", "ms", 2),
    ("speedup", "speedup", 3),
    ("output_sqnr_db", "dB", 1),
    ("weights_gb", "weights", 2),
    ("peak_gb", "peak GB", 2),
)


TITLE = f"{'variant':20}{'way':9}{'GPUs':>5}{titles(COLUMNS, 12)}"


def line(row: Row) -> str:
    return f"{row['variant']:20}{row['way']:9}{row['gpus']:>5}{cells(row, COLUMNS, 12)}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="flux-dev", help="a published shape or a folder")
    parser.add_argument("--size", type=int, default=1024, help="pixels along a side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["ulysses"])
    parser.add_argument("--variants", nargs="+", default=[*DEFAULT_VARIANTS])
    parser.add_argument("--attention", help="a name for set_attention_backend; ring asks for one")
    parser.add_argument("--cache", type=Path, help="folder, seen by all, for checkpoints")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser


def run(arguments: argparse.Namespace, folder: Path, device: str) -> list[dict[str, Any]]:
    """The rows of this process."""
    variants = [Variant.parse(name) for name in arguments.variants]
    models = Models(arguments.model, device, folder)
    options = {"size": arguments.size, "batch": arguments.batch, "device": device}
    inputs = models.source.inputs(**options)
    facts = {"model": arguments.model, "size": arguments.size, "batch": arguments.batch}
    facts |= {"gpus": distributed.get_world_size(), **machine(device)}
    make_checkpoints(models, variants)
    shows = distributed.get_rank() == 0
    if shows:
        print(TITLE, flush=True)
    rows: list[dict[str, Any]] = []
    for way in arguments.ways:
        for variant in variants:
            row = {**facts, "variant": variant.name, "way": way}
            try:
                row |= measure(models, variant, way, inputs, arguments.attention)
            except (ValueError, NotImplementedError, ImportError) as error:
                # Raised alike by all processes. Any other error ends this one, and torchrun all.
                row["error"] = error_text(error)
                models.release()
            free()
            rows.append(row)
            if shows:
                print(line(row), flush=True)
    return rows


def main(argv: list[str] | None = None) -> int:
    """The exit code: 1 where a variant failed."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if "RANK" not in os.environ:
        parser.error("run it by torchrun, one process for each GPU")
    device = "cpu"
    if arguments.device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    else:
        torch.accelerator.device_count = lambda: 1  # diffusers divides by the number of GPUs
    distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    try:
        with tempfile.TemporaryDirectory() as temporary:
            shared = [temporary]
            distributed.broadcast_object_list(shared)
            folder = arguments.cache or Path(shared[0])
            folder.mkdir(parents=True, exist_ok=True)
            rows = run(arguments, folder, device)
            distributed.barrier()  # before the first process removes its folder
        if distributed.get_rank() == 0 and arguments.json:
            write_json(rows, arguments.json)
    finally:
        distributed.destroy_process_group()
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
