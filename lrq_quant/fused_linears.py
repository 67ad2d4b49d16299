"""What the fused blocks of all families ask of their linears, and how they call them."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from lrq_kernels import LRQLinear
from lrq_kernels.linear import has_hooks


def obstacle(block: nn.Module, quantized: tuple[str, ...]) -> str | None:
    """Why the linears of these names are not all quantized ones that can be called directly."""
    for name in quantized:
        try:
            linear = attrgetter(name)(block)
        except AttributeError:
            return f"it has no {name}"
        if type(linear) is not LRQLinear:
            return f"{name} is a {type(linear).__name__}"
        if linear.input_quantizer.act_bits == 16:
            return f"{name} runs with 16 bit activations"
        if has_hooks(linear):
            return f"{name} is moved by hooks"
    if block.training:
        return "it is in training mode"
    return None


def is_plain_layer_norm(norm: Any) -> bool:
    """Without weight and bias."""
    return type(norm) is nn.LayerNorm and not norm.elementwise_affine


def is_gelu_tanh(module: Any) -> bool:
    """torch's GELU, or the one of diffusers' feed-forward, which holds a linear too."""
    return type(module).__name__ == "GELU" and module.approximate == "tanh"


def quantized(linear: Any, x: Tensor, **epilogue: Any) -> Tensor:
    """The linear of x [..., K]; epilogue as in LRQLinear.from_quantized."""
    return linear.from_quantized(*linear.input_quantizer.quantize(x), x.dtype, **epilogue)


def normed(
    linear: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, **epilogue: Any
) -> Tensor:
    """The linear of LayerNorm(x) * (1 + scale) + shift, x [B, T, K], scale and shift [B, K]."""
    prepared = linear.input_quantizer.quantize_layer_norm(x, scale, shift, eps)
    return linear.from_quantized(*prepared, x.dtype, **epilogue)
