"""lrq as a quantization backend of transformers, for the text encoders of a pipeline.

    PipelineQuantizationConfig(quant_mapping={"transformer": LRQConfig("w4a8"),
                                              "text_encoder_2": LRQConfig("w4a16")})

The same LRQConfig, the same checkpoint and the same linears as in diffusers_backend.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer

from lrq_kernels import LRQLinear, checkpoint, model_states
from lrq_kernels.checkpoint import FIELDS, CheckpointError, Header
from lrq_kernels.loader import check_model

from .config import DTYPES, LRQConfig
from .loading import DenseLoader, PendingLinear, build_linears_on, dense_linear

logger = logging.getLogger(__name__)


def register() -> None:
    """Make transformers know "lrq" in config.json and LRQConfig in from_pretrained."""
    auto.AUTO_QUANTIZER_MAPPING[checkpoint.FORMAT] = LRQHfQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[checkpoint.FORMAT] = LRQConfig


class LRQHfQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a model; the methods are its interface."""

    requires_calibration = False

    def __init__(self, quantization_config: LRQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._dtype = torch.float32
        self._header: Header | None = None
        self._dense_loader: DenseLoader | None = None
        self._arrived: dict[str, Tensor] = {}

    # -- before the weights

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in map(str, device_map.values()):
            raise ValueError("lrq: device_map must not put a quantized model on 'disk'")

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        if dtype not in DTYPES:
            raise ValueError(f"lrq: dtype must be one of {DTYPES[1:]}, got {dtype}")
        self._dtype = dtype or torch.float32
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if self.pre_quantized:
            self._header = checkpoint.read_header(checkpoint_files or [])
            checkpoint.verify_files(self._header)
            self._expect(model, self._header)
            return
        # T5's wo overflows fp16; in the other dtypes it is as good as any.
        keep = (model._keep_in_fp32_modules or ()) if self._dtype == torch.float16 else ()
        recipe = self.quantization_config.recipe(model, keep)
        plan = recipe.resolve(model)
        if not plan.linears:
            raise ValueError(f"lrq: nothing to quantize in {plan.summary()}")
        logger.info(plan.summary())
        self._dense_loader = DenseLoader(plan, recipe)
        _never_initialize(model, self._dense_loader.linears)

    def _expect(self, model: Any, header: Header) -> None:
        linears = {
            name: (facts["out_features"], facts["in_features"], "bias" in header.fields(name))
            for name, facts in header.layers.items()
        }
        # What is tied is stored once.
        stored = {*header.dense(), *_tied(model)}
        check_model(model, header.model_class, linears, stored, meta_buffers=True)
        for name in header.layers:
            model.set_submodule(name, PendingLinear(name, header))
        _never_initialize(model, header.layers)

    # -- the weights

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        layer, _, leaf = param_name.rpartition(".")
        if self._header is not None:
            return layer in self._header.layers and leaf in FIELDS
        return self._dense_loader is not None and layer in self._dense_loader.linears

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        floats = param.get_dtype() if hasattr(param, "get_dtype") else str(param.dtype)
        return dtype if "F" in floats or "float" in floats else None

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def quantize(self, model: Any, name: str, value: Tensor) -> None:
        """One tensor of a linear of the plan was read."""
        if self._dense_loader is None:
            raise RuntimeError(f"lrq: {name} was to be quantized, and there is no plan")
        self._arrived[name] = value
        layer = name.rpartition(".")[0]
        self._dense_loader.finish(model, layer, self._arrived, value.device, self._dtype)
        together = self._dense_loader.together(layer)
        _never_initialize(model, [linear.name for linear in together])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._arrived:
            raise CheckpointError(
                f"the checkpoint is incomplete around {sorted(self._arrived)[:5]}"
            )
        if self._header is not None:
            self._build(model, self._header)
        elif self._dense_loader is not None:
            self._check_all_replaced(model, self._dense_loader.linears)
        self._dense_loader = None
        return model

    def _check_all_replaced(self, model: Any, names: Iterable[str]) -> None:
        for name in names:
            if not isinstance(model.get_submodule(name), LRQLinear):
                raise CheckpointError(f"the checkpoint lacks {name} of the model")

    def _build(self, model: Any, header: Header) -> None:
        """Linears from what PendingLinears hold by now, input by input."""
        for members in header.groups().values():
            tensors = {
                f"{name}.{field}": tensor
                for name in members
                for field, tensor in model.get_submodule(name).named_buffers()
            }
            if empty := [name for name, tensor in tensors.items() if tensor.is_meta]:
                raise CheckpointError(f"the checkpoint holds no {empty[0]}")
            states = {name: checkpoint.layer_state(name, header, tensors) for name in members}
            device = states[members[0]].codes.device
            for name, linear in build_linears_on(states, self._dtype, device).items():
                model.set_submodule(name, linear)

    # -- afterwards

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What save_pretrained writes: canonical tensors under the model's own names."""
        if getattr(model, "_weight_conversions", None):
            raise ValueError(
                f"lrq: a quantized {type(model).__name__} cannot be saved, since transformers "
                "renames its tensors; quantize it while it loads"
            )
        states, dense = model_states(model)
        dense = {name: tensor for name, tensor in dense.items() if name not in _tied(model)}
        tensors, metadata = checkpoint.encode(states, dense, type(model).__name__)
        return tensors, _Metadata(metadata)

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        for name, linear in list(model.named_modules()):
            if isinstance(linear, LRQLinear):
                model.set_submodule(name, dense_linear(linear).to(dtype))
        return model


class _Quantize(ConversionOps):
    """Takes a tensor of a linear out of the loader's hands."""

    def __init__(self, quantizer: LRQHfQuantizer) -> None:
        self.quantizer = quantizer

    def convert(  # type: ignore[no-untyped-def]
        self, input_dict, *, model=None, full_layer_name=None, missing_keys=None, **kwargs
    ) -> dict[str, Tensor]:
        ((_, value),) = input_dict.items()
        value = value[0] if isinstance(value, list) else value
        self.quantizer.quantize(model, full_layer_name, value)
        missing_keys.discard(full_layer_name)
        return {}


class _Metadata(dict):
    """save_pretrained sets "format" to "pt", by which nobody would know the file."""

    def __setitem__(self, key: str, value: str) -> None:
        if key != "format":
            super().__setitem__(key, value)


def _tied(model: Any) -> set[str]:
    """Names of tensors that are another one's."""
    return set(getattr(model, "all_tied_weights_keys", None) or ())


def _never_initialize(model: nn.Module, names: Iterable[str]) -> None:
    """Tell transformers that linears, and the modules that would initialize them, have values."""
    for name in names:
        for module in (model.get_submodule(name), model.get_submodule(name.rpartition(".")[0])):
            module._is_hf_initialized = True
