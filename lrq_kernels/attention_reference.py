"""The arithmetic of lrq::qk_norm_rope in plain PyTorch: the CPU kernel and the tests' oracle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _normed(x: Tensor, weight: Tensor | None, heads: int, eps: float, norm: str) -> Tensor:
    """x [B, S, H*D] normalized, [B, S, H, D]."""
    by_head = x.unflatten(-1, (heads, x.shape[-1] // heads))
    if norm == "none":
        return by_head
    v = x if norm == "rms_across_heads" else by_head
    wide = v.to(torch.promote_types(x.dtype, torch.float32))
    y = wide * (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    if weight is not None:
        if norm == "rms_rounded" and x.dtype != torch.float64:
            y = y.to(weight.dtype)
        y = y * weight
    return y.to(x.dtype).view(by_head.shape)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, rope: str) -> Tensor:
    """x [B, T, H, D] with pairs of channels turned by the angles of cos, sin [T, D]."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if rope == "half":
        first, second = wide.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        first, second = wide.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)
    return (wide * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    context_q: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    context_q_weight: Tensor | None,
    context_k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
    norm: str,
    rope: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the projections of one or two streams to what attention takes, q and k normalized and
    rotated: q, k, v [B, T, H, D], contiguous, T = S_context + S, the context first.

    q, k, v [B, S, H*D] and context_q, context_k, context_v [B, S_context, H*D] (both or neither
    stream): of one dtype, last stride 1, and so parts of one fused projection as they are. v None:
    nothing is done for it and the third result is empty, [0].

    norm  "rms"               x / sqrt(mean x^2 + eps) * weight over a head, weight [D]: as
                              torch.nn.RMSNorm(D), in fp32 and rounded once, at its end
          "rms_rounded"       the same, rounded to the weight's dtype before the product with it
                              too: diffusers' RMSNorm, of Qwen-Image and SD3.5
          "rms_across_heads"  as "rms" over all H*D channels of a token, weight [H*D]: Wan, LTX
          "none"              no norm and no weights
    The weights of q and k, and of a context with them, are all given or all None; of x's dtype or
    fp32.

    rope, with cos and sin fp32 [T, D] (None: no rotation), of the whole joint sequence; a token
    that is not to be rotated has cos 1 and sin 0:
          "interleaved"       channels 2i and 2i + 1 are a pair
          "half"              channels i and i + D/2 are a pair
    Of a pair (a, b) in fp32, from the norm's rounded result, each product, then the sum rounded to
    fp32, then once to the dtype: (a * cos_a - b * sin_a, b * cos_b + a * sin_b).

    These are the roundings of diffusers in eager mode, bit for bit on a CPU; on a GPU sums and
    square roots may differ in their last bit. fp64 input is computed in fp64 throughout, without
    any roundings.
    """
    q_out, k_out = _normed(q, q_weight, heads, eps, norm), _normed(k, k_weight, heads, eps, norm)
    v_out = None if v is None else v.unflatten(-1, (heads, v.shape[-1] // heads))
    if context_q is not None and context_k is not None:
        before_q = _normed(context_q, context_q_weight, heads, eps, norm)
        before_k = _normed(context_k, context_k_weight, heads, eps, norm)
        q_out, k_out = torch.cat([before_q, q_out], dim=1), torch.cat([before_k, k_out], dim=1)
        if context_v is not None and v_out is not None:
            v_out = torch.cat(
                [context_v.view(*context_v.shape[:2], *v_out.shape[2:]), v_out], dim=1
            )
    if cos is not None and sin is not None:
        q_out, k_out = (_rotated(x, cos, sin, rope) for x in (q_out, k_out))
    empty = q.new_empty(0) if v_out is None else _fresh(v_out, v)
    return _fresh(q_out, q), _fresh(k_out, k), empty


def qk_norm_rope_parts(*arguments: Any) -> Tensor:
    """q, k and v of qk_norm_rope(*arguments[:-1]) in one tensor [parts, B, T, 3, H / parts, D],
    parts = arguments[-1]: side by side for each token the three of one part of the heads, as it is
    sent to the process that attends with those heads. v must be given, parts divide the heads."""
    *given, parts = arguments
    by_part = [x.unflatten(2, (parts, -1)) for x in qk_norm_rope(*given)]
    return torch.stack(by_part, dim=3).permute(2, 0, 1, 3, 4, 5).contiguous()


def _fresh(out: Tensor, x: Tensor | None) -> Tensor:
    """`out` contiguous and not in the memory of x: an op must not return its input."""
    shares = x is not None and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    return out.clone(memory_format=torch.contiguous_format) if shares else out.contiguous()
