"""Triton kernel of lrq::qk_norm_rope: what lies between the projections and attention, in one pass.

A program takes GROUP heads of one token, of q, k and v alike, so that cos and sin are read once for
all of them. A thread holds both channels of each of its pairs: interleaved they are neighbours in
one load, in halves each half is a load of its own. Nothing but sums of squares goes between
threads. attention_reference.py has the arithmetic; its roundings need products that are not fused
with sums (enable_fp_fusion).

Arguments are validated by ops.py; the functions here trust them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a token, for each warp, where a program takes all its heads: 32 for each thread.
_MOST_CHANNELS = 1024


@triton.jit
def _mask(heads, columns, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr):
    """Where there are channels, or None where there are everywhere. columns [1, C], of D."""
    if HEADS % GROUP != 0:
        if columns.shape[1] != D:
            mask = (heads < HEADS) & (columns < D)
        else:
            mask = (heads < HEADS) & (columns >= 0)
    elif columns.shape[1] != D:
        mask = (heads >= 0) & (columns < D)
    else:
        mask = None
    return mask


@triton.jit
def _load(row, heads, first, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, WIDTH, C):
    """Channels first..first + WIDTH of heads [R, 1]: [R, C], zero where there are none."""
    columns = tl.arange(0, C)[None, :]
    mask = _mask(heads, columns, HEADS, GROUP, WIDTH)
    pointers = row + (heads * D + first + columns)
    if mask is None:
        x = tl.load(pointers)
    else:
        x = tl.load(pointers, mask=mask, other=0.0)
    return x


@triton.jit
def _load_pairs(
    row,
    heads,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Both members of each pair of heads [R, 1]: two tiles [R, PAIRS], as they are in memory."""
    if HALF:
        a = _load(row, heads, 0, HEADS, GROUP, D, D // 2, PAIRS)
        b = _load(row, heads, D // 2, HEADS, GROUP, D, D // 2, PAIRS)
    else:
        x = _load(row, heads, 0, HEADS, GROUP, D, D, 2 * PAIRS)
        a, b = tl.split(tl.reshape(x, [x.shape[0], PAIRS, 2]))
    return a, b


@triton.jit
def _store(row, starts, heads, first, x, HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH):
    """starts [R, 1]: of the heads, from row."""
    columns = tl.arange(0, x.shape[1])[None, :]
    mask = _mask(heads, columns, HEADS, GROUP, WIDTH)
    pointers = row + (starts + first + columns)
    if mask is None:
        tl.store(pointers, x)
    else:
        tl.store(pointers, x, mask=mask)


@triton.jit
def _norm_rope_store(
    out_row,
    starts,
    heads,
    a,
    b,
    weight_ptr,
    cos_a,
    cos_b,
    sin_a,
    sin_b,
    eps,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    HALF: tl.constexpr,
):
    """Pairs a, b [GROUP, PAIRS] of q or k -> norm -> rotation -> memory."""
    dtype = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    if NORM != "none":
        square_sum = tl.sum(a * a + b * b, axis=1, keep_dims=True)
        if NORM == "rms_across_heads":
            square_sum = tl.sum(square_sum, axis=0, keep_dims=True)
            inverse = tl.rsqrt(square_sum * (1.0 / (HEADS * D)) + eps)
        else:
            inverse = tl.rsqrt(square_sum * (1.0 / D) + eps)
        a, b = a * inverse, b * inverse
        if weight_ptr is not None:
            if NORM == "rms_across_heads":
                wa, wb = _load_pairs(weight_ptr, heads, HEADS, GROUP, D, PAIRS, HALF)
            else:
                first = tl.zeros([GROUP, 1], tl.int32)
                wa, wb = _load_pairs(weight_ptr, first, GROUP, GROUP, D, PAIRS, HALF)
            if NORM == "rms_rounded":
                a, b = a.to(wa.dtype).to(tl.float32), b.to(wb.dtype).to(tl.float32)
            a, b = a * wa.to(tl.float32), b * wb.to(tl.float32)
        a, b = a.to(dtype).to(tl.float32), b.to(dtype).to(tl.float32)
    if ROPE:
        a, b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    a, b = a.to(dtype), b.to(dtype)
    if HALF:
        _store(out_row, starts, heads, 0, a, HEADS, GROUP, D // 2)
        _store(out_row, starts, heads, D // 2, b, HEADS, GROUP, D // 2)
    else:
        x = tl.reshape(tl.join(a, b), [GROUP, 2 * PAIRS])
        _store(out_row, starts, heads, 0, x, HEADS, GROUP, D)


@triton.jit(do_not_specialize=["context_tokens", "tokens"])
def qk_norm_rope_kernel(
    q_ptr,  # [B, tokens - context_tokens, H * D] of these strides, as k and v
    k_ptr,
    v_ptr,  # or None
    sample_stride,
    row_stride,
    context_q_ptr,  # [B, context_tokens, H * D], or None
    context_k_ptr,
    context_v_ptr,
    context_sample_stride,
    context_row_stride,
    q_weight_ptr,  # [D], or [H * D] for "rms_across_heads", or None
    k_weight_ptr,
    context_q_weight_ptr,
    context_k_weight_ptr,
    cos_ptr,  # [tokens, D] fp32, or None
    sin_ptr,
    q_out_ptr,  # [B, tokens, H, D], or of all three [PARTS, B, tokens, 3, H / PARTS, D]
    k_out_ptr,
    v_out_ptr,
    part_stride,
    part_offsets_ptr,  # int64 [PARTS], in elements, in place of part_stride, or None
    context_tokens,
    tokens,  # of the joint sequence
    eps,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    PAIRS: tl.constexpr,  # of a head, D / 2, rounded up to a power of two
    NORM: tl.constexpr,
    HALF: tl.constexpr,
    PARTS: tl.constexpr,
):
    """q, k = rope(norm([context | image])), v = [context | image] of one token's GROUP heads."""
    GROUPS: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    ROPE: tl.constexpr = cos_ptr is not None
    token = tl.program_id(0) // GROUPS
    heads = (tl.program_id(0) % GROUPS) * GROUP + tl.arange(0, GROUP)[:, None]
    sample, position = (token // tokens).to(tl.int64), token % tokens

    offset = sample * sample_stride + (position - context_tokens).to(tl.int64) * row_stride
    q_row, k_row = q_ptr + offset, k_ptr + offset
    q_weight, k_weight = q_weight_ptr, k_weight_ptr
    if v_ptr is not None:
        v_row = v_ptr + offset
    if context_q_ptr is not None:
        if position < context_tokens:
            offset = sample * context_sample_stride + position.to(tl.int64) * context_row_stride
            q_row, k_row = context_q_ptr + offset, context_k_ptr + offset
            if v_ptr is not None:
                v_row = context_v_ptr + offset
            if q_weight_ptr is not None:
                q_weight, k_weight = context_q_weight_ptr, context_k_weight_ptr

    # All loads first: a store could be to what a later load reads, so none would move above it.
    qa, qb = _load_pairs(q_row, heads, HEADS, GROUP, D, PAIRS, HALF)
    ka, kb = _load_pairs(k_row, heads, HEADS, GROUP, D, PAIRS, HALF)
    if v_ptr is not None:
        v = _load(v_row, heads, 0, HEADS, GROUP, D, D, 2 * PAIRS)
    cos_a, cos_b, sin_a, sin_b = None, None, None, None
    if ROPE:
        first = tl.zeros([GROUP, 1], tl.int32)
        angles = position.to(tl.int64) * D
        cos_a, cos_b = _load_pairs(cos_ptr + angles, first, GROUP, GROUP, D, PAIRS, HALF)
        sin_a, sin_b = _load_pairs(sin_ptr + angles, first, GROUP, GROUP, D, PAIRS, HALF)

    if PARTS == 1:
        out = token.to(tl.int64) * (HEADS * D)
        starts = heads * D
    else:
        LOCAL: tl.constexpr = HEADS // PARTS
        out = token.to(tl.int64) * (3 * LOCAL * D)
        part = heads // LOCAL
        if part_offsets_ptr is None:
            starts = part.to(tl.int64) * part_stride
        else:
            # As far apart as allocations are, so stores are as wide as in one.
            starts = tl.load(part_offsets_ptr + part, mask=part < PARTS, other=0)
            starts = tl.multiple_of(starts, [16, 16])
        starts += (heads % LOCAL) * D
    if v_ptr is not None:
        _store(v_out_ptr + out, starts, heads, 0, v, HEADS, GROUP, D)
    _norm_rope_store(
        q_out_ptr + out,
        starts,
        heads,
        qa,
        qb,
        q_weight,
        cos_a,
        cos_b,
        sin_a,
        sin_b,
        eps,
        HEADS,
        GROUP,
        D,
        PAIRS,
        NORM,
        ROPE,
        HALF,
    )
    _norm_rope_store(
        k_out_ptr + out,
        starts,
        heads,
        ka,
        kb,
        k_weight,
        cos_a,
        cos_b,
        sin_a,
        sin_b,
        eps,
        HEADS,
        GROUP,
        D,
        PAIRS,
        NORM,
        ROPE,
        HALF,
    )


class Launch(NamedTuple):
    """group: heads of a program, a power of two."""

    group: int
    num_warps: int


@functools.cache
def padded_pairs(head_dim: int) -> int:
    return triton.next_power_of_2(head_dim // 2)


@functools.cache
def select_launch(heads: int, head_dim: int, norm: str) -> Launch:
    """Twice as many threads as a head has channels: Triton then loads cos, sin and weights where
    they are used, while for fewer threads it sends them through shared memory, at two barriers a
    vector. Then a thread has 16 bytes of 16 heads, or 8 of 8 where that leaves fewer heads idle in
    the last group. All heads of a token where the norm needs them.
    """
    width = 2 * padded_pairs(head_dim)
    num_warps = max(1, 2 * width // 32)
    if norm == "rms_across_heads":
        group = triton.next_power_of_2(heads)
        return Launch(group, min(16, max(num_warps, group * width // _MOST_CHANNELS)))
    groups = [min(size, triton.next_power_of_2(heads)) for size in (16, 8)]
    return Launch(min(groups, key=lambda group: triton.cdiv(heads, group) * group), num_warps)


class _Stream(NamedTuple):
    """q, k, v [B, S, H*D] of the same strides."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    sample_stride: int
    row_stride: int

    @staticmethod
    def of(q: Tensor | None, k: Tensor | None, v: Tensor | None) -> _Stream:
        if q is None or k is None:
            return _Stream(None, None, None, 0, 0)
        if q.stride() != k.stride() or (v is not None and q.stride() != v.stride()):
            q, k = q.contiguous(), k.contiguous()
            v = None if v is None else v.contiguous()
        return _Stream(q, k, v, q.stride(0), q.stride(1))


def qk_norm_rope(*arguments: Any, launch: Launch | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """lrq::qk_norm_rope on a GPU; see attention_reference.py. One launch; q, k and v of a stream
    whose strides differ from each other are copied first. launch: for benchmarks."""
    q, v, heads = arguments[0], arguments[2], arguments[12]
    shape = (q.shape[0], _joint_tokens(arguments), heads, q.shape[2] // heads)
    q_out = torch.empty(shape, dtype=q.dtype, device=q.device)
    k_out = torch.empty_like(q_out)
    v_out = torch.empty((0,) if v is None else shape, dtype=q.dtype, device=q.device)
    _run(arguments, (q_out, k_out, v_out), 1, launch)
    return q_out, k_out, v_out


def qk_norm_rope_parts(*arguments: Any) -> Tensor:
    """lrq::qk_norm_rope_parts on a GPU; see attention_reference.py."""
    *given, parts = arguments
    q, heads = given[0], given[12]
    shape = (parts, q.shape[0], _joint_tokens(given), 3, heads // parts, q.shape[2] // heads)
    out = torch.empty(shape, dtype=q.dtype, device=q.device)
    _run(given, out.unbind(3), parts)
    return out


def write_parts(given: Sequence[Any], first: Tensor, parts: int, offsets: Tensor) -> None:
    """As qk_norm_rope_parts of (*given, parts), each part to its own memory.

    first [B, T, 3, H / parts, D], contiguous: any of the parts; offsets int64 [parts]: elements
    from there to each part, multiples of 16. The others may be in memory of other GPUs."""
    _run(given, first.unbind(2), parts, part_offsets=offsets)


def _joint_tokens(arguments: Sequence[Any]) -> int:
    q, context_q = arguments[0], arguments[3]
    return q.shape[1] + (0 if context_q is None else context_q.shape[1])


def _run(
    arguments: Sequence[Any],
    outputs: Sequence[Tensor],
    parts: int,
    launch: Launch | None = None,
    part_offsets: Tensor | None = None,
) -> None:
    """arguments: of lrq::qk_norm_rope. outputs: q, k, v [B, T, H, D], or where there are several
    parts [parts, B, T, H / parts, D], which lie as in one tensor [parts, B, T, 3, H / parts, D].
    part_offsets: see write_parts."""
    q, k, v, *of_context, heads, eps, norm, rope = arguments
    context, vectors = of_context[:3], of_context[3:]
    q_out, k_out, v_out = outputs
    if q_out.numel() == 0:
        return
    tokens, head_dim = _joint_tokens(arguments), q.shape[2] // heads
    group, num_warps = launch or select_launch(heads, head_dim, norm)
    with torch.cuda.device_of(q_out):
        qk_norm_rope_kernel[(q.shape[0] * tokens * triton.cdiv(heads, group),)](
            *_Stream.of(q, k, v),
            *_Stream.of(*context),
            *vectors,
            q_out,
            k_out,
            v_out,
            0 if parts == 1 else q_out.stride(0),
            part_offsets,
            tokens - q.shape[1],
            tokens,
            eps,
            HEADS=heads,
            GROUP=group,
            D=head_dim,
            PAIRS=padded_pairs(head_dim),
            NORM=norm,
            HALF=rope == "half",
            PARTS=parts,
            num_warps=num_warps,
            enable_fp_fusion=False,
        )
