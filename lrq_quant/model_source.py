"""A transformer to time: a published shape with random weights, or that of a local folder."""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .model_inputs import model_inputs
from .model_shapes import make_model, model_config, names_with_inputs
from .pipeline_io import TRANSFORMER, is_quantized, load_transformer


@dataclass(frozen=True)
class ModelSource:
    """model: a name of model_shapes, or a folder of a pipeline or transformer, quantized or not.
    Raises ValueError for neither, FileNotFoundError for a folder without a config.json."""

    model: str

    def __post_init__(self) -> None:
        if not self.is_published and not Path(self.model).is_dir():
            raise ValueError(
                f"model must be a folder or one of {names_with_inputs()}, got {self.model!r}"
            )
        if not self.is_published and not (self.folder / "config.json").is_file():
            raise FileNotFoundError(f"no config.json in {self.folder}")

    @property
    def is_published(self) -> bool:
        return self.model in names_with_inputs()

    @property
    def folder(self) -> Path:
        """Of the transformer."""
        folder = Path(self.model)
        return folder / TRANSFORMER if (folder / TRANSFORMER).is_dir() else folder

    @property
    def label(self) -> str:
        """A name for files that are made of it, other for other folders."""
        if self.is_published:
            return self.model
        path = str(Path(self.model).resolve())
        return f"{Path(path).name}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"

    @cached_property
    def class_and_config(self) -> tuple[str, dict[str, Any]]:
        """Name of the model's class and all of its arguments."""
        import diffusers

        if self.is_published:
            model_class, config = model_config(self.model)
            return model_class.__name__, config
        held: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        class_name = str(held.get("_class_name"))
        # What the file does not say has its default.
        parameters = inspect.signature(getattr(diffusers, class_name, object)).parameters.values()
        return class_name, {**{p.name: p.default for p in parameters}, **held}

    def inputs(self, **options: Any) -> dict[str, Any]:
        """model_inputs of it."""
        return model_inputs(*self.class_and_config, **options)

    @property
    def held_scheme(self) -> str | None:
        """Of a folder that is quantized, None for dense weights."""
        if self.is_published or not is_quantized(self.folder):
            return None
        held: dict[str, Any] = json.loads((self.folder / "config.json").read_text())
        return str(held["quantization_config"]["scheme"])

    def dense(self, device: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
        """Raises ValueError where the folder holds quantized weights."""
        if self.is_published:
            return make_model(self.model, device, dtype)
        if (held := self.held_scheme) is not None:
            raise ValueError(f"{self.folder} must be dense, it is quantized to {held}")
        model = load_transformer(self.folder, device=device, dtype=dtype, fuse=False)
        return model.eval().requires_grad_(False)

    def quantized(self, device: str) -> nn.Module:
        """What a quantized folder holds."""
        return load_transformer(self.folder, device=device).eval().requires_grad_(False)
