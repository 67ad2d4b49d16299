"""lrq as a quantization backend of diffusers: LRQQuantizer and its registration.

from_pretrained of a quantized folder replaces the linears that the checkpoint's header lists and
fills them group by group. With quantization_config=LRQConfig("w4a8") the checkpoint of a dense
model is quantized while it loads, one linear at a time, from its weights alone.

diffusers knows a backend by two tables; importing lrq_quant enters this one (register).
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from lrq_kernels import LRQLinear, checkpoint, get_act_bits, model_states, set_act_bits
from lrq_kernels.checkpoint import FIELDS, CheckpointError, Header
from lrq_kernels.loader import check_model

from . import older_diffusers
from .config import DTYPES, LRQConfig
from .fused_projections import unfuse_projections
from .loading import DenseLoader, PendingLinear, build_linears_on, dense_linear

logger = logging.getLogger(__name__)


def register() -> None:
    """Make diffusers know "lrq" in config.json and LRQConfig in from_pretrained, and give its
    models lrq_act_bits."""
    auto.AUTO_QUANTIZER_MAPPING[checkpoint.FORMAT] = LRQQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[checkpoint.FORMAT] = LRQConfig
    ModelMixin.lrq_act_bits = property(get_act_bits, set_act_bits)
    if older_diffusers.needed():
        older_diffusers.call_hooks_of(LRQQuantizer)


class LRQQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads and saves a model; the methods are its interface."""

    use_keep_in_fp32_modules = True
    requires_calibration = False
    required_packages = None

    def __init__(self, quantization_config: LRQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._header: Header | None = None
        self._groups: dict[str, list[str]] = {}
        self._dense_loader: DenseLoader | None = None
        self._arrived: dict[str, Tensor] = {}
        self._model: Any = None

    # -- before the weights

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        if not older_diffusers.supported():
            raise ImportError(f"lrq: diffusers must be 0.36 or newer, got {diffusers.__version__}")
        dtype, device_map = kwargs.get("torch_dtype"), kwargs.get("device_map")
        if dtype not in DTYPES:
            raise ValueError(f"lrq: torch_dtype must be one of {DTYPES[1:]}, got {dtype}")
        if isinstance(device_map, Mapping) and "disk" in map(str, device_map.values()):
            raise ValueError("lrq: device_map must not put a quantized model on 'disk'")

    def maybe_update_loaded_keys(
        self, loaded_keys: list[str], checkpoint_files: list[str]
    ) -> list[str]:
        if self.pre_quantized:
            self._header = checkpoint.read_header(checkpoint_files)
            self._groups = self._header.groups()
        return loaded_keys

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        device_map: Any = None,
        keep_in_fp32_modules: Sequence[str] = (),
        state_dict: dict[str, Any] | None = None,  # of from_single_file
        **kwargs: Any,
    ) -> None:
        if state_dict is None and older_diffusers.needed():
            return  # the files are not known yet: older_diffusers calls prepare
        self.prepare(model, keep_in_fp32_modules)

    def prepare(self, model: nn.Module, keep_in_fp32_modules: Sequence[str] | None) -> None:
        """Make the model expect the tensors of the checkpoint."""
        if self._header is not None:
            self._expect(model, self._header)
        else:  # a dense checkpoint; from_single_file does not say so
            self.pre_quantized = False
            recipe = self.quantization_config.recipe(model, keep_in_fp32_modules or ())
            plan = recipe.resolve(model)
            logger.info(plan.summary())
            self._dense_loader = DenseLoader(plan, recipe)
        model.config.quantization_config = self.quantization_config

    def _expect(self, model: nn.Module, header: Header) -> None:
        linears = {
            name: (facts["out_features"], facts["in_features"], "bias" in header.fields(name))
            for name, facts in header.layers.items()
        }
        check_model(model, header.model_class, linears, header.dense())
        for name in header.layers:
            model.set_submodule(name, PendingLinear(name, header))

    def update_missing_keys(
        self, model: nn.Module, missing_keys: list[str], prefix: str
    ) -> list[str]:
        # diffusers only warns, and leaves what is missing on the meta device.
        if missing_keys:
            raise CheckpointError(f"the checkpoint lacks {sorted(missing_keys)[:5]} of the model")
        return missing_keys

    def get_special_dtypes_update(
        self, model: nn.Module, torch_dtype: torch.dtype
    ) -> dict[str, Any]:
        """Sizes by which device_map="auto" places what is still dense."""
        if self._dense_loader is None:
            return {}
        from accelerate.utils import CustomDtype

        return {f"{name}.weight": CustomDtype.INT4 for name in self._dense_loader.linears}

    def get_cuda_warm_up_factor(self) -> int:
        # Elements of the torch_dtype to reserve are those of the tensors over this: int32 words of
        # a quantized checkpoint, 16-bit weights of which 4 bits stay of a dense one.
        return 1 if self.pre_quantized else 4

    @property
    def supports_parallel_loading(self) -> bool:
        return False

    # -- the weights

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        # Here, because dense tensors are cast before any other hook sees them.
        if self._header is not None:
            for name, tensor in state_dict.items():
                self._header.verify(name, tensor)
        # Views of the file lie on odd addresses, for which matrix products on the CPU round
        # differently, and lose their contents when the model is saved over the file.
        return {
            name: tensor if self._is_of_quantized(name) else tensor.clone()
            for name, tensor in state_dict.items()
        }

    def _is_of_quantized(self, name: str) -> bool:
        """Whether a tensor of the file becomes part of a quantized linear."""
        layer, _, leaf = name.rpartition(".")
        if self._header is not None:
            return layer in self._header.layers and leaf in FIELDS
        return self._dense_loader is not None and layer in self._dense_loader.linears

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        return self._is_of_quantized(param_name)

    def check_quantized_param_shape(
        self, param_name: str, current_param: Tensor, loaded_param: Tensor
    ) -> bool:
        raise CheckpointError(
            f"{param_name} must be {list(current_param.shape)} as its description says, "
            f"the checkpoint has {list(loaded_param.shape)}"
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device | str,
        state_dict: dict[str, Any] | None = None,
        unexpected_keys: list[str] | None = None,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        # The file's own value: param_value is rounded to torch_dtype already.
        self._arrived[param_name] = (state_dict or {}).get(param_name, param_value)
        layer = param_name.rpartition(".")[0]
        target = (torch.device(target_device), dtype or torch.float32)
        if self._header is not None:
            self._finish_group(model, self._header, layer, *target)
        elif self._dense_loader is not None:
            self._dense_loader.finish(model, layer, self._arrived, *target)

    def _finish_group(
        self,
        model: nn.Module,
        header: Header,
        layer: str,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Linears of one input are built once the tensors of all of them are here."""
        members = self._groups[header.layers[layer].get("shared_input", layer)]
        names = [name for member in members for name in header.fields(member).values()]
        if not all(name in self._arrived for name in names):
            return
        states = {name: checkpoint.layer_state(name, header, self._arrived) for name in members}
        for name, linear in build_linears_on(states, dtype, device).items():
            model.set_submodule(name, linear)
        for name in names:
            del self._arrived[name]

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self._arrived:
            raise CheckpointError(
                f"the checkpoint is incomplete around {sorted(self._arrived)[:5]}"
            )
        for name, module in model.named_modules():
            if isinstance(module, PendingLinear):
                raise CheckpointError(f"the checkpoint holds no tensors of {name}")
        self._dense_loader = None
        self._model = weakref.ref(model)

    # -- afterwards

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What save_pretrained writes: canonical tensors under the model's own names."""
        model = None if self._model is None else self._model()
        if model is None:
            raise RuntimeError("lrq: only a model that from_pretrained returned, or its deepcopy")
        if not safe_serialization:
            raise ValueError("lrq: a quantized model is saved as safetensors alone")
        if getattr(model, "peft_config", None):
            raise ValueError(
                f"lrq: unload the adapters {sorted(model.peft_config)} before saving (unload_lora)"
            )
        return checkpoint.encode(*model_states(model), type(model).__name__)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        unfuse_projections(model)
        for name, linear in list(model.named_modules()):
            if isinstance(linear, LRQLinear):
                model.set_submodule(name, dense_linear(linear))
        # Else save_pretrained would write a dense model that calls itself quantized.
        config = {k: v for k, v in model._internal_dict.items() if k != "quantization_config"}
        model._internal_dict = type(model._internal_dict)(config)
        model.is_quantized = False  # diffusers does so from 0.39 on
        return model

    def __deepcopy__(self, memo: dict[int, Any]) -> LRQQuantizer:
        """A copied model is saved by its own quantizer."""
        twin = memo[id(self)] = copy.copy(self)
        model = None if self._model is None else self._model()
        if model is not None and id(model) in memo:
            twin._model = weakref.ref(memo[id(model)])
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None}
