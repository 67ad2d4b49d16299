"""Fused forward of PixArt's blocks (diffusers' BasicTransformerBlock with norm "ada_norm_single").

norm1 + modulate + quantize -> attn1.to_qkv -> attention -> quantize -> attn1.to_out, + gate,
residual -> quantize -> attn2.to_q -> attention to the caption -> quantize -> attn2.to_out,
+ residual -> norm2 + modulate + quantize -> ff.net.0.proj, GELU -> quantize -> ff.net.2,
+ gate, residual
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .fused_linears import is_plain_layer_norm
from .fused_linears import obstacle as linear_obstacle

_LINEARS = (
    "attn1.to_qkv",
    "attn1.to_out.0",
    "attn2.to_q",
    "attn2.to_kv",
    "attn2.to_out.0",
    "ff.net.0.proj",
    "ff.net.2",
)


def obstacle(block: Any) -> str | None:
    """Why a block cannot run fused, None where it can."""
    if block.norm_type != "ada_norm_single" or block.attn2 is None:
        return f"its norm is {block.norm_type}"
    gelu = block.ff.net[0]
    if type(gelu).__name__ != "GELU" or getattr(gelu, "approximate", None) != "tanh":
        return "its activation is not GELU(tanh)"
    if not all(map(is_plain_layer_norm, (block.norm1, block.norm2))):
        return "a norm has weights"
    for name in ("attn1", "attn2"):
        if not _is_plain_attention(getattr(block, name)):
            return f"{name} is not plain attention"
    if block.pos_embed is not None or block.only_cross_attention or block._chunk_size is not None:
        return "it embeds positions, has no self-attention or a chunked feed-forward"
    return linear_obstacle(block, _LINEARS)


def _is_plain_attention(attn: Any) -> bool:
    absent = (attn.spatial_norm, attn.group_norm, attn.norm_q, attn.norm_k)
    plain = type(attn.processor).__name__ == "FusedAttnProcessor2_0" and not attn.norm_cross
    added = attn.residual_connection or attn.rescale_output_factor != 1
    return plain and not added and all(module is None for module in absent)


def block(
    self: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    """As BasicTransformerBlock.forward."""
    usual = encoder_hidden_states is not None and timestep is not None and hidden_states.ndim == 3
    if not usual or cross_attention_kwargs or obstacle(self) is not None:
        return type(self).forward(
            self,
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            cross_attention_kwargs,
            class_labels,
            added_cond_kwargs,
        )
    # The patch embedding of more than one token leaves channels apart, and the ops ask for rows.
    x, dtype = hidden_states.contiguous(), hidden_states.dtype
    table = self.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)  # type: ignore[union-attr]
    shift, scale, gate, ff_shift, ff_scale, ff_gate = table.unbind(dim=1)

    to_qkv = self.attn1.to_qkv
    quantized = to_qkv.input_quantizer.quantize_layer_norm(x, scale, shift, self.norm1.eps)
    q, k, v = to_qkv.from_quantized(*quantized, dtype).chunk(3, dim=-1)
    attended = _attend(self.attn1, q, k, v, attention_mask)
    x = _quantized(self.attn1.to_out[0], attended, residual=x, gate=gate)

    cross = self.attn2
    k, v = cross.to_kv(encoder_hidden_states).chunk(2, dim=-1)
    attended = _attend(cross, _quantized(cross.to_q, x), k, v, encoder_attention_mask)
    x = _quantized(cross.to_out[0], attended, residual=x)

    up, down = self.ff.net[0].proj, self.ff.net[2]
    quantized = up.input_quantizer.quantize_layer_norm(x, ff_scale, ff_shift, self.norm2.eps)
    inner = up.from_quantized(*quantized, dtype, activation="gelu_tanh")
    return _quantized(down, inner, residual=x, gate=ff_gate)


def _quantized(linear: Any, x: Tensor, **epilogue: Any) -> Tensor:
    return linear.from_quantized(*linear.input_quantizer.quantize(x), x.dtype, **epilogue)


def _attend(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, H * D] of q [B, T, H * D] and k, v [B, S, H * D]; mask [B, 1, S], added."""
    heads: Any = attn.heads
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        mask = mask[:, None].expand(-1, heads, -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)
