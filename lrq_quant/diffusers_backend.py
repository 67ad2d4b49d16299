"""lrq as a quantization backend of diffusers: LRQConfig, LRQQuantizer, and their registration.

from_pretrained of a quantized folder replaces the linears that the checkpoint's header lists and
fills them group by group. With quantization_config=LRQConfig("w4a8") the checkpoint of a dense
model is quantized while it loads, one linear at a time, from its weights alone.

diffusers knows a backend by two tables; importing lrq_quant enters this one (register).
"""

from __future__ import annotations

import copy
import inspect
import logging
import weakref
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from types import MethodType
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from lrq_kernels import (
    InputQuantizer,
    LRQLinear,
    QuantScheme,
    checkpoint,
    get_act_bits,
    model_states,
    set_act_bits,
)
from lrq_kernels.checkpoint import FIELDS, CheckpointError, Header
from lrq_kernels.loader import build_linears, check_model

from .auto_family import family_by_names
from .families import find_family
from .fused_projections import unfuse_projections
from .pipeline import quantize_linear
from .recipe import InputGroup, LinearPlan, QuantPlan, QuantRecipe
from .recipe_patterns import matching, schemes_by_name
from .rotation_search import RotationChoice, data_free_rotation

logger = logging.getLogger(__name__)

DTYPES = (None, torch.bfloat16, torch.float16, torch.float32)
Scheme = QuantScheme | str | Mapping[str, Any] | None


class LRQMethod(str, Enum):
    """diffusers reads quant_method.value."""

    LRQ = checkpoint.FORMAT


def register() -> None:
    """Make diffusers know "lrq" in config.json and LRQConfig in from_pretrained, and give its
    models lrq_act_bits."""
    auto.AUTO_QUANTIZER_MAPPING[checkpoint.FORMAT] = LRQQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[checkpoint.FORMAT] = LRQConfig
    ModelMixin.lrq_act_bits = property(get_act_bits, set_act_bits)


# ---- configuration ------------------------------------------------------------------------------


class LRQConfig(QuantizationConfigMixin):
    """What to quantize and how, for from_pretrained and in config.json.

    scheme: of attention and feed-forward linears, as "w4a8" or a QuantScheme; modulation: of the
    adaLN linears, None to keep them. modules_to_not_convert and the keys of overrides are fnmatch
    patterns on full module names; a pattern that matches a module holds for every linear in it.
    overrides: pattern -> scheme, or None to keep; the first that matches wins. Of a checkpoint that
    is quantized already this is a description: the file says what its linears are.

    Raises TypeError for an unknown argument and ValueError for a bad scheme, CheckpointError for a
    format version that this package does not read.
    """

    def __init__(
        self,
        scheme: Scheme = "w4a8",
        *,
        modulation: Scheme = "w4a16",
        modules_to_not_convert: Sequence[str] | None = None,
        overrides: Mapping[str, Scheme] | None = None,
        format_version: int = checkpoint.VERSION,
        quant_method: str = checkpoint.FORMAT,
    ) -> None:
        if quant_method != checkpoint.FORMAT:
            raise ValueError(
                f"LRQConfig: quant_method must be {checkpoint.FORMAT!r}, got {quant_method!r}"
            )
        if format_version != checkpoint.VERSION:
            raise CheckpointError(
                f"LRQConfig: format version {format_version}; this package reads version "
                f"{checkpoint.VERSION}"
            )
        if isinstance(modules_to_not_convert, str):
            raise TypeError("LRQConfig: modules_to_not_convert must be a list of patterns")
        block = _scheme(scheme)
        if block is None:
            raise ValueError("LRQConfig: scheme must be a scheme such as 'w4a8', got None")
        self.quant_method = LRQMethod.LRQ
        self.format_version = format_version
        self.scheme = block
        self.modulation = _scheme(modulation, rotation="none")
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.overrides = {name: _scheme(value) for name, value in (overrides or {}).items()}

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Inverse of to_dict. A key that this version does not know is left out with a warning."""
        known = set(cls().to_dict())
        values = {**config_dict, **kwargs}
        unknown = {key: values.pop(key) for key in sorted(set(values) - known)}
        if unknown:
            logger.warning("LRQConfig: unknown keys are left out: %s", sorted(unknown))
        config = cls(**values)
        return (config, unknown) if return_unused_kwargs else config

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any]) -> LRQConfig:
        """A description of what quantize_model was asked for; recipe as QuantRecipe.to_dict."""
        return cls(
            recipe["block"],
            modulation=recipe["modulation"],
            modules_to_not_convert=list(recipe["exclude"]),
            overrides=dict(recipe["overrides"]),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "quant_method": self.quant_method.value,
            "format_version": self.format_version,
            "scheme": _plain(self.scheme),
            "modulation": _plain(self.modulation, rotation="none"),
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "overrides": {name: _plain(scheme) for name, scheme in self.overrides.items()},
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults; __repr__ and to_json_string of the base class use it."""
        default = LRQConfig().to_dict()
        values = self.to_dict().items()
        return {k: v for k, v in values if k == "quant_method" or v != default[k]}

    def recipe(self, model: nn.Module, keep: Iterable[str] = ()) -> QuantRecipe:
        """The recipe for `model`, patterns resolved to names. keep: names of modules, anywhere in
        a path, that stay as well. Raises ValueError for a pattern that matches no linear."""
        linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        family = find_family(model)
        if family is None:
            family = family_by_names(model)
            logger.warning(
                "lrq: %s is of no known family: its blocks are taken from its structure, and no "
                "two linears share a quantized input. lrq_quant.register_family("
                "lrq_quant.auto_family(model, run)) does better",
                type(model).__name__,
            )
        kept = set(keep)
        exclude = [name for name in linears if kept & set(name.split("."))]
        for pattern in self.modules_to_not_convert:
            exclude += matching(pattern, linears, "modules_to_not_convert")
        return QuantRecipe(
            block=self.scheme,
            modulation=self.modulation,
            exclude=tuple(dict.fromkeys(exclude)),
            overrides=schemes_by_name(self.overrides, linears),
            family=family,
        )

    def plan(self, model: nn.Module) -> QuantPlan:
        """What this does to `model`, which may be on the meta device: print(plan.summary())."""
        return self.recipe(model).resolve(model)


def _scheme(value: Scheme, **defaults: Any) -> QuantScheme | None:
    if value is None or isinstance(value, QuantScheme):
        return value
    if isinstance(value, str):
        return _named_scheme(value, **defaults)
    if isinstance(value, Mapping):
        return QuantScheme.from_dict(dict(value))
    raise TypeError(f"LRQConfig: a scheme must be a name, a QuantScheme or a dict, got {value!r}")


def _named_scheme(name: str, **defaults: Any) -> QuantScheme:
    return (
        QuantScheme.from_name(name, **defaults) if defaults else QuantRecipe.from_name(name).block
    )


def _plain(scheme: QuantScheme | None, **defaults: Any) -> str | dict[str, Any] | None:
    """The name where the name says it all."""
    if scheme is None:
        return None
    named = scheme == _named_scheme(scheme.name, **defaults)
    return scheme.name if named else scheme.to_dict()


# ---- quantizer ----------------------------------------------------------------------------------


class PendingLinear(nn.Module):
    """Stands where a quantized linear goes until its tensors are read: their names and shapes, on
    the meta device, so that diffusers looks them up in the checkpoint."""

    def __init__(self, name: str, header: Header) -> None:
        super().__init__()
        facts = header.layers[name]
        sizes = (facts["out_features"], facts["in_features"], facts["weight_bits"])
        for field in header.fields(name):
            spec = FIELDS[field]
            empty = torch.empty(spec.shape(*sizes), dtype=spec.dtype, device="meta")
            self.register_buffer(field, empty)


class LRQQuantizer(DiffusersQuantizer):
    """What diffusers calls while it loads and saves a model; the methods are its interface."""

    use_keep_in_fp32_modules = True
    requires_calibration = False
    required_packages = None

    def __init__(self, quantization_config: LRQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._header: Header | None = None
        self._dense_loader: _DenseLoader | None = None
        self._arrived: dict[str, Tensor] = {}
        self._model: Any = None

    # -- before the weights

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
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
        return loaded_keys

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        device_map: Any = None,
        keep_in_fp32_modules: Sequence[str] = (),
        **kwargs: Any,
    ) -> None:
        if self._header is not None:
            self._expect(model, self._header)
        else:  # a dense checkpoint; from_single_file does not say so
            self.pre_quantized = False
            recipe = self.quantization_config.recipe(model, keep_in_fp32_modules or ())
            plan = recipe.resolve(model)
            logger.info(plan.summary())
            self._dense_loader = _DenseLoader(plan, recipe.search.seed)
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
        if self._header is None:
            return state_dict
        for name, tensor in state_dict.items():
            self._header.verify(name, tensor)
        # Views of the file lie on odd addresses, for which matrix products on the CPU round
        # differently, and lose their contents when the model is saved over the file.
        dense = self._header.dense()
        return {n: t.clone() if n in dense else t for n, t in state_dict.items()}

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        state_dict: dict[str, Any],
        **kwargs: Any,
    ) -> bool:
        layer, _, leaf = param_name.rpartition(".")
        if self._header is not None:
            return layer in self._header.layers and leaf in FIELDS
        return self._dense_loader is not None and layer in self._dense_loader.linears

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
        members = header.groups()[header.layers[layer].get("shared_input", layer)]
        names = [name for member in members for name in header.fields(member).values()]
        if not all(name in self._arrived for name in names):
            return
        states = {
            name: checkpoint.layer_state(name, header, self._arrived).to(device) for name in members
        }
        for name, linear in build_linears(states, dtype).items():
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
        if hasattr(model, "enable_group_offload"):
            model.enable_group_offload = MethodType(_group_offload_to_memory, model)

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
                model.set_submodule(name, _dense_linear(linear))
        # Else save_pretrained would write a dense model that calls itself quantized.
        config = {k: v for k, v in model._internal_dict.items() if k != "quantization_config"}
        model._internal_dict = type(model._internal_dict)(config)
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


def _group_offload_to_memory(self: Any, *args: Any, **kwargs: Any) -> Any:
    """enable_group_offload of the model's class, without the way that loses tensors."""
    call = inspect.signature(type(self).enable_group_offload).bind(self, *args, **kwargs)
    if call.arguments.get("offload_to_disk_path") is not None:
        # A group writes its tensors when it is made and frees them. What two linears share, the
        # second group would write after the first has freed it.
        raise ValueError(
            "lrq: offload_to_disk_path loses tensors that linears share, such as the rotation of "
            "q, k and v; offload to memory instead"
        )
    return type(self).enable_group_offload(self, *args, **kwargs)


def _dense_linear(linear: LRQLinear) -> nn.Linear:
    with torch.device("meta"):
        dense = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    dense.weight = nn.Parameter(linear.dense_weight(), requires_grad=False)
    if linear.bias is not None:
        dense.bias = nn.Parameter(linear.bias.to(linear.dtype), requires_grad=False)
    return dense


class _DenseLoader:
    """Quantizes the linears of a plan one by one as their tensors are read.

    Data-free: the rotation of a group follows from its name, so its members need not meet.
    """

    def __init__(self, plan: QuantPlan, seed: int) -> None:
        self.linears: dict[str, tuple[InputGroup, LinearPlan]] = {
            linear.name: (group, linear) for group in plan.groups for linear in group.linears
        }
        self._seed = seed
        self._inputs: dict[str, tuple[RotationChoice, InputQuantizer]] = {}

    def finish(
        self,
        model: nn.Module,
        name: str,
        arrived: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Replace linear `name` once its weight, and its bias if it has one, are in `arrived`."""
        has_bias = model.get_submodule(name).bias is not None
        names = [f"{name}.weight", f"{name}.bias"] if has_bias else [f"{name}.weight"]
        if not all(n in arrived for n in names):
            return
        weight, bias = arrived.pop(names[0]), arrived.pop(names[1]) if has_bias else None
        group, linear = self.linears[name]
        if tuple(weight.shape) != (linear.out_features, linear.in_features):
            raise CheckpointError(
                f"{name}.weight must be {[linear.out_features, linear.in_features]} as in the "
                f"model, the checkpoint has {list(weight.shape)}"
            )
        # The fit is a hundred times faster there, wherever the result is to live.
        work = torch.device("cuda") if torch.cuda.is_available() else device
        choice, shared = self._input(group, device)
        choice = choice.to(work)
        try:
            state = quantize_linear(
                weight.to(work),
                None if bias is None else bias.to(work),
                choice.scheme(linear.scheme),
                rotation=choice.rotation,
            ).to(device)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        model.set_submodule(name, LRQLinear.from_state(state, shared, name, dtype))

    def _input(
        self, group: InputGroup, device: torch.device
    ) -> tuple[RotationChoice, InputQuantizer]:
        if group.name not in self._inputs:
            first = group.linears[0]
            choice = data_free_rotation(first.name, first.in_features, first.scheme, self._seed)
            scheme = choice.scheme(first.scheme)
            shared = InputQuantizer(first.in_features, scheme, None, choice.rotation).to(device)
            self._inputs[group.name] = (choice, shared)
        return self._inputs[group.name]
