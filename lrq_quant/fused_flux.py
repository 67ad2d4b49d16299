"""Fused forwards of FLUX's blocks (diffusers' FluxTransformerBlock, FluxSingleTransformerBlock).

double block, of image and of context:
    norm1 + modulate + quantize -> to_qkv -> | norm, rope, join | attention
    quantize -> to_out, + gate, residual -> norm2 + modulate + quantize
    -> ff.net.0.proj, GELU -> quantize -> ff.net.2, + gate, residual
single block, of both as one sequence:
    norm + modulate + quantize -> to_qkv -> norm, rope -> attention
                               -> proj_mlp, GELU
    quantize [attention | mlp] -> proj_out, + gate, residual
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from lrq_kernels import ops

from . import ulysses
from .fused_linears import normed, quantized
from .fused_modulation import modulation
from .fused_readiness import is_gelu_tanh, is_plain_layer_norm, is_ready, obstacle, unless

_DOUBLE = (
    "attn.to_qkv",
    "attn.to_added_qkv",
    "attn.to_out.0",
    "attn.to_add_out",
    "ff.net.0.proj",
    "ff.net.2",
    "ff_context.net.0.proj",
    "ff_context.net.2",
)
_SINGLE = ("attn.to_qkv", "proj_mlp", "proj_out")
_FP16_LIMIT = 65504


def double_obstacle(block: Any) -> str | None:
    """Why a double block cannot run fused, None where it can."""
    norms = (block.norm1.norm, block.norm1_context.norm, block.norm2, block.norm2_context)
    gelus = (block.ff.net[0], block.ff_context.net[0])
    return (
        obstacle(block, _DOUBLE)
        or _attention_obstacle(block.attn, ("norm_q", "norm_k", "norm_added_q", "norm_added_k"))
        or unless(all(map(is_plain_layer_norm, norms)), "a norm has weights")
        or unless(all(map(is_gelu_tanh, gelus)), "its activation is not GELU(tanh)")
    )


def single_obstacle(block: Any) -> str | None:
    """Why a single block cannot run fused, None where it can."""
    found = obstacle(block, _SINGLE) or _attention_obstacle(block.attn, ("norm_q", "norm_k"))
    if found is None:
        shared = block.proj_mlp.input_quantizer.shared is block.attn.to_qkv.input_quantizer.shared
        found = (
            unless(shared, "to_qkv and proj_mlp do not share their input")
            or unless(is_plain_layer_norm(block.norm.norm), "its norm has weights")
            or unless(is_gelu_tanh(block.act_mlp), "its activation is not GELU(tanh)")
        )
    return found


def _attention_obstacle(attn: Any, names: tuple[str, ...]) -> str | None:
    processor = type(attn.processor).__name__
    norms = [getattr(attn, name) for name in names]
    plain = all(
        type(norm) is nn.RMSNorm
        and norm.eps == norms[0].eps is not None
        and (norm.weight is None) == (norms[0].weight is None)
        for norm in norms
    )
    return unless(processor == "FluxAttnProcessor", f"its processor is a {processor}") or unless(
        plain, "queries and keys are not normed as RMSNorm does"
    )


def _is_usual(hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> bool:
    """Whether the arguments of a block are what the kernels take."""
    dtype = hidden_states.dtype
    asks_gradients = torch.is_grad_enabled() and (
        hidden_states.requires_grad or encoder_hidden_states.requires_grad or temb.requires_grad
    )
    same = encoder_hidden_states.dtype == dtype and temb.dtype == dtype
    return same and temb.dim() == 2 and not asks_gradients


def double_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """As FluxTransformerBlock.forward."""
    usual = not joint_attention_kwargs and _is_usual(hidden_states, encoder_hidden_states, temb)
    if not usual or not is_ready(self, double_obstacle):
        return type(self).forward(
            self,
            hidden_states,
            encoder_hidden_states,
            temb,
            image_rotary_emb,
            joint_attention_kwargs,
        )
    attn = self.attn
    image, image_qkv = _normed_qkv(self.norm1, attn.to_qkv, hidden_states, temb)
    text, text_qkv = _normed_qkv(self.norm1_context, attn.to_added_qkv, encoder_hidden_states, temb)
    text_weights = (attn.norm_added_q.weight, attn.norm_added_k.weight)
    attended = _attend(attn, image_qkv, (*text_qkv, *text_weights), image_rotary_emb)
    length = encoder_hidden_states.shape[1]
    hidden_states = _rest_of_stream(
        (attn.to_out[0], self.norm2, self.ff), attended[:, length:], hidden_states, image
    )
    encoder_hidden_states = _rest_of_stream(
        (attn.to_add_out, self.norm2_context, self.ff_context),
        attended[:, :length],
        encoder_hidden_states,
        text,
    )
    if encoder_hidden_states.dtype == torch.float16:
        encoder_hidden_states = encoder_hidden_states.clip(-_FP16_LIMIT, _FP16_LIMIT)
    return encoder_hidden_states, hidden_states


def _normed_qkv(norm: Any, to_qkv: Any, x: Tensor, temb: Tensor) -> tuple[tuple[Tensor, ...], Any]:
    """The modulation of a stream after its first norm, and q, k and v."""
    shift, scale, *later = modulation(norm, temb, 6)
    return tuple(later), normed(to_qkv, x, scale, shift, norm.norm.eps).chunk(3, dim=-1)


def _rest_of_stream(
    modules: tuple[Any, Any, Any], attended: Tensor, x: Tensor, modulation: tuple[Tensor, ...]
) -> Tensor:
    """Output projection and feed-forward of one stream of a double block."""
    to_out, norm, ff = modules
    gate, shift, scale, ff_gate = modulation
    x = quantized(to_out, attended, residual=x, gate=gate)
    inner = normed(ff.net[0].proj, x, scale, shift, norm.eps, activation="gelu_tanh")
    return quantized(ff.net[2], inner, residual=x, gate=ff_gate)


def _attend(
    attn: Any,
    qkv: tuple[Tensor, ...],
    context: tuple[Tensor, ...] | None,
    image_rotary_emb: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """[B, T, H * D] of q, k, v [B, S, H * D], and those of a context before them, with the weights
    of its norms, by the backend, and among the processes, that the processor is set to."""
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    q, k, v = qkv
    context_q, context_k, context_v, context_q_weight, context_k_weight = context or (None,) * 5
    weights = (attn.norm_q.weight, attn.norm_k.weight, context_q_weight, context_k_weight)
    rotary = image_rotary_emb or (None, None)
    streams = (context_q, context_k, context_v, *weights, *rotary, attn.heads, attn.norm_q.eps)
    backend, config = attn.processor._attention_backend, attn.processor._parallel_config
    attend = functools.partial(dispatch_attention_fn, backend=backend)
    group = ulysses.group_of(config, attn.heads)
    if group is not None:
        return ulysses.attention((q, k, v, *streams), attend, group)
    # Alone, v is what attention takes already.
    q, k, joint_v = ops.qk_norm_rope(q, k, v if context else None, *streams)
    v = joint_v if context else v.unflatten(-1, (attn.heads, -1))
    return attend(q, k, v, parallel_config=config).flatten(2, 3)


def single_block(
    self: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """As FluxSingleTransformerBlock.forward."""
    usual = not joint_attention_kwargs and _is_usual(hidden_states, encoder_hidden_states, temb)
    if not usual or not is_ready(self, single_obstacle):
        return type(self).forward(
            self,
            hidden_states,
            encoder_hidden_states,
            temb,
            image_rotary_emb,
            joint_attention_kwargs,
        )
    attn = self.attn
    x = joined(encoder_hidden_states, hidden_states)
    shift, scale, gate = modulation(self.norm, temb, 3)
    prepared = attn.to_qkv.input_quantizer.quantize_layer_norm(x, scale, shift, self.norm.norm.eps)
    qkv = attn.to_qkv.from_quantized(*prepared, x.dtype).chunk(3, dim=-1)
    mlp = self.proj_mlp.from_quantized(*prepared, x.dtype, activation="gelu_tanh")
    attended = _attend(attn, qkv, None, image_rotary_emb)
    prepared = self.proj_out.input_quantizer.quantize_concat(attended, mlp)
    x = self.proj_out.from_quantized(*prepared, x.dtype, residual=x, gate=gate)
    if x.dtype == torch.float16:
        x = x.clip(-_FP16_LIMIT, _FP16_LIMIT)
    length = encoder_hidden_states.shape[1]
    return x[:, :length], x[:, length:]


def joined(context: Tensor, image: Tensor) -> Tensor:
    """[context | image] along the tokens [B, T, K]: without a copy where the two are the parts of
    one tensor already, as one single block hands them to the next.

    Strides and offsets of both are those that slicing one contiguous tensor gives, in one storage:
    every element of the result is then where torch.cat would have read it. Nothing writes to it."""
    batch, length, channels = context.shape
    alike = image.shape[0] == batch and image.shape[2] == channels and image.dtype == context.dtype
    if torch.compiler.is_compiling() or not alike:
        return torch.cat([context, image], dim=1)
    total = length + image.shape[1]
    strides = (total * channels, channels, 1)
    parts_of_one = (
        context.untyped_storage().data_ptr() == image.untyped_storage().data_ptr()
        and image.storage_offset() == context.storage_offset() + length * channels
        and all(t.stride()[1:] == strides[1:] for t in (context, image))
        and (batch == 1 or context.stride(0) == image.stride(0) == strides[0])
    )
    if not parts_of_one:
        return torch.cat([context, image], dim=1)
    return context.as_strided((batch, total, channels), strides)
