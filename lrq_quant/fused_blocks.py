"""Blocks of a quantized model in as few launches as their linears allow, without a compiler.

fuse_blocks(model) gives the blocks of FLUX and PixArt a forward that calls the fused ops: norm,
modulation, rotation and quantization in one launch; GELU, gate and residual in the GEMM; the two
inputs of a single block's last linear without their concatenation; what stands between the
projections and attention in one launch; the modulation of all blocks of FLUX in one launch. It is
for eager calls and CUDA graphs. torch.compile finds the same by itself (lrq_kernels.fusion), in any
model.

Against the unfused blocks only roundings to the model's type are left out:
    GELU                    the linear's result, which GELU reads
    gate and residual       the linear's result and its product with the gate
so that values stay in fp32 from a linear's integer sum through what follows it. Norm and
modulation, queries and keys, attention and the rotated values are rounded where they were, and the
clipping of fp16 stays. A norm sums in another order than torch's: of a million values ten round the
other way in bf16, seventy in fp16.

A call that asks for something else (gradients, an image prompt, masks that FLUX takes in
joint_attention_kwargs, tensors of several dtypes) and a block that is not what it was (an adapter
on a linear, 16 bit activations, hooks on a module) run the block's own forward; fused_blocks() and
check() say which blocks are ready.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from lrq_kernels import LRQLinear

from . import fused_flux, fused_pixart
from .folded_permutations import fold_permutations, unfold_permutations
from .fused_modulation import stack_modulation, unstack_modulation
from .fused_projections import fuse_projections
from .fused_readiness import forget


class _Kind(NamedTuple):
    forward: Callable[..., Any]
    obstacle: Callable[[nn.Module], str | None]


_KINDS: dict[str, _Kind] = {
    "FluxTransformerBlock": _Kind(fused_flux.double_block, fused_flux.double_obstacle),
    "FluxSingleTransformerBlock": _Kind(fused_flux.single_block, fused_flux.single_obstacle),
    "BasicTransformerBlock": _Kind(fused_pixart.block, fused_pixart.obstacle),
}


def fuse_blocks(model: nn.Module) -> nn.Module:
    """Fuse the projections and the modulation of `model`, fold the permutations of its inputs, then
    give its blocks a fused forward; returns the model.

    A block runs its own forward for as long as it cannot be fused: fused_blocks() tells why. What
    wraps the forward of a block (group offload, caching) comes after this. Raises ValueError where
    the model has no quantized linear or no block of a kind that is known."""
    if not any(isinstance(module, LRQLinear) for module in model.modules()):
        raise ValueError(f"fuse_blocks: {type(model).__name__} has no quantized linear")
    blocks = _blocks(model)
    if not blocks:
        raise ValueError(
            f"fuse_blocks: {type(model).__name__} has none of the blocks {sorted(_KINDS)}; "
            "torch.compile fuses any model"
        )
    fuse_projections(model)
    stack_modulation(model)
    fold_permutations(model)
    for block in blocks.values():
        # Whatever is in the way may pass (16 bits in the first steps, an adapter): each call looks.
        # A partial, since a bound method of a function elsewhere cannot be unpickled.
        if "forward" not in block.__dict__:
            block.forward = partial(_KINDS[type(block).__name__].forward, block)
    return model


def unfuse_blocks(model: nn.Module) -> nn.Module:
    """Give the blocks of `model` their own forward, modulation and permutations again; projections
    stay fused (unfuse_projections). Raises RuntimeError, and changes nothing, where something wraps
    the fused forward of a block: undo that first."""
    fused = {name: block for name, block in _blocks(model).items() if _runs_fused(block)}
    for name, block in fused.items():
        if not _is_fused_forward(block, block.__dict__["forward"]):
            raise RuntimeError(f"unfuse_blocks: the forward of {name} is wrapped, by a hook or so")
    for block in fused.values():
        del block.forward
        forget(block)
    unstack_modulation(model)
    unfold_permutations(model)
    return model


def fused_blocks(model: nn.Module) -> dict[str, str | None]:
    """Name of each block of a known kind -> None where it runs fused, else why it does not."""
    found = {}
    for name, block in _blocks(model).items():
        reason = _obstacle(block)
        if reason is None and not _runs_fused(block):
            reason = "fuse_blocks was not called"
            if "forward" in block.__dict__:
                reason = "its forward was replaced, by a hook or so, before fuse_blocks was called"
        found[name] = reason
    return found


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if type(m).__name__ in _KINDS}


def _obstacle(block: nn.Module) -> str | None:
    return _KINDS[type(block).__name__].obstacle(block)


def _is_fused_forward(block: nn.Module, forward: object) -> bool:
    return getattr(forward, "func", None) is _KINDS[type(block).__name__].forward


def _runs_fused(block: nn.Module) -> bool:
    """Whether the block's forward, or what it wraps, is the fused one: functools.update_wrapper,
    which hooks use, keeps what is wrapped."""
    forward = block.__dict__.get("forward")
    while forward is not None:
        if _is_fused_forward(block, forward):
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False
