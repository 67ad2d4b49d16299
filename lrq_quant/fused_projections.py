"""One GEMM for the q, k and v of an attention, and back.

Lossless both ways: levels and scales are per output row. Names are those of diffusers (to_qkv,
to_added_qkv, to_kv with fused_projections set), so its attention processors use the result.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

from torch import nn

from lrq_kernels import LRQLinear, fuse_linears
from lrq_kernels.linear import split_linear

from .adapters import no_longer, undo_before_adapters

# Fused name -> linears of an attention module, in the order in which diffusers splits the result.
_SELF_ATTENTION: dict[str, tuple[str, ...]] = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}
_CROSS_ATTENTION: dict[str, tuple[str, ...]] = {"to_kv": ("to_k", "to_v")}


def fuse_projections(model: nn.Module) -> nn.Module:
    """Make one GEMM of the quantized q, k and v of every attention module that supports it.

    The separate linears are removed, so nothing is held twice. Modules whose projections are not
    all quantized with one scheme and a shared input, or carry an adapter, stay as they are;
    fused_projections() lists what was fused. Loading an adapter later splits them again.
    """
    fused_any = False
    for module in model.modules():
        for fused_name, members in _fusable(module).items():
            fused = fuse_linears([getattr(module, name) for name in members])
            for name in members:
                delattr(module, name)
            module.add_module(fused_name, fused)
            module.fused_projections = fused_any = True
            # diffusers' own unfusing would delete the fused linear, which has the only weights.
            module._supports_qkv_fusion = False
        if getattr(module, "fused_projections", False):
            _use_processor(module, fused=True)
    if fused_any:
        undo_before_adapters(model, unfuse_projections)
    return model


def unfuse_projections(model: nn.Module) -> nn.Module:
    """Undo fuse_projections: every linear is again what it was, bit for bit."""
    for module in list(model.modules()):
        for fused_name, members in {**_SELF_ATTENTION, **_CROSS_ATTENTION}.items():
            fused = getattr(module, fused_name, None)
            if not isinstance(fused, LRQLinear) or len(fused.parts) != len(members):
                continue
            delattr(module, fused_name)
            for name, linear in zip(members, split_linear(fused), strict=True):
                module.add_module(name, linear)
            module.fused_projections = False
            module.__dict__.pop("_supports_qkv_fusion", None)
            _use_processor(module, fused=False)
    no_longer(model, unfuse_projections)
    return model


def fused_projections(model: nn.Module) -> dict[str, list[str]]:
    """Full name of each fused linear of one input -> names of the linears in it."""
    return {
        name: [part for part, _ in module.parts]
        for name, module in model.named_modules()
        if isinstance(module, LRQLinear) and module.parts_share_input and len(module.parts) > 1
    }


def fusable_attentions(model: nn.Module) -> list[str]:
    """Full names of the attention modules that fuse_projections would change."""
    return [name for name, module in model.named_modules() if _fusable(module)]


def _fusable(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Groups of an attention module to fuse: all that its fused forward reads, or none."""
    if not hasattr(module, "fused_projections") or module.fused_projections:
        return {}
    cross = bool(getattr(module, "is_cross_attention", False))
    if cross and getattr(module, "add_k_proj", None) is not None:
        return {}  # Wan's processor looks at add_k_proj itself to see that there is a picture
    wanted = _CROSS_ATTENTION if cross else _SELF_ATTENTION
    groups = {
        fused: members
        for fused, members in wanted.items()
        if any(getattr(module, name, None) is not None for name in members)
    }
    complete = all(_one_input(module, members) for members in groups.values())
    return groups if complete and _has_fused_forward(module) else {}


def _one_input(module: nn.Module, members: tuple[str, ...]) -> bool:
    found = [getattr(module, name, None) for name in members]
    linears = [linear for linear in found if isinstance(linear, LRQLinear)]
    if len(linears) < len(found):
        return False
    first = linears[0]
    return all(
        linear.out_features == first.out_features  # diffusers splits the result evenly
        and linear.input_quantizer.shared is first.input_quantizer.shared
        and linear.scheme == first.scheme
        and (linear.bias is None) == (first.bias is None)
        for linear in linears
    )


def _has_fused_forward(module: nn.Module) -> bool:
    """Whether the attention processor reads to_qkv when fused_projections is set. That a module
    has the flag says nothing: LTX's has it, and its processor calls to_q."""
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import AttnProcessor2_0

    processor = getattr(module, "processor", None)
    if isinstance(processor, AttnProcessor2_0):
        return True
    call = type(processor).__call__
    return isinstance(module, AttentionModuleMixin) and _names(call, "fused_projections")


def _names(function: Any, name: str, depth: int = 2) -> bool:
    """Whether a Python function, or one of its module that it calls, names the attribute."""
    if not isinstance(function, FunctionType) or depth == 0:
        return False
    used = function.__code__.co_names
    called = (function.__globals__.get(other) for other in used)
    return name in used or any(_names(other, name, depth - 1) for other in called)


def _use_processor(module: Any, *, fused: bool) -> None:
    """The older Attention class picks the fused forward by its processor, not by the flag."""
    from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0

    old, new = AttnProcessor2_0, FusedAttnProcessor2_0
    if not fused:
        old, new = new, old
    if isinstance(getattr(module, "processor", None), old):
        module.set_processor(new())
