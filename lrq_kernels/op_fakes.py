"""What the outputs of every op lrq::* look like, for tracing: shapes and types, nothing computed.

The same checks run here as in the kernels, so that an error comes while a model is compiled.
"""

from __future__ import annotations

import torch

from . import op_checks as checks
from .packing import packed_words


def _quantized_fake(x, *shape):  # type: ignore[no-untyped-def]
    """x_q and x_scale of tokens of this shape."""
    scale_dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(shape, dtype=torch.int8), x.new_empty(shape[:-1], dtype=scale_dtype)


def _rotate_quantize_fake(*arguments):  # type: ignore[no-untyped-def]
    checks.check_rotate_quantize(*arguments)
    return _quantized_fake(arguments[0], *arguments[0].shape)


def _concat_rotate_quantize_fake(*arguments):  # type: ignore[no-untyped-def]
    checks.check_concat_rotate_quantize(*arguments)
    first, second = arguments[:2]
    return _quantized_fake(first, *first.shape[:-1], first.shape[-1] + second.shape[-1])


def _quantized_and_kept_fake(x, keep):  # type: ignore[no-untyped-def]
    return (*_quantized_fake(x, *x.shape), x.new_empty(x.shape if keep else (0,)))


def _activation_rotate_quantize_fake(*arguments):  # type: ignore[no-untyped-def]
    checks.check_activation_rotate_quantize(*arguments)
    return _quantized_and_kept_fake(arguments[0], arguments[-1])


def _norm_modulate_rotate_quantize_fake(*arguments):  # type: ignore[no-untyped-def]
    checks.check_norm_modulate_rotate_quantize(*arguments)
    return _quantized_and_kept_fake(arguments[0], arguments[-1])


def _rotate_fake(x, channel_scale, permutation, matrices, rotation, block_size):  # type: ignore[no-untyped-def]
    checks.check_rotate("rotate", x, channel_scale, permutation, matrices, rotation, block_size)
    return x.new_empty(x.shape)


def _rotate_rows_fake(*arguments):  # type: ignore[no-untyped-def]
    in_features = checks.check_rotate_rows(*arguments)
    x = arguments[0]
    scale_dtype = torch.promote_types(x.dtype, torch.float32)
    x_q = x.new_empty((*x.shape[:-1], in_features), dtype=torch.int8)
    return x_q, x.new_empty(x.shape[:-1], dtype=scale_dtype)


def _prepack_fake(codes, in_features, weight_bits):  # type: ignore[no-untyped-def]
    checks.check_prepack(codes, in_features, weight_bits)
    return codes.new_empty(checks.weight_shape(codes.shape[0], in_features, weight_bits))


def _unprepack_fake(weight, out_features, in_features, weight_bits):  # type: ignore[no-untyped-def]
    checks.check_weight("unprepack", weight, out_features, in_features, weight_bits)
    return weight.new_empty(out_features, packed_words(in_features, weight_bits))


def _dequantize_fake(*arguments):  # type: ignore[no-untyped-def]
    checks.check_dequantize(*arguments)
    weight, _, _, out_features, in_features, _, out_dtype = arguments[:7]
    return weight.new_empty(out_features, in_features, dtype=out_dtype)


def _gemm_fake(*arguments):  # type: ignore[no-untyped-def]
    checks.check_gemm(*arguments)
    x_q, out_features, out_dtype = arguments[0], arguments[9], arguments[11]
    return x_q.new_empty(x_q.shape[0], out_features, dtype=out_dtype)


def _gemm_config_fake(*arguments):  # type: ignore[no-untyped-def]
    checks.check_gemm_config(*arguments)
    return _gemm_fake(*arguments[:12], *arguments[13:])


def _gemv_fake(*arguments):  # type: ignore[no-untyped-def]
    checks.check_gemv(*arguments)
    return arguments[0].new_empty(arguments[0].shape[0], arguments[6])


def _gemm_a16_fake(*arguments):  # type: ignore[no-untyped-def]
    checks.check_gemm_a16(*arguments)
    return arguments[0].new_empty(arguments[0].shape[0], arguments[6])


def _qk_norm_rope_fake(*arguments):  # type: ignore[no-untyped-def]
    heads, tokens = checks.check_qk_norm_rope(*arguments)
    q, v = arguments[0], arguments[2]
    shape = (q.shape[0], tokens, heads, q.shape[2] // heads)
    return q.new_empty(shape), q.new_empty(shape), q.new_empty((0,) if v is None else shape)


def _qk_norm_rope_parts_fake(*arguments):  # type: ignore[no-untyped-def]
    heads, tokens = checks.check_qk_norm_rope_parts(*arguments)
    q, parts = arguments[0], arguments[-1]
    return q.new_empty(parts, q.shape[0], tokens, 3, heads // parts, q.shape[2] // heads)


FAKES = {
    "rotate": _rotate_fake,
    "rotate_quantize": _rotate_quantize_fake,
    "concat_rotate_quantize": _concat_rotate_quantize_fake,
    "activation_rotate_quantize": _activation_rotate_quantize_fake,
    "norm_modulate_rotate_quantize": _norm_modulate_rotate_quantize_fake,
    "_rotate_rows": _rotate_rows_fake,
    "prepack": _prepack_fake,
    "unprepack": _unprepack_fake,
    "dequantize": _dequantize_fake,
    "gemm": _gemm_fake,
    "gemm_config": _gemm_config_fake,
    "gemv": _gemv_fake,
    "gemm_a16": _gemm_a16_fake,
    "qk_norm_rope": _qk_norm_rope_fake,
    "qk_norm_rope_parts": _qk_norm_rope_parts_fake,
}
