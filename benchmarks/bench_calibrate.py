"""Calibration of a transformer at its published shape: time by phase and memory.

    python -m benchmarks.bench_calibrate --model flux-dev --scheme w4a8 --work work --json rows.json

Weights, prompts and noise are random; a prompt is drawn by Euler steps of the transformer alone.
What is finished is kept in --work: run again after a kill, or a time limit, it goes on; a row
counts its own run and says whether that began anew. Phases, in seconds:

    calibration     statistics of all inputs over the prompts
    second moments  the prompts again for the gram matrices, as many inputs at once as --gram-gb
    quantization    rotations, codebooks, rounding

gpu_gb: most that was allocated, the bf16 model included; host_gb: most that was resident.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bench_load import GB, resident_gb
from benchmarks.bench_model import machine
from benchmarks.rows import Row, write_json
from lrq_quant import QuantRecipe, quantize_model
from lrq_quant.model_inputs import model_inputs
from lrq_quant.model_shapes import make_model, names_with_inputs
from lrq_quant.recipe import CalibrationOptions

# What the classes call them.
LATENTS, TIMES = ("hidden_states", "x"), ("timestep", "timesteps", "t")


class Phases:
    """Progress of quantize_model: the time between two reports belongs to the later one's phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._last = self._shown = time.perf_counter()

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.perf_counter()
        self.seconds[what] += now - self._last
        self._last = now
        if now - self._shown > 10:
            self._shown = now
            print(f"{what} {done / total:.1%}, {self.seconds[what]:.0f} s of it", flush=True)


def draw(model: nn.Module, prompts: list[str], size: int, steps: int) -> Tensor:
    """Latents of `prompts`, which are numbers: one draws the conditioning and noise of them all."""
    parameter = next(model.parameters())
    config: Any = model.config
    inputs = model_inputs(
        type(model).__name__,
        config,
        size=size,
        batch=len(prompts),
        device=parameter.device,
        dtype=parameter.dtype,
        seed=int(prompts[0]),
    )
    noise, moment = (next(key for key in keys if key in inputs) for keys in (LATENTS, TIMES))
    middle = inputs[moment]
    for step in range(steps):
        inputs[moment] = 2 * middle * (1 - step / steps)
        output = model(**inputs, return_dict=False)[0]
        if isinstance(output, Tensor):
            inputs[noise] = less(inputs[noise], output, steps)
        else:  # Z-Image: a list of pictures
            pairs = zip(inputs[noise], output, strict=True)
            inputs[noise] = [less(one, change, steps) for one, change in pairs]
    latents = inputs[noise]
    return latents if isinstance(latents, Tensor) else torch.stack(latents)


def less(latents: Tensor, output: Tensor, steps: int) -> Tensor:
    """A step. Some models give more channels than they read (PixArt: and variances), some read more
    (of a picture to fill or to start from): the first ones are the latents."""
    common = tuple(slice(min(pair)) for pair in zip(latents.shape, output.shape, strict=True))
    changed = latents.clone()
    changed[common] -= output[common] / steps
    return changed


def measure(arguments: argparse.Namespace) -> Row:
    """One run, from what the work folder holds to the end."""
    on_gpu = arguments.device.startswith("cuda")
    work: Path | None = arguments.work
    resumed = work is not None and work.is_dir() and any(work.iterdir())
    started = time.perf_counter()
    model = make_model(arguments.model, arguments.device)
    made = time.perf_counter() - started
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(arguments.device)
    options = CalibrationOptions(
        batch_size=arguments.batch,
        gram_bytes=int(arguments.gram_gb * GB),
        run_key=f"{arguments.size} pixels, {arguments.steps} steps",
    )
    recipe = replace(QuantRecipe.from_name(arguments.scheme), calibration=options)
    phases = Phases()
    started = time.perf_counter()
    result = quantize_model(
        model,
        recipe,
        run=lambda prompts: draw(model, prompts, arguments.size, arguments.steps),
        prompts=[str(i) for i in range(arguments.prompts)],
        work_folder=work,
        progress=phases,
    )
    if on_gpu:
        torch.cuda.synchronize(arguments.device)
    return {
        "model": arguments.model,
        "scheme": arguments.scheme,
        "prompts": arguments.prompts,
        "steps": arguments.steps,
        "size": arguments.size,
        "resumed": resumed,
        "make_s": made,
        "seconds": time.perf_counter() - started,
        **phases.seconds,
        "gpu_gb": torch.cuda.max_memory_allocated(arguments.device) / GB if on_gpu else 0.0,
        "host_gb": resident_gb(),
        "weight_bits": result.report.weight_bits,
        **machine(arguments.device),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=names_with_inputs(), default="flux-dev")
    parser.add_argument("--scheme", default="w4a8")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--size", type=int, default=1024, help="of the pictures, in pixels")
    parser.add_argument("--batch", type=int, default=1, help="prompts to a forward")
    parser.add_argument("--gram-gb", type=float, default=CalibrationOptions.gram_bytes / GB)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, help="folder of what is finished, to go on from")
    parser.add_argument("--json", type=Path, help="write the row to this file")
    arguments = parser.parse_args(argv)
    with torch.no_grad():
        row = measure(arguments)
    for key, value in row.items():
        print(f"{key:20}{value:.4g}" if isinstance(value, float) else f"{key:20}{value}")
    if arguments.json:
        write_json([row], arguments.json)


if __name__ == "__main__":
    main()
