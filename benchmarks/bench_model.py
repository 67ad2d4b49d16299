"""One transformer at its published shape: memory by kind and time per forward.

    python -m benchmarks.bench_model --model flux-dev --variants bf16-eager w4a8-eager

Weights are random, in bf16. A quantized variant is quantized from weights alone, saved, loaded
from the file and run; its memory is what all parameters and buffers take on the GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.dit_shapes import MODEL_CONFIGS

WARMUP, REPEATS = 3, 10


def make_model(name: str, device: str) -> torch.nn.Module:
    """The bf16 transformer with random weights of a trained model's scale, on `device`."""
    import diffusers

    class_name, config = MODEL_CONFIGS[name]
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = getattr(diffusers, class_name)(**config)
    finally:
        torch.set_default_dtype(default)
    return model.eval().requires_grad_(False)


def make_inputs(name: str, device: str, size: int = 1024, batch: int = 1) -> dict[str, Any]:
    """Arguments of one forward at `size` x `size` pixels."""
    latent = size // 8
    options: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    timestep = torch.full((batch,), 0.5, **options)
    if name == "flux-dev":
        tokens = (latent // 2) ** 2
        return {
            "hidden_states": torch.randn(batch, tokens, 64, **options),
            "encoder_hidden_states": torch.randn(batch, 512, 4096, **options),
            "pooled_projections": torch.randn(batch, 768, **options),
            "timestep": timestep,
            "guidance": torch.full((batch,), 3.5, **options),
            "img_ids": torch.randint(0, latent // 2, (tokens, 3), device=device).to(torch.bfloat16),
            "txt_ids": torch.zeros(512, 3, **options),
        }
    return {
        "hidden_states": torch.randn(batch, 4, latent, latent, **options),
        "encoder_hidden_states": torch.randn(batch, 300, 4096, **options),
        "encoder_attention_mask": torch.ones(batch, 300, **options),
        "timestep": timestep * 1000,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def quantized(name: str, scheme: str, device: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """Quantize random weights of `name`, save, and load the file into a fresh model."""
    from lrq_quant import QuantRecipe, quantize_model
    from lrq_quant.pipeline_io import load_transformer, save_transformer

    model = make_model(name, device)
    facts: dict[str, Any] = {"bf16_gb": tensor_bytes(model) / 1e9}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "transformer"
        start = time.perf_counter()
        recipe = QuantRecipe.from_name(scheme)
        result = quantize_model(model, recipe)
        facts["quantize_s"] = time.perf_counter() - start
        print(f"{name} {scheme}: quantized in {facts['quantize_s']:.0f} s", flush=True)
        save_transformer(model, result, out)
        facts["weight_bits"] = result.report.weight_bits
        facts["coverage"] = result.report.coverage
        del model, result
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{name} {scheme}: saved in {time.perf_counter() - start:.0f} s in all", flush=True)
        facts["file_gb"] = sum(f.stat().st_size for f in out.iterdir()) / 1e9
        start = time.perf_counter()
        loaded = load_transformer(out, device=device)
        facts["load_s"] = time.perf_counter() - start
    return loaded, facts


def time_forward(model: torch.nn.Module, inputs: dict[str, Any]) -> float:
    """Median milliseconds of one forward."""
    times = []
    with torch.inference_mode():
        for step in range(WARMUP + REPEATS):
            begin, end = torch.cuda.Event(True), torch.cuda.Event(True)
            begin.record()
            model(**inputs, return_dict=False)
            end.record()
            end.synchronize()
            if step >= WARMUP:
                times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def measure(name: str, variant: str, inputs: dict[str, Any], device: str) -> dict[str, Any]:
    scheme, _, mode = variant.partition("-")
    if mode != "eager":
        raise ValueError(f"bench_model: variant must be SCHEME-eager, got {variant!r}")
    facts: dict[str, Any] = {}
    if scheme == "bf16":
        model = make_model(name, device)
    else:
        model, facts = quantized(name, scheme, device)
    weights = tensor_bytes(model) / 1e9
    torch.cuda.reset_peak_memory_stats()
    with torch.inference_mode():
        output = model(**inputs, return_dict=False)[0]
    if not bool(torch.isfinite(output).all()):
        raise RuntimeError(f"bench_model: {variant} gave NaN or inf")
    row = {"model": name, "variant": variant, "ms": time_forward(model, inputs)}
    row |= {"weights_gb": weights, "peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    return row | facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODEL_CONFIGS), default="flux-dev")
    parser.add_argument("--variants", nargs="+", default=["bf16-eager", "w4a8-eager"])
    parser.add_argument("--size", type=int, default=1024, help="pixels along a side")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    arguments = parser.parse_args()
    inputs = make_inputs(arguments.model, "cuda", arguments.size, arguments.batch)
    rows = []
    for variant in arguments.variants:
        rows.append(measure(arguments.model, variant, inputs, "cuda"))
        print(json.dumps(rows[-1]), flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
