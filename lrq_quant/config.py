"""LRQConfig: what to quantize and how, for from_pretrained of diffusers and of transformers."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from lrq_kernels import QuantScheme, checkpoint
from lrq_kernels.checkpoint import CheckpointError

from .auto_family import family_by_names
from .families import find_family
from .recipe import (
    EXCLUDED,
    KeptLinear,
    QuantPlan,
    QuantRecipe,
    check_low_rank,
    check_shared_tables,
)
from .recipe_patterns import check_patterns

logger = logging.getLogger(__name__)

# Keys of config.json that are there where they are not 0.
_OPTIONAL = ("low_rank", "shared_tables")
DTYPES = (None, torch.bfloat16, torch.float16, torch.float32)
Scheme = QuantScheme | str | Mapping[str, Any] | None


class LRQMethod(str, Enum):
    """diffusers reads quant_method.value."""

    LRQ = checkpoint.FORMAT


class LRQConfig(QuantizationConfigMixin):
    """What to quantize and how, for from_pretrained and in config.json.

    scheme: of attention and feed-forward linears, as "w4a8" or a QuantScheme; modulation: of the
    adaLN linears, None to keep them. modules_to_not_convert and the keys of overrides are fnmatch
    patterns on full module names; a pattern that matches a module holds for every linear in it.
    overrides: pattern -> scheme, or None to keep; the first that matches wins. low_rank and
    shared_tables: as in QuantRecipe. Of a checkpoint that is quantized already this is a
    description: the file says what its linears are. format_version: by default the one that such a
    checkpoint has.

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
        low_rank: int = 0,
        shared_tables: int = 0,
        format_version: int | None = None,
        quant_method: str = checkpoint.FORMAT,
    ) -> None:
        if quant_method != checkpoint.FORMAT:
            raise ValueError(
                f"LRQConfig: quant_method must be {checkpoint.FORMAT!r}, got {quant_method!r}"
            )
        if format_version is None:
            fields = {"low_rank_up": low_rank, "table_of_row": shared_tables}
            format_version = checkpoint.version_with(f for f, given in fields.items() if given)
        if format_version not in checkpoint.VERSIONS:
            known = ", ".join(map(str, checkpoint.VERSIONS))
            raise CheckpointError(
                f"LRQConfig: format version {format_version}; this package reads versions {known}"
            )
        check_low_rank(low_rank, "LRQConfig")
        check_shared_tables(shared_tables, "LRQConfig")
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
        self.low_rank = low_rank
        self.shared_tables = shared_tables

    @classmethod
    def from_dict(
        cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Inverse of to_dict. A key that this version does not know is left out with a warning."""
        known = {*cls().to_dict(), *_OPTIONAL}
        values = {**config_dict, **kwargs}
        unknown = {key: values.pop(key) for key in sorted(set(values) - known)}
        if unknown:
            logger.warning("LRQConfig: unknown keys are left out: %s", sorted(unknown))
        config = cls(**values)
        return (config, unknown) if return_unused_kwargs else config

    @classmethod
    def from_recipe(cls, recipe: Mapping[str, Any], kept: Iterable[KeptLinear] = ()) -> LRQConfig:
        """A description of what quantize_model was asked for; recipe as QuantRecipe.to_dict; kept:
        linears that stayed, since a configuration has no word for `include`."""
        exclude = list(recipe["exclude"])
        if tuple(recipe["include"]) != ("*",):
            exclude += [linear.name for linear in kept if linear.why == EXCLUDED]
        return cls(
            recipe["block"],
            modulation=recipe["modulation"],
            modules_to_not_convert=exclude,
            overrides=dict(recipe["overrides"]),
            **{key: recipe.get(key, 0) for key in _OPTIONAL},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values. What came with a later format version is left out where it is 0:
        readers of version 1 do not know it."""
        optional = {key: value for key in _OPTIONAL if (value := getattr(self, key))}
        return {
            "quant_method": self.quant_method.value,
            "format_version": self.format_version,
            "scheme": _plain(self.scheme),
            "modulation": _plain(self.modulation, rotation="none"),
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "overrides": {name: _plain(scheme) for name, scheme in self.overrides.items()},
            **optional,
        }

    def to_diff_dict(self) -> dict[str, Any]:
        """What differs from the defaults; __repr__ and to_json_string of the base class use it."""
        default = LRQConfig().to_dict()
        values = self.to_dict().items()
        return {k: v for k, v in values if k == "quant_method" or v != default.get(k)}

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
        check_patterns(self.modules_to_not_convert, linears, "LRQConfig: modules_to_not_convert")
        check_patterns(self.overrides, linears, "LRQConfig: overrides")
        return QuantRecipe(
            block=self.scheme,
            modulation=self.modulation,
            exclude=tuple(dict.fromkeys((*exclude, *self.modules_to_not_convert))),
            overrides=tuple(self.overrides.items()),
            low_rank=self.low_rank,
            shared_tables=self.shared_tables,
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
