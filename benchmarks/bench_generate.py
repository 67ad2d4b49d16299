"""Whole pictures: a diffusers pipeline around one transformer at its published shape.

    python -m benchmarks.bench_generate --model flux-dev --steps 28 --json generate.json
    python -m benchmarks.bench_generate --model pixart-sigma --variants bf16-compiled w4a8-graph

Everything that a call of the pipeline does is counted, from the embedding of the prompt (random:
text encoders are not run) to the decoded picture. Weights are random; variants are those of
benchmarks.bench_model. A row: image_s, the median of the pictures after the first; transformer_s
and vae_s, what the GPU spent between the begin and the end of their calls; other_s, the rest (the
scheduler, guidance, waiting for the host); step_ms, of a call of the transformer; speedup_image and
speedup_step over the first variant of the run, which should be within 5 % of each other; peak_gb.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bench_model import Clock, machine
from benchmarks.model_variants import Models, Variant, cold_compiles, free, prepare
from benchmarks.rows import Row, cells, error_text, titles, write_json
from lrq_quant.model_inputs import FLUX_TEXT_TOKENS, PIXART_TEXT_TOKENS
from lrq_quant.run_modes import remove_compiled_and_graph

DEFAULT_VARIANTS = ("bf16-compiled", "w4a8-graph")

# Of the published VAEs, beside their shape.
_VAE: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": {
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    },
    "PixArtTransformer2DModel": {"scaling_factor": 0.13025},
}


@dataclass(frozen=True)
class Request:
    """What is asked of a pipeline: pictures of size x size pixels in so many steps."""

    size: int
    steps: int
    batch: int


def make_vae(model: nn.Module, device: str) -> nn.Module:
    """The AutoencoderKL of the published shape for the latents of `model`, with random weights in
    bf16; for a tiny model one of few channels."""
    from diffusers import AutoencoderKL

    config: Any = model.config
    tiny = config.num_layers < 5
    packed = 4 if type(model).__name__.startswith("Flux") else 1  # 2 x 2 latents are a token
    vae = AutoencoderKL(
        block_out_channels=(32,) * 4 if tiny else (128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1 if tiny else 2,
        latent_channels=config.in_channels // packed,
        **_VAE[type(model).__name__],
    )
    return vae.to(device, torch.bfloat16).eval().requires_grad_(False)


def make_call(model: nn.Module, request: Request, device: str) -> tuple[Any, Callable[[], Any]]:
    """(pipeline, a call of it). Raises ValueError for a class that has no pipeline here."""
    class_name = type(model).__name__
    if class_name not in _VAE:
        raise ValueError(f"no pipeline for {class_name}, only for {sorted(_VAE)}")
    vae = make_vae(model, device)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    common = {
        "num_inference_steps": request.steps,
        "height": request.size,
        "width": request.size,
        "output_type": "pt",
    }
    make = _flux_call if class_name.startswith("Flux") else _pixart_call
    pipeline, arguments = make(model, vae, request.batch, randn)
    pipeline.set_progress_bar_config(disable=True)

    def call() -> Any:
        noise = torch.Generator().manual_seed(1)
        return pipeline(**arguments, **common, generator=noise).images

    return pipeline, call


def _flux_call(
    model: Any, vae: nn.Module, batch: int, randn: Callable[..., Tensor]
) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15
    )
    pipeline = FluxPipeline(scheduler, vae, None, None, None, None, model)
    return pipeline, {
        "prompt_embeds": randn(batch, FLUX_TEXT_TOKENS, model.config.joint_attention_dim),
        "pooled_prompt_embeds": randn(batch, model.config.pooled_projection_dim),
        "guidance_scale": 3.5,
    }


def _pixart_call(
    model: Any, vae: nn.Module, batch: int, randn: Callable[..., Tensor]
) -> tuple[Any, dict[str, Any]]:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline

    pipeline = PixArtSigmaPipeline(None, None, vae, model, DPMSolverMultistepScheduler())
    shape = (batch, PIXART_TEXT_TOKENS, model.config.caption_channels)
    mask = torch.ones(shape[:2], device=vae.device)
    return pipeline, {
        "prompt": None,
        "negative_prompt": None,
        "prompt_embeds": randn(*shape),
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": randn(*shape),
        "negative_prompt_attention_mask": mask,
        "use_resolution_binning": False,
        "guidance_scale": 4.5,
    }


# ---- measuring ----------------------------------------------------------------------------------


class Calls:
    """Marks before and after every call of a module, for as long as the context lasts."""

    def __init__(self, module: nn.Module, on_gpu: bool) -> None:
        self.module, self.clock = module, Clock(on_gpu)

    def __enter__(self) -> Calls:
        def mark(*_: Any) -> None:
            self.clock.mark()

        self._hooks = [
            self.module.register_forward_pre_hook(mark),
            self.module.register_forward_hook(mark),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()

    def milliseconds(self) -> list[float]:
        """Of each call."""
        return self.clock.intervals_ms()[::2]


def time_pictures(call: Callable[[], Any], pipeline: Any, pictures: int, on_gpu: bool) -> dict:
    """The figures of a row, but for those of other rows; the pipeline has been called before."""
    seconds: list[float] = []
    with Calls(pipeline.transformer, on_gpu) as steps, Calls(pipeline.vae.decoder, on_gpu) as vae:
        for _ in range(pictures):
            start = time.perf_counter()
            images = call()
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    if not bool(torch.isfinite(images).all()):
        raise RuntimeError("the picture holds NaN or inf")
    in_steps = steps.milliseconds()
    row = {
        "image_s": statistics.median(seconds),
        "images_s": seconds,
        "step_ms": statistics.median(in_steps),
        "transformer_s": sum(in_steps) / pictures / 1e3,
        "vae_s": sum(vae.milliseconds()) / pictures / 1e3,
    }
    row["other_s"] = statistics.fmean(seconds) - row["transformer_s"] - row["vae_s"]
    return row


@torch.no_grad()
def measure(
    models: Models, variant: Variant, request: Request, pictures: int, device: str
) -> dict[str, Any]:
    """What a row says of one variant. Raises what the packages that it runs raise."""
    on_gpu = device.startswith("cuda")
    if variant.mode == "graph" and not on_gpu:
        raise RuntimeError("a CUDA graph needs a CUDA device")
    model, row = models.make(variant)
    try:
        row |= prepare(model, variant)
        pipeline, call = make_call(model, request, device)
        free()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with cold_compiles() if variant.mode == "compiled" else contextlib.nullcontext():
            call()
        row["first_image_s"] = time.perf_counter() - start
        row |= time_pictures(call, pipeline, pictures, on_gpu)
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None
        return row
    finally:
        if variant.base == "bf16":
            remove_compiled_and_graph(model)


def with_speedups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Over the first row that has a time."""
    first = next((row for row in rows if "error" not in row), None)
    for row in rows:
        if first is not None and "error" not in row:
            row["speedup_image"] = first["image_s"] / row["image_s"]
            row["speedup_step"] = first["step_ms"] / row["step_ms"]
    return rows


COLUMNS = (
    ("image_s", "image s", 3),
    ("transformer_s", "transf. s", 3),
    ("vae_s", "vae s", 3),
    ("other_s", "other s", 3),
    ("step_ms", "step ms", 2),
    ("speedup_image", "x image", 3),
    ("speedup_step", "x step", 3),
    ("peak_gb", "peak GB", 2),
)


def table(rows: list[Row]) -> str:
    lines = [f"{'variant':23}{titles(COLUMNS, 10)}"]
    return "\n".join([*lines, *(f"{row['variant']:23}{cells(row, COLUMNS, 10)}" for row in rows)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="flux-dev", help="a name of lrq_quant.model_shapes")
    parser.add_argument("--size", type=int, default=1024, help="pixels along a side")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pictures", type=int, default=3, help="timed, after one that is not")
    parser.add_argument("--variants", nargs="+", default=[*DEFAULT_VARIANTS])
    parser.add_argument("--cache", type=Path, help="folder to keep quantized checkpoints in")
    parser.add_argument("--device", default="cuda", help="cpu: to try it with a tiny model")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    return parser


def main(argv: list[str] | None = None) -> int:
    """The exit code: 1 where a variant failed."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        variants = [Variant.parse(name) for name in arguments.variants]
        if arguments.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError("needs a CUDA GPU")
    except ValueError as error:
        parser.error(str(error))
    request = Request(arguments.size, arguments.steps, arguments.batch)
    facts = {"model": arguments.model, "size": request.size, "steps": request.steps}
    facts |= {"batch": request.batch, **machine(arguments.device)}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.cache or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        models = Models(arguments.model, arguments.device, folder)
        for variant in variants:
            row = {**facts, "variant": variant.name}
            try:
                row |= measure(models, variant, request, arguments.pictures, arguments.device)
            except Exception as error:  # the other variants still count
                row["error"] = error_text(error)
            free()
            rows = with_speedups([*rows, row])
            if arguments.json:
                write_json(rows, arguments.json)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(table(rows))
    return int(any("error" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
