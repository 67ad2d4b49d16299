"""Fused forward of PixArt's blocks (diffusers' BasicTransformerBlock with norm "ada_norm_single").

norm1 + modulate + quantize -> attn1.to_qkv -> attention -> quantize -> attn1.to_out, + gate,
residual -> quantize -> attn2.to_q -> attention to the caption -> quantize -> attn2.to_out,
+ residual -> norm2 + modulate + quantize -> ff.net.0.proj, GELU -> quantize -> ff.net.2,
+ gate, residual
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fused_readiness
from .fused_linears import normed, quantized
from .fused_readiness import is_gelu_tanh, is_plain_layer_norm, is_ready

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
    if not is_gelu_tanh(block.ff.net[0]):
        return "its activation is not GELU(tanh)"
    if not all(map(is_plain_layer_norm, (block.norm1, block.norm2))):
        return "a norm has weights"
    for name in ("attn1", "attn2"):
        if not _is_plain_attention(getattr(block, name)):
            return f"{name} is not plain attention"
    if block.pos_embed is not None or block.only_cross_attention or block._chunk_size is not None:
        return "it embeds positions, has no self-attention or a chunked feed-forward"
    return fused_readiness.obstacle(block, _LINEARS)


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
    masks = (attention_mask, encoder_attention_mask)
    usual = not cross_attention_kwargs and _is_usual(
        self, hidden_states, encoder_hidden_states, timestep, masks
    )
    if not usual or not is_ready(self, obstacle):
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
    x = hidden_states.contiguous()
    table = self.scale_shift_table[None] + timestep.reshape(x.shape[0], 6, -1)  # type: ignore[union-attr]
    shift, scale, gate, ff_shift, ff_scale, ff_gate = table.unbind(dim=1)

    q, k, v = normed(self.attn1.to_qkv, x, scale, shift, self.norm1.eps).chunk(3, dim=-1)
    attended = _attend(self.attn1, q, k, v, attention_mask)
    x = quantized(self.attn1.to_out[0], attended, residual=x, gate=gate)

    cross = self.attn2
    k, v = cross.to_kv(encoder_hidden_states).chunk(2, dim=-1)
    attended = _attend(cross, quantized(cross.to_q, x), k, v, encoder_attention_mask)
    x = quantized(cross.to_out[0], attended, residual=x)

    up, down = self.ff.net[0].proj, self.ff.net[2]
    inner = normed(up, x, ff_scale, ff_shift, self.norm2.eps, activation="gelu_tanh")
    return quantized(down, inner, residual=x, gate=ff_gate)


def _is_usual(
    block: Any,
    x: Tensor,
    caption: Tensor | None,
    timestep: Tensor | None,
    masks: tuple[Tensor | None, Tensor | None],
) -> bool:
    """Whether the arguments of a block are what the kernels take: one dtype and no gradients, masks
    [B, 1, keys] that are added. diffusers pads shorter ones and takes others."""
    if caption is None or timestep is None or x.dim() != 3 or caption.dim() != 3:
        return False
    sources = (x, caption, timestep, block.scale_shift_table)
    if any(source.dtype != x.dtype for source in sources):
        return False
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return False
    return all(
        mask is None or tuple(mask.shape) == (x.shape[0], 1, keys.shape[1])
        for mask, keys in zip(masks, (x, caption), strict=True)
    )


def _attend(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, H * D] of q [B, T, H * D] and k, v [B, S, H * D]; mask [B, 1, S], added."""
    heads: Any = attn.heads
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    if mask is not None:
        mask = mask[:, None].expand(-1, heads, -1, -1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)
