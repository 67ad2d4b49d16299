"""Checks of the arguments of every op: one sentence naming op, argument, expected and got.

The CPU kernels, the fakes and the Triton launchers run these; csrc/ops.cpp has the same in C++.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .codebook import MAX_SHARED_TABLES
from .packing import packed_words
from .reference import TILE
from .scheme import BLOCK_SIZES, DUAL_BLOCK_SIZE, ROTATIONS, SCALE_MODES, WEIGHT_BITS

GEMM_ACTIVATIONS = ("none", "gelu_tanh")
ACTIVATIONS = ("gelu_tanh", "gelu_erf", "silu")
NORMS = ("layer", "rms")
TOKEN_NORMS = ("none", *NORMS)
HEAD_NORMS = ("none", "rms", "rms_rounded", "rms_across_heads")
ROPES = ("interleaved", "half")
MAX_HEAD_DIM = 256
GEMV_MAX_ROWS = 16
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# float64 exists on the CPU only, as the oracle of the tests.
ORACLE_DTYPES = (*FLOAT_DTYPES, torch.float64)


def fail(op: str, argument: str, expected: str, got: object) -> None:
    raise ValueError(f"lrq::{op}: {argument} must be {expected}, got {got}")


def check_tensor(
    op: str, argument: str, tensor: Tensor, dtype: torch.dtype, shape: tuple, device: torch.device
) -> None:
    """One contiguous tensor of known dtype, shape and device."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        fail(op, argument, f"{dtype} {list(shape)}", f"{tensor.dtype} {list(tensor.shape)}")
    if tensor.device != device:
        fail(op, argument, f"on {device}", f"a tensor on {tensor.device}")
    if not tensor.is_contiguous():
        fail(op, argument, "contiguous", f"strides {tensor.stride()}")


def check_rows(op: str, argument: str, tensor: Tensor) -> None:
    """[M, N] whose rows are of one piece."""
    if tensor.numel() and tensor.shape[1] > 1 and tensor.stride(1) != 1:
        fail(op, argument, "of last stride 1", f"strides {tensor.stride()}")


def check_optional(op: str, argument: str, tensor: Tensor | None, *rest: object) -> None:
    if tensor is not None:
        check_tensor(op, argument, tensor, *rest)  # type: ignore[arg-type]


def check_choice(op: str, argument: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        fail(op, argument, f"one of {allowed}", repr(value))


def check_tokens(op: str, argument: str, x: Tensor) -> None:
    """[..., K] of floating point whose last dimension is of one piece."""
    check_choice(op, f"dtype of {argument}", x.dtype, ORACLE_DTYPES)
    if x.dim() == 0:
        fail(op, argument, "of at least one dimension, [..., K]", "a scalar")
    if x.numel() and x.shape[-1] > 1 and x.stride(-1) != 1:
        fail(op, argument, "of last stride 1", f"strides {x.stride()}")


def check_like(op: str, argument: str, tensor: Tensor, x: Tensor, shape: tuple) -> None:
    """A second source of tokens: the type and the device of the first, and `shape`."""
    if tensor.dtype != x.dtype or tuple(tensor.shape) != shape:
        expected = f"{x.dtype} {list(shape)}"
        fail(op, argument, expected, f"{tensor.dtype} {list(tensor.shape)}")
    if tensor.device != x.device:
        fail(op, argument, f"on {x.device}", f"a tensor on {tensor.device}")
    check_tokens(op, argument, tensor)


def check_rotation(
    op: str,
    in_features: int,
    device: torch.device,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
) -> None:
    check_choice(op, "rotation", rotation, ROTATIONS)
    if rotation != "none":
        allowed = (DUAL_BLOCK_SIZE,) if rotation == "dual" else BLOCK_SIZES
        check_choice(op, "block_size", block_size, allowed)
        if in_features % block_size:
            expected = f"a multiple of block_size {block_size}"
            fail(op, "K", expected, in_features)
    if (matrices is not None) != (rotation == "dual"):
        expected = "given exactly when rotation is 'dual'"
        fail(op, "matrices", expected, f"{rotation!r} with{'' if matrices is not None else 'out'}")
    f32, shape = torch.float32, (in_features,)
    check_channel_scale(op, channel_scale, rotation, in_features, device)
    check_optional(op, "permutation", permutation, torch.int32, shape, device)
    check_optional(op, "matrices", matrices, f32, (2, DUAL_BLOCK_SIZE, DUAL_BLOCK_SIZE), device)


def check_channel_scale(
    op: str,
    channel_scale: Tensor | None,
    rotation: str,
    in_features: int,
    device: torch.device,
) -> None:
    """[K], fp32, or bf16 but in front of a "dual" rotation, which rounds nothing."""
    if channel_scale is not None:
        dtype = channel_scale.dtype
        allowed = (torch.float32,) if rotation == "dual" else (torch.float32, torch.bfloat16)
        check_choice(op, "dtype of channel_scale", dtype, allowed)
        check_tensor(op, "channel_scale", channel_scale, dtype, (in_features,), device)


def check_rotate(
    op: str,
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
) -> None:
    check_tokens(op, "x", x)
    vectors = (channel_scale, permutation, matrices)
    check_rotation(op, x.shape[-1], x.device, *vectors, rotation, block_size)


def check_rotate_quantize(x: Tensor, *rest):  # type: ignore[no-untyped-def]
    check_rotate("rotate_quantize", x, *rest[:-3])
    check_quantize("rotate_quantize", *rest[-3:])


def check_concat_rotate_quantize(first: Tensor, second: Tensor, *rest):  # type: ignore[no-untyped-def]
    op = "concat_rotate_quantize"
    check_tokens(op, "first", first)
    # Any width, but the tokens of `first`; a scalar has no width.
    width = second.shape[-1:] if second.dim() else (0,)
    check_like(op, "second", second, first, (*first.shape[:-1], *width))
    check_rotation(op, first.shape[-1] + second.shape[-1], first.device, *rest[:-3])
    check_quantize(op, *rest[-3:])


def check_activation_rotate_quantize(  # type: ignore[no-untyped-def]
    x: Tensor, gate: Tensor | None, activation: str, *rest
):
    op, *rotation = "activation_rotate_quantize", *rest[:-4]
    check_choice(op, "activation", activation, ACTIVATIONS)
    check_rotate(op, x, *rotation)
    if gate is not None:
        check_like(op, "gate", gate, x, tuple(x.shape))
    check_quantize(op, *rest[-4:-1])


def check_norm_modulate_rotate_quantize(  # type: ignore[no-untyped-def]
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    eps: float,
    *rest,
):
    op, *rotation = "norm_modulate_rotate_quantize", *rest[:-4]
    check_choice(op, "norm", norm, NORMS)
    if not 0 <= eps < float("inf"):
        fail(op, "eps", "finite and not negative", eps)
    if x.dim() not in (2, 3):
        fail(op, "x", "[B, T, K] or [M, K]", f"shape {list(x.shape)}")
    check_rotate(op, x, *rotation)
    samples, in_features = x.shape[0] if x.dim() == 3 else 1, x.shape[-1]
    for argument, vector in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None:
            dtype = torch.float32 if vector.dtype == torch.float32 else x.dtype
            check_tensor(op, argument, vector, dtype, (in_features,), x.device)
    for argument, vector in (("scale", scale), ("shift", shift)):
        if vector is not None:
            check_modulation(op, argument, vector, x, (samples, in_features))
    check_quantize(op, *rest[-4:-1])


def check_modulation(op: str, argument: str, vector: Tensor, x: Tensor, shape: tuple) -> None:
    """[B, K] of x's type or fp32, rows of one piece anywhere: a chunk of a wider vector."""
    if vector.dtype not in (x.dtype, torch.float32) or tuple(vector.shape) != shape:
        expected = f"{x.dtype} or torch.float32 {list(shape)}"
        fail(op, argument, expected, f"{vector.dtype} {list(vector.shape)}")
    if vector.device != x.device:
        fail(op, argument, f"on {x.device}", f"a tensor on {vector.device}")
    check_rows(op, argument, vector)


def check_quantize(op: str, act_bits: int, scale_mode: str, scale_factor: float) -> None:
    check_choice(op, "act_bits", act_bits, (4, 8))
    check_choice(op, "scale_mode", scale_mode, SCALE_MODES)
    if not 0 < scale_factor < float("inf"):
        fail(op, "scale_factor", "positive and finite", scale_factor)


def weight_shape(out_features: int, in_features: int, weight_bits: int) -> tuple[int, ...]:
    return (-(-out_features // TILE), -(-in_features // TILE), 2, 256 * weight_bits)


def check_rotate_rows(
    x: Tensor,
    second: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    eps: float,
    channel_scale: Tensor | None,
    block_size: int,
    act_bits: int,
    scale_mode: str,
    scale_factor: float,
) -> int:
    """Checks the arguments and returns K."""
    op = "_rotate_rows"
    check_choice(op, "dtype of x", x.dtype, ORACLE_DTYPES)
    in_features = 0
    for name, source in (("x", x), ("second", second)):
        if source is None:
            continue
        if source.dtype != x.dtype or source.dim() not in (2, 3):
            got = f"{source.dtype} {list(source.shape)}"
            fail(op, name, f"{x.dtype} [M, K] or [B, T, K]", got)
        if source.numel() and source.stride(-1) != 1:
            fail(op, name, "of last stride 1", f"strides {source.stride()}")
        if source.shape[:-1] != x.shape[:-1]:
            expected = f"of as many rows as x, {list(x.shape)}"
            fail(op, name, expected, f"shape {list(source.shape)}")
        if source.device != x.device:
            fail(op, name, f"on {x.device}", f"a tensor on {source.device}")
        in_features += source.shape[-1]
    check_choice(op, "norm", norm, TOKEN_NORMS)
    check_choice(op, "block_size", block_size, BLOCK_SIZES)
    if in_features % block_size:
        fail(op, "K", f"a multiple of block_size {block_size}", in_features)
    if norm == "none" and (scale is not None or shift is not None):
        fail(op, "scale and shift", "given with a norm only", "norm 'none'")
    tokens = x.shape[:-1].numel()
    for name, vectors in (("scale", scale), ("shift", shift)):
        if vectors is None:
            continue
        if vectors.dtype not in (x.dtype, torch.float32):
            fail(op, name, f"of dtype {x.dtype} or torch.float32", vectors.dtype)
        shape = list(vectors.shape)
        if len(shape) != 2 or shape[1] != in_features or shape[0] == 0 or tokens % shape[0]:
            expected = f"[B, {in_features}] with B a divisor of M = {tokens}"
            fail(op, name, expected, f"shape {shape}")
        if vectors.device != x.device:
            fail(op, name, f"on {x.device}", f"a tensor on {vectors.device}")
        check_rows(op, name, vectors)
    if scale is not None and shift is not None:
        of_scale, of_shift = scale.shape[0], shift.shape[0]
        if of_scale != of_shift and 1 not in (of_scale, of_shift):
            fail(op, "shift", f"of as many rows as scale, {of_scale}", of_shift)
    check_optional(op, "channel_scale", channel_scale, torch.bfloat16, (in_features,), x.device)
    check_quantize(op, act_bits, scale_mode, scale_factor)
    return in_features


def check_cuda_dtype(op: str, argument: str, x: Tensor) -> None:
    check_choice(op, f"dtype of {argument} on CUDA", x.dtype, FLOAT_DTYPES)


def check_weight(
    op: str, weight: Tensor, out_features: int, in_features: int, weight_bits: int
) -> None:
    check_choice(op, "weight_bits", weight_bits, WEIGHT_BITS)
    shape = weight_shape(out_features, in_features, weight_bits)
    check_tensor(op, "weight", weight, torch.int32, shape, weight.device)


def check_codebook(
    op: str,
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    table_of_row: Tensor | None,
    out_features: int,
    bits: int,
) -> None:
    tables = out_features
    if table_of_row is not None:
        if levels.dim() != 2 or not 1 <= levels.shape[0] <= MAX_SHARED_TABLES:
            expected = f"[T, {1 << bits}] with T from 1 to {MAX_SHARED_TABLES}"
            fail(op, "levels", expected, f"shape {list(levels.shape)}")
        tables = levels.shape[0]
        shape = (out_features,)
        check_tensor(op, "table_of_row", table_of_row, torch.uint8, shape, weight.device)
    check_tensor(op, "levels", levels, torch.int8, (tables, 1 << bits), weight.device)
    check_tensor(op, "weight_scale", weight_scale, torch.float32, (out_features,), weight.device)


def check_prepack(codes: Tensor, in_features: int, weight_bits: int) -> None:
    check_choice("prepack", "weight_bits", weight_bits, WEIGHT_BITS)
    if codes.dim() != 2:
        fail("prepack", "codes", "[N, ceil(K/32)*weight_bits]", f"shape {list(codes.shape)}")
    shape = (codes.shape[0], packed_words(in_features, weight_bits))
    check_tensor("prepack", "codes", codes, torch.int32, shape, codes.device)


def check_gemm(
    x_q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    weight_bits: int,
    out_features: int,
    activation: str,
    out_dtype: torch.dtype,
    table_of_row: Tensor | None = None,
    *,
    op: str = "gemm",
) -> None:
    if x_q.dtype != torch.int8 or x_q.dim() != 2:
        fail(op, "x_q", "torch.int8 [M, K]", f"{x_q.dtype} {list(x_q.shape)}")
    m, in_features = x_q.shape
    if x_q.numel() and (x_q.stride(1) != 1 or (m > 1 and x_q.stride(0) % 16)):
        fail(op, "x_q", "of strides [multiple of 16, 1]", f"strides {x_q.stride()}")
    device = x_q.device
    check_choice(op, "activation", activation, GEMM_ACTIVATIONS)
    check_choice(op, "out_dtype", out_dtype, (*FLOAT_DTYPES, torch.int32))
    check_weight(op, weight, out_features, in_features, weight_bits)
    if weight.device != device:
        fail(op, "weight", f"on {device}", f"a tensor on {weight.device}")
    check_codebook(op, weight, levels, weight_scale, table_of_row, out_features, weight_bits)
    check_tensor(op, "x_scale", x_scale, torch.float32, (m,), device)
    check_optional(op, "bias", bias, torch.float32, (out_features,), device)
    if out_dtype == torch.int32 and (activation != "none" or bias is not None):
        fail(op, "out_dtype int32", "used without bias and activation", "one of them")
    if residual is None:
        if gate is not None:
            fail(op, "gate", "given together with residual", "gate without residual")
        return
    if out_dtype == torch.int32:
        fail(op, "out_dtype int32", "used without residual", "a residual")
    if residual.dtype != out_dtype or tuple(residual.shape) != (m, out_features):
        got = f"{residual.dtype} {list(residual.shape)}"
        fail(op, "residual", f"{out_dtype} {[m, out_features]}", got)
    if residual.device != device:
        fail(op, "residual", f"on {device}", f"a tensor on {residual.device}")
    check_rows(op, "residual", residual)
    if gate is None:
        return
    if gate.dim() != 2 or gate.shape[0] == 0 or m % gate.shape[0]:
        fail(op, "gate", f"[B, N] with B a divisor of M = {m}", f"shape {list(gate.shape)}")
    if gate.dtype != out_dtype or gate.shape[1] != out_features:
        got = f"{gate.dtype} {list(gate.shape)}"
        fail(op, "gate", f"{out_dtype} {[gate.shape[0], out_features]}", got)
    if gate.device != device:
        fail(op, "gate", f"on {device}", f"a tensor on {gate.device}")
    check_rows(op, "gate", gate)


def check_gemm_config(*arguments):  # type: ignore[no-untyped-def]
    config = arguments[12]
    if config < 0:  # the end of the list is known where there are kernels
        fail("gemm_config", "config", "a place in _planner.gemm_configs()", config)
    check_gemm(*arguments[:12], *arguments[13:], op="gemm_config")


def check_gemv(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    out_features: int,
    table_of_row: Tensor | None = None,
) -> None:
    check_choice("gemv", "dtype of x", x.dtype, ORACLE_DTYPES)
    if x.dim() != 2 or x.shape[0] > GEMV_MAX_ROWS:
        fail("gemv", "x", f"[M, K] with M at most {GEMV_MAX_ROWS}", f"shape {list(x.shape)}")
    codebook = (levels, weight_scale, table_of_row)
    check_a16("gemv", x, weight, codebook, bias, weight_bits, out_features)


def check_gemm_a16(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    out_features: int,
    tile: int = -1,
    table_of_row: Tensor | None = None,
) -> None:
    check_choice("gemm_a16", "dtype of x", x.dtype, ORACLE_DTYPES)
    if x.dim() != 2:
        fail("gemm_a16", "x", "[M, K]", f"shape {list(x.shape)}")
    if tile < -1:  # the other end is the CUDA kernel's to know
        fail("gemm_a16", "tile", "a place in _planner.a16_tiles() or -1", tile)
    codebook = (levels, weight_scale, table_of_row)
    check_a16("gemm_a16", x, weight, codebook, bias, weight_bits, out_features)


def check_a16(
    op: str,
    x: Tensor,
    weight: Tensor,
    codebook: tuple[Tensor, Tensor, Tensor | None],
    bias: Tensor | None,
    weight_bits: int,
    out_features: int,
) -> None:
    """codebook: levels, weight_scale and table_of_row."""
    check_rows(op, "x", x)
    check_weight(op, weight, out_features, x.shape[1], weight_bits)
    if weight.device != x.device:
        fail(op, "weight", f"on {x.device}", f"a tensor on {weight.device}")
    check_codebook(op, weight, *codebook, out_features, weight_bits)
    check_optional(op, "bias", bias, torch.float32, (out_features,), x.device)


def check_dequantize(
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    out_features: int,
    in_features: int,
    weight_bits: int,
    out_dtype: torch.dtype,
    table_of_row: Tensor | None = None,
) -> None:
    check_choice("dequantize", "out_dtype", out_dtype, FLOAT_DTYPES)
    check_weight("dequantize", weight, out_features, in_features, weight_bits)
    codebook = (levels, weight_scale, table_of_row)
    check_codebook("dequantize", weight, *codebook, out_features, weight_bits)


def check_qk_norm_rope_parts(*arguments: Any) -> tuple[int, int]:
    """As check_qk_norm_rope, of all arguments but the last, parts."""
    *given, parts = arguments
    op = "qk_norm_rope_parts"
    heads, tokens = _check_heads(op, *given)
    if given[2] is None:
        fail(op, "v", "a tensor", None)
    if parts < 2 or heads % parts:
        fail(op, "parts", f"at least 2 and a divisor of heads = {heads}", parts)
    return heads, tokens


def check_qk_norm_rope(*arguments: Any) -> tuple[int, int]:
    """Checks the arguments and returns heads and the tokens of the joint sequence."""
    return _check_heads("qk_norm_rope", *arguments)


def _check_heads(
    op: str,
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
) -> tuple[int, int]:
    check_choice(op, "norm", norm, HEAD_NORMS)
    check_choice(op, "rope", rope, ROPES)
    if not 0 <= eps < float("inf"):
        fail(op, "eps", "finite and not negative", eps)
    if q.dim() != 3:
        fail(op, "q", "[B, S, H*D]", f"shape {list(q.shape)}")
    check_tokens(op, "q", q)
    samples, tokens, channels = q.shape
    if heads < 1:
        fail(op, "heads", "at least 1", heads)
    head_dim = channels // heads
    if channels % heads or head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        expected = f"of heads = {heads} times an even D of 2 to {MAX_HEAD_DIM} channels"
        fail(op, "q", expected, f"shape {list(q.shape)}")
    check_like(op, "k", k, q, tuple(q.shape))
    if v is not None:
        check_like(op, "v", v, q, tuple(q.shape))
    with_context = context_q is not None
    together = [("context_k", context_k, with_context)]
    together.append(("context_v", context_v, with_context and v is not None))
    for argument, tensor, wanted in together:
        if (tensor is not None) != wanted:
            got = "None" if tensor is None else "a tensor"
            reason = "context_q is" if argument == "context_k" else "context_q and v are"
            fail(op, argument, f"given exactly when {reason}", got)
    if context_q is not None:
        # Any number of tokens, but the samples and channels of q.
        length = context_q.shape[1:2] if context_q.dim() == 3 else (0,)
        shape = (samples, *length, channels)
        for argument, tensor in (("context_q", context_q), ("context_k", context_k)):
            if tensor is not None:
                check_like(op, argument, tensor, q, shape)
        if context_v is not None:
            check_like(op, "context_v", context_v, q, shape)
        tokens = tokens + context_q.shape[1]
    weights = {"q_weight": q_weight, "k_weight": k_weight}
    of_context = {"context_q_weight": context_q_weight, "context_k_weight": context_k_weight}
    check_head_weights(op, q, {**weights, **of_context}, with_context, norm, head_dim)
    if (cos is None) != (sin is None):
        fail(op, "sin", "given exactly when cos is", "one without the other")
    for argument, tensor in (("cos", cos), ("sin", sin)):
        check_optional(op, argument, tensor, torch.float32, (tokens, head_dim), q.device)
    return heads, tokens


def check_head_weights(
    op: str,
    q: Tensor,
    weights: dict[str, Tensor | None],
    with_context: bool,
    norm: str,
    head_dim: int,
) -> None:
    """Of one dtype, all given or none; those of the context with a context only."""
    q_weight = weights["q_weight"]
    size = q.shape[2] if norm == "rms_across_heads" else head_dim
    for argument, weight in weights.items():
        wanted = q_weight is not None and (with_context or not argument.startswith("context"))
        if (weight is not None) != wanted:
            expected = "given exactly when q_weight is"
            expected += " and there is a context" if argument.startswith("context") else ""
            fail(op, argument, expected, "None" if weight is None else "a tensor")
        if weight is None or q_weight is None:
            continue
        if norm == "none":
            fail(op, argument, "None for norm 'none'", "a tensor")
        if weight.dtype not in (q.dtype, torch.float32):
            fail(op, argument, f"of dtype {q.dtype} or torch.float32", weight.dtype)
        check_tensor(op, argument, weight, q_weight.dtype, (size,), q.device)
