"""What `lrq profile` runs: a published shape or a folder, quantized as asked, in a mode."""

from __future__ import annotations

import datetime
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .machine_limits import Limits, measure_limits
from .model_source import ModelSource
from .op_work import Work, count_work
from .pipeline import quantize_model
from .pipeline_io import TRANSFORMER, load_transformer, save_transformer
from .profiling import Profile, profile_forward
from .recipe import QuantRecipe
from .run_modes import MODES, apply_mode

DENSE = "bf16"


@dataclass(frozen=True)
class ProfileOptions:
    """model: a name of model_shapes or a folder of a pipeline or transformer; scheme: as "w4a8",
    "bf16" for none; by default w4a8 for a name and what the folder holds for a folder. size in
    pixels along a side; steps: forwards that are recorded; limits: None measures them."""

    model: str
    size: int = 1024
    batch: int = 1
    steps: int = 5
    scheme: str | None = None
    mode: str = "eager"
    device: str = "cuda"
    trace: Path | None = None
    limits: Limits | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"mode must be one of {MODES}, got {self.mode!r}")
        if self.mode == "graph" and not self.device.startswith("cuda"):
            raise ValueError(f"mode graph needs a CUDA device, got {self.device}")
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")
        if self.scheme is not None and self.scheme != DENSE:
            QuantRecipe.from_name(self.scheme)  # raises for what is no scheme


def profile_model(options: ProfileOptions) -> Profile:
    """Load or make, quantize from the weights alone where asked, run and record.

    Raises ValueError for an unknown model, class, size or scheme and a quantized folder with
    another scheme asked; FileNotFoundError for a folder without a model; what loading raises.
    """
    source = ModelSource(options.model)
    shape = {"size": options.size, "batch": options.batch}
    # On no device: it raises for what does not fit before a model is made or loaded.
    source.inputs(**shape, device="meta")
    model, scheme = _load(source, options)
    inputs = source.inputs(**shape, device=options.device, dtype=model.dtype)
    work = _work(model, inputs, options.mode, is_dense=scheme == DENSE)
    done = apply_mode(model, options.mode)
    on_gpu = options.device.startswith("cuda")
    limits = options.limits or (measure_limits() if on_gpu else Limits())
    if on_gpu:
        torch.cuda.empty_cache()
    facts = {
        "model": Path(options.model).name,
        "scheme": scheme,
        "mode": options.mode,
        **done,
        "size": options.size,
        "batch": options.batch,
        "machine": torch.cuda.get_device_name() if on_gpu else "CPU",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    return profile_forward(
        model,
        inputs,
        steps=options.steps,
        work=work,
        limits=limits,
        trace=options.trace,
        facts=facts,
    )


def _work(
    model: nn.Module, inputs: dict[str, Any], mode: str, *, is_dense: bool
) -> dict[str, Work]:
    """Counted where Python calls the ops, which it does not in a compiled or captured model."""
    if mode in ("eager", "graph") and not is_dense:
        apply_mode(model, "eager")
    work = count_work(model, inputs)
    if mode != "compiled":
        return work
    # The products are the same as in the eager model; what is read and written with them is not.
    return {kind: replace(w, bytes=0) for kind, w in work.items() if w.operations}


def _load(source: ModelSource, options: ProfileOptions) -> tuple[nn.Module, str]:
    """The model on its device, ready to run, and its scheme."""
    held = source.held_scheme
    if held is None:
        scheme = options.scheme or ("w4a8" if source.is_published else DENSE)
        return _quantized(source.dense(options.device), scheme, options.device), scheme
    if options.scheme not in (None, held):
        raise ValueError(
            f"{source.folder} is quantized to {held}; --scheme {options.scheme} is another"
        )
    return source.quantized(options.device), held


def _quantized(model: nn.Module, scheme: str, device: str) -> nn.Module:
    """Through a checkpoint, as a user has it: what is timed is what a loaded model runs."""
    if scheme == DENSE:
        return model
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / TRANSFORMER
        save_transformer(model, quantize_model(model, QuantRecipe.from_name(scheme)), folder)
        del model
        return load_transformer(folder, device=device).eval().requires_grad_(False)
