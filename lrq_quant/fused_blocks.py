"""Blocks of a quantized model in as few launches as their linears allow, without a compiler.

fuse_blocks(model) gives the blocks of FLUX and PixArt a forward that calls the fused ops: norm,
modulation, rotation and quantization in one launch; GELU, gate and residual in the GEMM; the two
inputs of a single block's last linear without their concatenation; what stands between the
projections and attention in one launch. It is for eager calls and CUDA graphs. torch.compile finds
the same by itself (lrq_kernels.fusion), in any model.

Against the unfused blocks, values stay in fp32 where those round to the model's type: from the
norm's input to the codes, from a linear's sum through GELU, and through gate and residual.

A call that asks for something else (an attention mask, an adapter on a linear, 16 bit activations,
image prompts) runs the block's own forward; fused_blocks() and check() say which blocks are ready.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, NamedTuple

from torch import nn

from lrq_kernels import LRQLinear

from . import fused_flux, fused_pixart
from .fused_projections import fuse_projections


class _Kind(NamedTuple):
    forward: Callable[..., Any]
    obstacle: Callable[[nn.Module], str | None]


_KINDS: dict[str, _Kind] = {
    "FluxTransformerBlock": _Kind(fused_flux.double_block, fused_flux.double_obstacle),
    "FluxSingleTransformerBlock": _Kind(fused_flux.single_block, fused_flux.single_obstacle),
    "BasicTransformerBlock": _Kind(fused_pixart.block, fused_pixart.obstacle),
}


def fuse_blocks(model: nn.Module) -> nn.Module:
    """Fuse the projections of `model`, then give its blocks a fused forward; returns the model.

    Blocks that cannot be fused stay as they are: fused_blocks() tells why. Raises ValueError where
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
    for block in blocks.values():
        kind = _KINDS[type(block).__name__]
        if kind.obstacle(block) is None:
            block.forward = MethodType(kind.forward, block)
    return model


def unfuse_blocks(model: nn.Module) -> nn.Module:
    """Give the blocks of `model` their own forward again. Projections stay fused."""
    for block in _blocks(model).values():
        if _is_fused(block):
            del block.forward
    return model


def fused_blocks(model: nn.Module) -> dict[str, str | None]:
    """Name of each block of a known kind -> None where it runs fused, else why it does not."""
    found = {}
    for name, block in _blocks(model).items():
        obstacle = _KINDS[type(block).__name__].obstacle(block)
        if obstacle is None and not _is_fused(block):
            obstacle = "fuse_blocks was not called"
        found[name] = obstacle
    return found


def _blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if type(m).__name__ in _KINDS}


def _is_fused(block: nn.Module) -> bool:
    forward = block.__dict__.get("forward")
    return getattr(forward, "__func__", None) is _KINDS[type(block).__name__].forward
