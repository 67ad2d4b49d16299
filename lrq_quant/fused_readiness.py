"""Whether a block may run fused: what a fused forward asks of the modules that it passes over.

It calls kernels with the buffers of the linears and never calls the modules of the block: so none
of them may have a hook, a forward of its own or an adapter, which would be passed over in silence.

obstacle() looks at everything and says what is in the way. A call of a block asks is_ready(), which
remembers every place that was looked at, and what was there, and looks again only where something
else is there now.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from lrq_kernels import LRQLinear
from lrq_kernels.row_order import restore_order

# Of a linear that reads its input as it comes, which a fused norm or gate never makes.
HAS_BRANCH = "has a low-rank branch"
# Attributes of diffusers' modules, other than modules, that decide how a block runs.
_ATTRIBUTES = ("training", "processor", "_chunk_size")


def obstacle(block: nn.Module, quantized: tuple[str, ...]) -> str | None:
    """Why the linears of these names are not all quantized ones that can be called directly, or
    another module of the block cannot be passed over."""
    for name in quantized:
        try:
            linear = attrgetter(name)(block)
        except AttributeError:
            return f"it has no {name}"
        if type(linear) is not LRQLinear:
            return f"{name} is a {type(linear).__name__}"
        if linear.input_quantizer.act_bits == 16:
            return f"{name} runs with 16 bit activations"
        if linear.has_low_rank:
            return f"{name} {HAS_BRANCH}"
    if block.training:
        return "it is in training mode"
    if torch.compiler.is_compiling():
        return None  # torch.compile does not look at hooks of modules either
    for name, module in block.named_modules():
        if module is block:
            continue
        if module.training and isinstance(module, nn.Dropout):
            return f"{name} is in training mode"
        if "forward" in module.__dict__:
            return f"{name} has a forward of its own, as hooks of offloading and caching put there"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has a forward hook"
    return None


def unless(condition: bool, reason: str) -> str | None:
    return None if condition else reason


def is_plain_layer_norm(norm: Any) -> bool:
    """Without weight and bias."""
    return type(norm) is nn.LayerNorm and not norm.elementwise_affine


def is_gelu_tanh(module: Any) -> bool:
    """diffusers' GELU, a linear and what follows it."""
    return type(module).__name__ == "GELU" and getattr(module, "approximate", None) == "tanh"


class _Watched:
    """places: a dict, a key, what was there; hooks: dicts that were empty.

    Kept by the block itself: kept elsewhere under a weak reference to the block, it would keep the
    block alive, since the block's own dict is one of the places. A copy of a block has none.
    """

    def __init__(self, places: list[tuple[dict[str, Any], str, Any]], hooks: list[dict]) -> None:
        self.places, self.hooks = places, hooks

    def is_unchanged(self) -> bool:
        for there, key, was in self.places:
            if there.get(key) is not was:
                return False
        return not any(self.hooks)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


_WATCHED = "_lrq_watched"


def is_ready(block: nn.Module, obstacle_of: Callable[[Any], str | None]) -> bool:
    """Whether obstacle_of(block) is None."""
    if torch.compiler.is_compiling():
        return obstacle_of(block) is None
    watched = block.__dict__.get(_WATCHED)
    if watched is not None and watched.is_unchanged():
        return True
    ready = obstacle_of(block) is None
    if ready:
        block.__dict__[_WATCHED] = _watch(block)
    else:
        forget(block)
        if any(hasattr(module, "base_layer") for module in block.modules()):
            restore_order(block)  # an adapter was put on it by other ways than the model's methods
    return ready


def forget(block: nn.Module) -> None:
    """Of a block that is not fused, or not now."""
    block.__dict__.pop(_WATCHED, None)


def _watch(block: nn.Module) -> _Watched:
    places: list[tuple[dict[str, Any], str, Any]] = []
    hooks: list[dict] = []
    for module in block.modules():
        own = module.__dict__
        places += [(module._modules, name, child) for name, child in module._modules.items()]
        places += [(own, name, own[name]) for name in _ATTRIBUTES if name in own]
        if isinstance(module, LRQLinear):
            shared = module.input_quantizer.shared.__dict__
            places.append((shared, "act_bits", shared["act_bits"]))
        if module is not block:
            places.append((own, "forward", None))
            hooks += [module._forward_hooks, module._forward_pre_hooks]
    return _Watched(places, hooks)
