"""How the fused blocks of all families call their linears."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def quantized(linear: Any, x: Tensor, **epilogue: Any) -> Tensor:
    """The linear of x [..., K]; epilogue as in LRQLinear.from_quantized."""
    return linear.from_quantized(*linear.input_quantizer.quantize(x), x.dtype, **epilogue)


def normed(
    linear: Any, x: Tensor, scale: Tensor, shift: Tensor, eps: float, **epilogue: Any
) -> Tensor:
    """The linear of LayerNorm(x) * (1 + scale) + shift, x [B, T, K], scale and shift [B, K]."""
    prepared = linear.input_quantizer.quantize_layer_norm(x, scale, shift, eps)
    return linear.from_quantized(*prepared, x.dtype, **epilogue)
