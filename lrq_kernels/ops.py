"""The torch ops `lrq::*`: schemas, CPU kernels (the reference) and typed wrappers; op_fakes has the
fakes.

The dispatcher is the only place that knows devices. CUDA kernels of prepack, unprepack,
dequantize, gemm, gemv, gemm_a16 and _rotate_rows come from csrc/ops.cpp; for rotate,
rotate_quantize and its fused forms activation_path names Triton or CUDA; qk_norm_rope and
qk_norm_rope_parts are Triton. Every op is functional and returns fresh tensors. op_checks validates
arguments on every one of these ways.

_rotate_rows is the CUDA kernel of rotate_quantize and its fused forms for the problems that
_planner.supports_rotate_rows allows, under a name of its own.

gemm_config is gemm by a named row of _planner.gemm_configs(), for tests and benchmarks alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import activation_path, attention_reference, reference
from . import op_checks as checks
from .op_checks import GEMV_MAX_ROWS
from .op_fakes import FAKES

__all__ = [
    "GEMV_MAX_ROWS",
    "activation_rotate_quantize",
    "concat_rotate_quantize",
    "dequantize",
    "gemm",
    "gemm_a16",
    "gemv",
    "norm_modulate_rotate_quantize",
    "prepack",
    "qk_norm_rope",
    "qk_norm_rope_parts",
    "rotate",
    "rotate_quantize",
    "unprepack",
]

_library = torch.library.Library("lrq", "DEF")

_ROTATE = (
    "Tensor? channel_scale, Tensor? permutation, Tensor? matrices, str rotation, int block_size"
)
_ROTATE_QUANTIZE = _ROTATE + ", int act_bits, str scale_mode, float scale_factor"
_QK_NORM_ROPE = (
    "Tensor q, Tensor k, Tensor? v, Tensor? context_q, Tensor? context_k, Tensor? context_v, "
    "Tensor? q_weight, Tensor? k_weight, Tensor? context_q_weight, Tensor? context_k_weight, "
    "Tensor? cos, Tensor? sin, int heads, float eps, str norm, str rope"
)
_SCHEMAS = {
    "rotate": f"(Tensor x, {_ROTATE}) -> Tensor",
    "rotate_quantize": f"(Tensor x, {_ROTATE_QUANTIZE}) -> (Tensor, Tensor)",
    "concat_rotate_quantize": f"(Tensor first, Tensor second, {_ROTATE_QUANTIZE}) "
    "-> (Tensor, Tensor)",
    "activation_rotate_quantize": "(Tensor x, Tensor? gate, str activation, "
    f"{_ROTATE_QUANTIZE}, bool keep) -> (Tensor, Tensor, Tensor)",
    "norm_modulate_rotate_quantize": "(Tensor x, Tensor? norm_weight, Tensor? norm_bias, "
    "Tensor? scale, Tensor? shift, str norm, float eps, "
    f"{_ROTATE_QUANTIZE}, bool keep) -> (Tensor, Tensor, Tensor)",
    "_rotate_rows": "(Tensor x, Tensor? second, Tensor? scale, Tensor? shift, str norm, float eps, "
    "Tensor? channel_scale, int block_size, int act_bits, str scale_mode, float scale_factor) "
    "-> (Tensor, Tensor)",
    "prepack": "(Tensor codes, int in_features, int weight_bits) -> Tensor",
    "unprepack": "(Tensor weight, int out_features, int in_features, int weight_bits) -> Tensor",
    "dequantize": "(Tensor weight, Tensor levels, Tensor weight_scale, int out_features, "
    "int in_features, int weight_bits, ScalarType out_dtype, Tensor? table_of_row=None) -> Tensor",
    "gemm": "(Tensor x_q, Tensor x_scale, Tensor weight, Tensor levels, Tensor weight_scale, "
    "Tensor? bias, Tensor? residual, Tensor? gate, int weight_bits, int out_features, "
    "str activation, ScalarType out_dtype, Tensor? table_of_row=None) -> Tensor",
    "gemm_config": "(Tensor x_q, Tensor x_scale, Tensor weight, Tensor levels, "
    "Tensor weight_scale, Tensor? bias, Tensor? residual, Tensor? gate, int weight_bits, "
    "int out_features, str activation, ScalarType out_dtype, int config, "
    "Tensor? table_of_row=None) -> Tensor",
    "gemv": "(Tensor x, Tensor weight, Tensor levels, Tensor weight_scale, Tensor? bias, "
    "int weight_bits, int out_features, Tensor? table_of_row=None) -> Tensor",
    "gemm_a16": "(Tensor x, Tensor weight, Tensor levels, Tensor weight_scale, Tensor? bias, "
    "int weight_bits, int out_features, int tile=-1, Tensor? table_of_row=None) -> Tensor",
    "qk_norm_rope": f"({_QK_NORM_ROPE}) -> (Tensor, Tensor, Tensor)",
    "qk_norm_rope_parts": f"({_QK_NORM_ROPE}, int parts) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)


# ---- CPU kernels --------------------------------------------------------------------------------


def _rotate_quantize_cpu(*arguments):  # type: ignore[no-untyped-def]
    checks.check_rotate_quantize(*arguments)
    return reference.rotate_quantize(*arguments)


def _concat_rotate_quantize_cpu(*arguments):  # type: ignore[no-untyped-def]
    checks.check_concat_rotate_quantize(*arguments)
    return reference.concat_rotate_quantize(*arguments)


def _activation_rotate_quantize_cpu(*arguments):  # type: ignore[no-untyped-def]
    checks.check_activation_rotate_quantize(*arguments)
    return reference.activation_rotate_quantize(*arguments)


def _norm_modulate_rotate_quantize_cpu(*arguments):  # type: ignore[no-untyped-def]
    checks.check_norm_modulate_rotate_quantize(*arguments)
    return reference.norm_modulate_rotate_quantize(*arguments)


def _rotate_cpu(*arguments):  # type: ignore[no-untyped-def]
    checks.check_rotate("rotate", *arguments)
    result = reference.rotate(*arguments)
    # An op must not return its input: "none" without scale or permutation is the identity.
    return result.clone() if result.data_ptr() == arguments[0].data_ptr() else result


def _rotate_rows_cpu(*arguments):  # type: ignore[no-untyped-def]
    checks.check_rotate_rows(*arguments)
    return reference.rotate_rows(*arguments)


def _prepack_cpu(codes: Tensor, in_features: int, weight_bits: int) -> Tensor:
    checks.check_prepack(codes, in_features, weight_bits)
    return reference.prepack(codes, in_features, weight_bits)


def _unprepack_cpu(weight: Tensor, out_features: int, in_features: int, weight_bits: int) -> Tensor:
    checks.check_weight("unprepack", weight, out_features, in_features, weight_bits)
    return reference.unprepack(weight, out_features, in_features, weight_bits)


def _dequantize_cpu(*arguments):  # type: ignore[no-untyped-def]
    checks.check_dequantize(*arguments)
    return reference.dequantize(*arguments)


def _gemm_cpu(*arguments):  # type: ignore[no-untyped-def]
    checks.check_gemm(*arguments)
    return reference.gemm(*arguments)


def _gemm_config_cpu(*arguments):  # type: ignore[no-untyped-def]
    checks.check_gemm_config(*arguments)
    return reference.gemm(*arguments[:12], *arguments[13:])


def _gemv_cpu(*arguments):  # type: ignore[no-untyped-def]
    checks.check_gemv(*arguments)
    return reference.gemv(*arguments)


def _gemm_a16_cpu(*arguments):  # type: ignore[no-untyped-def]
    checks.check_gemm_a16(*arguments)
    few = arguments[0].shape[0] <= GEMV_MAX_ROWS
    return (reference.gemv if few else reference.gemm_a16)(*arguments[:7], *arguments[8:])


def _qk_norm_rope_cpu(*arguments):  # type: ignore[no-untyped-def]
    checks.check_qk_norm_rope(*arguments)
    return attention_reference.qk_norm_rope(*arguments)


def _qk_norm_rope_parts_cpu(*arguments):  # type: ignore[no-untyped-def]
    checks.check_qk_norm_rope_parts(*arguments)
    return attention_reference.qk_norm_rope_parts(*arguments)


# ---- Triton, and the activation path on CUDA -----------------------------------------------------


def _rotate_quantize_cuda(*arguments):  # type: ignore[no-untyped-def]
    checks.check_rotate_quantize(*arguments)
    checks.check_cuda_dtype("rotate_quantize", "x", arguments[0])
    return activation_path.rotate_quantize(*arguments)


def _rotate_cuda(*arguments):  # type: ignore[no-untyped-def]
    checks.check_rotate("rotate", *arguments)
    checks.check_cuda_dtype("rotate", "x", arguments[0])
    return activation_path.rotate(*arguments)


def _concat_rotate_quantize_cuda(*arguments):  # type: ignore[no-untyped-def]
    checks.check_concat_rotate_quantize(*arguments)
    checks.check_cuda_dtype("concat_rotate_quantize", "first", arguments[0])
    return activation_path.concat_rotate_quantize(*arguments)


def _activation_rotate_quantize_cuda(*arguments):  # type: ignore[no-untyped-def]
    checks.check_activation_rotate_quantize(*arguments)
    checks.check_cuda_dtype("activation_rotate_quantize", "x", arguments[0])
    return activation_path.activation_rotate_quantize(*arguments)


def _norm_modulate_rotate_quantize_cuda(*arguments):  # type: ignore[no-untyped-def]
    checks.check_norm_modulate_rotate_quantize(*arguments)
    checks.check_cuda_dtype("norm_modulate_rotate_quantize", "x", arguments[0])
    return activation_path.norm_modulate_rotate_quantize(*arguments)


def _qk_norm_rope_cuda(*arguments):  # type: ignore[no-untyped-def]
    checks.check_qk_norm_rope(*arguments)
    checks.check_cuda_dtype("qk_norm_rope", "q", arguments[0])
    from . import qk_norm_rope as kernels  # Triton is imported on the first call

    return kernels.qk_norm_rope(*arguments)


def _qk_norm_rope_parts_cuda(*arguments):  # type: ignore[no-untyped-def]
    checks.check_qk_norm_rope_parts(*arguments)
    checks.check_cuda_dtype("qk_norm_rope_parts", "q", arguments[0])
    from . import qk_norm_rope as kernels

    return kernels.qk_norm_rope_parts(*arguments)


def _gemm_a16_autocast(*arguments):  # type: ignore[no-untyped-def]
    # Where torch's product runs, autocast would cast that, and the result with it.
    with torch.autocast("cuda", enabled=False):
        return torch.ops.lrq.gemm_a16.default(*arguments)


_CPU = {
    "rotate": _rotate_cpu,
    "rotate_quantize": _rotate_quantize_cpu,
    "concat_rotate_quantize": _concat_rotate_quantize_cpu,
    "activation_rotate_quantize": _activation_rotate_quantize_cpu,
    "norm_modulate_rotate_quantize": _norm_modulate_rotate_quantize_cpu,
    "_rotate_rows": _rotate_rows_cpu,
    "prepack": _prepack_cpu,
    "unprepack": _unprepack_cpu,
    "dequantize": _dequantize_cpu,
    "gemm": _gemm_cpu,
    "gemm_config": _gemm_config_cpu,
    "gemv": _gemv_cpu,
    "gemm_a16": _gemm_a16_cpu,
    "qk_norm_rope": _qk_norm_rope_cpu,
    "qk_norm_rope_parts": _qk_norm_rope_parts_cpu,
}
# What csrc/ops.cpp does not register; activation_path names the kernel that runs.
_CUDA = {
    "rotate": _rotate_cuda,
    "rotate_quantize": _rotate_quantize_cuda,
    "concat_rotate_quantize": _concat_rotate_quantize_cuda,
    "activation_rotate_quantize": _activation_rotate_quantize_cuda,
    "norm_modulate_rotate_quantize": _norm_modulate_rotate_quantize_cuda,
    "qk_norm_rope": _qk_norm_rope_cuda,
    "qk_norm_rope_parts": _qk_norm_rope_parts_cuda,
}
for _name in _SCHEMAS:
    _library.impl(_name, _CPU[_name], "CPU")
    torch.library.register_fake(f"lrq::{_name}", FAKES[_name], lib=_library)
for _name, _kernel in _CUDA.items():
    _library.impl(_name, _kernel, "CUDA")
_library.impl("gemm_a16", _gemm_a16_autocast, "AutocastCUDA")


# ---- typed wrappers -----------------------------------------------------------------------------


def rotate_quantize(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    act_bits: int,
    scale_mode: str = "absmax",
    scale_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Scale, rotate and quantize x [..., K] per token: (int8 [..., K], fp32 [...]).

    See reference.rotate_quantize for the arithmetic.
    """
    return torch.ops.lrq.rotate_quantize.default(
        x,
        channel_scale,
        permutation,
        matrices,
        rotation,
        block_size,
        act_bits,
        scale_mode,
        scale_factor,
    )


def rotate(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
) -> Tensor:
    """Scale and rotate x [..., K]; the result has x's dtype. See reference.rotate."""
    return torch.ops.lrq.rotate.default(
        x, channel_scale, permutation, matrices, rotation, block_size
    )


def concat_rotate_quantize(
    first: Tensor,
    second: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    act_bits: int,
    scale_mode: str = "absmax",
    scale_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """rotate_quantize of [first | second] along the last dimension, which is never made."""
    return torch.ops.lrq.concat_rotate_quantize.default(
        first,
        second,
        channel_scale,
        permutation,
        matrices,
        rotation,
        block_size,
        act_bits,
        scale_mode,
        scale_factor,
    )


def activation_rotate_quantize(
    x: Tensor,
    gate: Tensor | None,
    activation: str,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    act_bits: int,
    scale_mode: str = "absmax",
    scale_factor: float = 1.0,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """rotate_quantize of act(x), or of act(gate) * x: int8 [..., K], fp32 [...], and what was
    quantized in x's dtype if `keep`, else an empty tensor.

    See reference.activation_rotate_quantize for the arithmetic.
    """
    return torch.ops.lrq.activation_rotate_quantize.default(
        x,
        gate,
        activation,
        channel_scale,
        permutation,
        matrices,
        rotation,
        block_size,
        act_bits,
        scale_mode,
        scale_factor,
        keep,
    )


def norm_modulate_rotate_quantize(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    norm: str,
    eps: float,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    act_bits: int,
    scale_mode: str = "absmax",
    scale_factor: float = 1.0,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """rotate_quantize of (norm(x) * norm_weight + norm_bias) * (1 + scale) + shift, x [B, T, K] or
    [M, K]: int8, fp32 per token, and what was quantized in x's dtype if `keep`, else empty.

    See reference.norm_modulate_rotate_quantize for shapes and arithmetic.
    """
    return torch.ops.lrq.norm_modulate_rotate_quantize.default(
        x,
        norm_weight,
        norm_bias,
        scale,
        shift,
        norm,
        eps,
        channel_scale,
        permutation,
        matrices,
        rotation,
        block_size,
        act_bits,
        scale_mode,
        scale_factor,
        keep,
    )


def _rotate_rows(
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
) -> tuple[Tensor, Tensor]:
    """The CUDA kernel of rotate_quantize and its fused forms. See reference.rotate_rows."""
    return torch.ops.lrq._rotate_rows.default(
        x,
        second,
        scale,
        shift,
        norm,
        eps,
        channel_scale,
        block_size,
        act_bits,
        scale_mode,
        scale_factor,
    )


def prepack(codes: Tensor, in_features: int, weight_bits: int) -> Tensor:
    """Canonical codes int32 [N, ceil(K/32)*b] to the device layout, one for every device."""
    return torch.ops.lrq.prepack.default(codes, in_features, weight_bits)


def unprepack(weight: Tensor, out_features: int, in_features: int, weight_bits: int) -> Tensor:
    """Exact inverse of prepack."""
    return torch.ops.lrq.unprepack.default(weight, out_features, in_features, weight_bits)


def dequantize(
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    out_features: int,
    in_features: int,
    weight_bits: int,
    out_dtype: torch.dtype,
    table_of_row: Tensor | None = None,
) -> Tensor:
    """Prepacked weight to [N, K] in out_dtype (bf16, fp16 or fp32).

    levels int8 [N, 2^b], or [T, 2^b] with T <= 256 and table_of_row uint8 [N], the table that row
    n has, below T (nothing checks its values); so in all ops that take a weight."""
    sizes = (out_features, in_features, weight_bits)
    return torch.ops.lrq.dequantize.default(
        weight, levels, weight_scale, *sizes, out_dtype, table_of_row
    )


def gemm(
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
) -> Tensor:
    """Quantized linear: x_q int8 [M, K], x_scale fp32 [M] -> [M, N]. See reference.gemm."""
    return torch.ops.lrq.gemm.default(
        x_q,
        x_scale,
        weight,
        levels,
        weight_scale,
        bias,
        residual,
        gate,
        weight_bits,
        out_features,
        activation,
        out_dtype,
        table_of_row,
    )


def gemv(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    out_features: int,
    table_of_row: Tensor | None = None,
) -> Tensor:
    """Weight-only linear for at most 16 rows, x [M, K] in 16 bits. See reference.gemv."""
    return torch.ops.lrq.gemv.default(
        x, weight, levels, weight_scale, bias, weight_bits, out_features, table_of_row
    )


def gemm_a16(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    out_features: int,
    tile: int = -1,
    table_of_row: Tensor | None = None,
) -> Tensor:
    """Weight-only linear for any number of rows, x [M, K] -> [M, N] of x's dtype.

    gemv for at most 16 rows of 16 bits; above that a kernel that decodes into the product on
    Hopper, dequantize and torch's linear elsewhere, for fp32, and where _planner.a16_tile finds it
    quicker. tile, a place in _planner.a16_tiles(), is for tests and benchmarks; there the kernel
    runs for few rows too. See reference.gemm_a16.
    """
    return torch.ops.lrq.gemm_a16.default(
        x, weight, levels, weight_scale, bias, weight_bits, out_features, tile, table_of_row
    )


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
    norm: str = "rms",
    rope: str = "interleaved",
) -> tuple[Tensor, Tensor, Tensor]:
    """RMSNorm and rotary embedding of q and k [B, S, H*D], behind those of a context if there is
    one: q, k and v [B, S_context + S, H, D], as attention takes them.

    Without v the third result is empty; a caller without a context keeps its own v. See
    attention_reference.qk_norm_rope for shapes, modes and roundings. ValueError for what it does
    not take.
    """
    return torch.ops.lrq.qk_norm_rope.default(
        q,
        k,
        v,
        context_q,
        context_k,
        context_v,
        q_weight,
        k_weight,
        context_q_weight,
        context_k_weight,
        cos,
        sin,
        heads,
        eps,
        norm,
        rope,
    )


def qk_norm_rope_parts(
    *arguments: Any, parts: int, norm: str = "rms", rope: str = "interleaved"
) -> Tensor:
    """qk_norm_rope for heads that go to several processes: q, k and v of the joint sequence in one
    tensor [parts, B, T, 3, H / parts, D], so that each part lies together.

    arguments: qk_norm_rope's, from q to eps; v is needed. ValueError for what it does not take.
    """
    return torch.ops.lrq.qk_norm_rope_parts.default(*arguments, norm, rope, parts)
