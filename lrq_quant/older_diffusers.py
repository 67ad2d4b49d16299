"""What diffusers 0.36 to 0.38 lack: hooks of quantizers that it calls from 0.39 on, which are
maybe_update_loaded_keys, maybe_update_state_dict and get_state_dict_and_metadata.

What calls them there is wrapped here, for LRQQuantizer alone; other backends and models that are
not quantized take the ways of diffusers as they are. There device_map="auto" places a quantized
checkpoint by the sizes of the dense model, since its file is not known yet.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.loaders import single_file_model
from diffusers.models import model_loading_utils, modeling_utils
from diffusers.quantizers.base import DiffusersQuantizer

_SAVING = threading.Lock()


def needed() -> bool:
    """Whether the diffusers at hand has none of the hooks."""
    return not hasattr(DiffusersQuantizer, "maybe_update_state_dict")


def dtype_option(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument of from_pretrained by the name that it has."""
    return {"torch_dtype" if needed() else "dtype": dtype}


def qwen_image_lengths(batch: int, tokens: int) -> dict[str, list[int]]:
    """An argument of QwenImageTransformer2DModel, which 0.36 needs and later versions do not."""
    return {"txt_seq_lens": [tokens] * batch} if _version() < (0, 37) else {}


def supported() -> bool:
    """Whether it is one that was tried, or newer."""
    return _version() >= (0, 36)


def _version() -> tuple[int, int]:
    major, minor = (int(part) for part in diffusers.__version__.split(".")[:2])
    return major, minor


@functools.cache
def call_hooks_of(quantizer_class: type[Any]) -> None:
    """Make the diffusers at hand call the hooks of quantizers of this class, once however often it
    is asked for."""
    ModelMixin._load_pretrained_model = classmethod(
        _before_loading(ModelMixin._load_pretrained_model.__func__, quantizer_class)
    )
    into_meta = _before_tensors(model_loading_utils.load_model_dict_into_meta, quantizer_class)
    for module in (model_loading_utils, single_file_model):
        module.load_model_dict_into_meta = into_meta
    ModelMixin.save_pretrained = _saving(ModelMixin.save_pretrained, quantizer_class)


def _before_loading(load: Callable[..., Any], quantizer_class: type[Any]) -> Callable[..., Any]:
    """ModelMixin._load_pretrained_model, the first that knows the files."""

    @functools.wraps(load)
    def wrapped(
        cls: type,
        model: Any,
        state_dict: Any,
        files: list[str],
        name: Any,
        loaded_keys: list[str],
        **options: Any,
    ) -> Any:
        quantizer = options.get("hf_quantizer")
        if isinstance(quantizer, quantizer_class):
            loaded_keys = quantizer.maybe_update_loaded_keys(loaded_keys, files)
            quantizer.prepare(model, options.get("keep_in_fp32_modules") or ())
            options["is_parallel_loading_enabled"] = quantizer.supports_parallel_loading
        return load(cls, model, state_dict, files, name, loaded_keys, **options)

    return wrapped


def _before_tensors(load: Callable[..., Any], quantizer_class: type[Any]) -> Callable[..., Any]:
    """load_model_dict_into_meta, which takes the tensors of a file."""

    @functools.wraps(load)
    def wrapped(model: Any, state_dict: Any, *arguments: Any, **options: Any) -> Any:
        quantizer = options.get("hf_quantizer")
        if isinstance(quantizer, quantizer_class):
            state_dict = quantizer.maybe_update_state_dict(state_dict)
        return load(model, state_dict, *arguments, **options)

    return wrapped


def _saving(save: Callable[..., Any], quantizer_class: type[Any]) -> Callable[..., Any]:
    """ModelMixin.save_pretrained, which writes what state_dict() gives, without metadata."""

    @functools.wraps(save)
    def wrapped(model: Any, *arguments: Any, **options: Any) -> Any:
        quantizer = getattr(model, "hf_quantizer", None)
        if not isinstance(quantizer, quantizer_class):
            return save(model, *arguments, **options)
        tensors, metadata = quantizer.get_state_dict_and_metadata(
            {}, safe_serialization=options.get("safe_serialization", True)
        )
        with _SAVING, _written_as(model, tensors, metadata):
            return save(model, *arguments, **options)

    return wrapped


@contextlib.contextmanager
def _written_as(model: Any, tensors: dict[str, Any], own: dict[str, Any]) -> Iterator[None]:
    """model.state_dict() gives `tensors`, and `own` goes into the metadata of what is saved."""
    safetensors = modeling_utils.safetensors

    def save_file(shard: dict[str, Any], path: str, metadata: dict[str, str]) -> None:
        safetensors.torch.save_file(shard, path, metadata={**metadata, **own})

    object.__setattr__(model, "state_dict", lambda: tensors)
    modeling_utils.safetensors = SimpleNamespace(torch=SimpleNamespace(save_file=save_file))
    try:
        yield
    finally:
        modeling_utils.safetensors = safetensors
        object.__delattr__(model, "state_dict")
