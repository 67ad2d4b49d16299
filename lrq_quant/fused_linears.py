"""What a fused block asks of its linears before it calls their kernels itself."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import nn

from lrq_kernels import LRQLinear


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
        if "_diffusers_hook" in linear.__dict__ or "_hf_hook" in linear.__dict__:
            return f"{name} is moved by hooks"
    if block.training:
        return "it is in training mode"
    return None


def is_plain_layer_norm(norm: Any) -> bool:
    """Without weight and bias."""
    return type(norm) is nn.LayerNorm and not norm.elementwise_affine
