"""The torch ops `lrq::*`: schemas, checks, fakes, CPU kernels (the reference) and Triton kernels.

The dispatcher is the only place that knows devices. CUDA kernels of prepack, unprepack,
dequantize, gemm, gemv, gemm_a16 and _rotate_rows come from csrc/ops.cpp; those of rotate and
rotate_quantize are Triton and registered here. Every op is functional and returns fresh tensors.

_rotate_rows is the CUDA kernel of rotate_quantize and its fused forms for the problems that
_planner.supports_rotate_rows allows, under a name of its own.

gemm_config is gemm by a named row of _planner.gemm_configs(), for tests and benchmarks alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .packing import packed_words
from .reference import TILE
from .scheme import BLOCK_SIZES, DUAL_BLOCK_SIZE, ROTATIONS, SCALE_MODES, WEIGHT_BITS

ACTIVATIONS = ("none", "gelu_tanh")
TOKEN_NORMS = ("none", "layer", "rms")
GEMV_MAX_ROWS = 16
A16_TILES = (0, 64, 128, 192, 256)  # tile_m of gemm_a16; 0: chosen for the problem
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# float64 exists on the CPU only, as the oracle of the tests.
_ORACLE_DTYPES = (*FLOAT_DTYPES, torch.float64)

_library = torch.library.Library("lrq", "DEF")

_SCHEMAS = {
    "rotate_quantize": "(Tensor x, Tensor? channel_scale, Tensor? permutation, Tensor? matrices, "
    "str rotation, int block_size, int act_bits, str scale_mode, float scale_factor) "
    "-> (Tensor, Tensor)",
    "rotate": "(Tensor x, Tensor? channel_scale, Tensor? permutation, Tensor? matrices, "
    "str rotation, int block_size) -> Tensor",
    "_rotate_rows": "(Tensor x, Tensor? second, Tensor? scale, Tensor? shift, str norm, float eps, "
    "Tensor? channel_scale, int block_size, int act_bits, str scale_mode, float scale_factor) "
    "-> (Tensor, Tensor)",
    "prepack": "(Tensor codes, int in_features, int weight_bits) -> Tensor",
    "unprepack": "(Tensor weight, int out_features, int in_features, int weight_bits) -> Tensor",
    "dequantize": "(Tensor weight, Tensor levels, Tensor weight_scale, int out_features, "
    "int in_features, int weight_bits, ScalarType out_dtype) -> Tensor",
    "gemm": "(Tensor x_q, Tensor x_scale, Tensor weight, Tensor levels, Tensor weight_scale, "
    "Tensor? bias, Tensor? residual, Tensor? gate, int weight_bits, int out_features, "
    "str activation, ScalarType out_dtype) -> Tensor",
    "gemm_config": "(Tensor x_q, Tensor x_scale, Tensor weight, Tensor levels, "
    "Tensor weight_scale, Tensor? bias, Tensor? residual, Tensor? gate, int weight_bits, "
    "int out_features, str activation, ScalarType out_dtype, int config) -> Tensor",
    "gemv": "(Tensor x, Tensor weight, Tensor levels, Tensor weight_scale, Tensor? bias, "
    "int weight_bits, int out_features) -> Tensor",
    "gemm_a16": "(Tensor x, Tensor weight, Tensor levels, Tensor weight_scale, Tensor? bias, "
    "int weight_bits, int out_features, int tile_m=0) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)


# ---- checks -------------------------------------------------------------------------------------
# The CPU kernels, the fakes and the Triton launchers run these; csrc/ops.cpp has the same in C++.


def _fail(op: str, argument: str, expected: str, got: object) -> None:
    raise ValueError(f"lrq::{op}: {argument} must be {expected}, got {got}")


def _check_tensor(
    op: str, argument: str, tensor: Tensor, dtype: torch.dtype, shape: tuple, device: torch.device
) -> None:
    """One contiguous tensor of known dtype, shape and device."""
    if tensor.dtype != dtype or tuple(tensor.shape) != shape:
        _fail(op, argument, f"{dtype} {list(shape)}", f"{tensor.dtype} {list(tensor.shape)}")
    if tensor.device != device:
        _fail(op, argument, f"on {device}", f"a tensor on {tensor.device}")
    if not tensor.is_contiguous():
        _fail(op, argument, "contiguous", f"strides {tensor.stride()}")


def _check_rows(op: str, argument: str, tensor: Tensor) -> None:
    """[M, N] whose rows are of one piece."""
    if tensor.numel() and tensor.shape[1] > 1 and tensor.stride(1) != 1:
        _fail(op, argument, "of last stride 1", f"strides {tensor.stride()}")


def _check_optional(op: str, argument: str, tensor: Tensor | None, *rest: object) -> None:
    if tensor is not None:
        _check_tensor(op, argument, tensor, *rest)  # type: ignore[arg-type]


def _check_choice(op: str, argument: str, value: object, allowed: tuple) -> None:
    if value not in allowed:
        _fail(op, argument, f"one of {allowed}", repr(value))


def _check_rotate(
    op: str,
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
) -> None:
    _check_choice(op, "rotation", rotation, ROTATIONS)
    _check_choice(op, "dtype of x", x.dtype, _ORACLE_DTYPES)
    if x.dim() == 0:
        _fail(op, "x", "of at least one dimension, [..., K]", "a scalar")
    in_features = x.shape[-1]
    if x.numel() and in_features > 1 and x.stride(-1) != 1:
        _fail(op, "x", "of last stride 1", f"strides {x.stride()}")
    if rotation != "none":
        allowed = (DUAL_BLOCK_SIZE,) if rotation == "dual" else BLOCK_SIZES
        _check_choice(op, "block_size", block_size, allowed)
        if in_features % block_size:
            expected = f"a multiple of block_size {block_size}"
            _fail(op, "K", expected, in_features)
    if (matrices is not None) != (rotation == "dual"):
        expected = "given exactly when rotation is 'dual'"
        _fail(op, "matrices", expected, f"{rotation!r} with{'' if matrices is not None else 'out'}")
    f32, shape = torch.float32, (in_features,)
    _check_optional(op, "channel_scale", channel_scale, f32, shape, x.device)
    _check_optional(op, "permutation", permutation, torch.int32, shape, x.device)
    _check_optional(op, "matrices", matrices, f32, (2, DUAL_BLOCK_SIZE, DUAL_BLOCK_SIZE), x.device)


def _check_quantize(
    act_bits: int, scale_mode: str, scale_factor: float, op: str = "rotate_quantize"
) -> None:
    _check_choice(op, "act_bits", act_bits, (4, 8))
    _check_choice(op, "scale_mode", scale_mode, SCALE_MODES)
    if not 0 < scale_factor < float("inf"):
        _fail(op, "scale_factor", "positive and finite", scale_factor)


def _check_rotate_rows(
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
    _check_choice(op, "dtype of x", x.dtype, _ORACLE_DTYPES)
    in_features = 0
    for name, source in (("x", x), ("second", second)):
        if source is None:
            continue
        if source.dtype != x.dtype or source.dim() not in (2, 3):
            got = f"{source.dtype} {list(source.shape)}"
            _fail(op, name, f"{x.dtype} [M, K] or [B, T, K]", got)
        if source.numel() and source.stride(-1) != 1:
            _fail(op, name, "of last stride 1", f"strides {source.stride()}")
        if source.shape[:-1] != x.shape[:-1]:
            expected = f"of as many rows as x, {list(x.shape)}"
            _fail(op, name, expected, f"shape {list(source.shape)}")
        if source.device != x.device:
            _fail(op, name, f"on {x.device}", f"a tensor on {source.device}")
        in_features += source.shape[-1]
    _check_choice(op, "norm", norm, TOKEN_NORMS)
    _check_choice(op, "block_size", block_size, BLOCK_SIZES)
    if in_features % block_size:
        _fail(op, "K", f"a multiple of block_size {block_size}", in_features)
    if norm == "none" and (scale is not None or shift is not None):
        _fail(op, "scale and shift", "given with a norm only", "norm 'none'")
    tokens = x.shape[:-1].numel()
    for name, vectors in (("scale", scale), ("shift", shift)):
        if vectors is None:
            continue
        if vectors.dtype not in (x.dtype, torch.float32):
            _fail(op, name, f"of dtype {x.dtype} or torch.float32", vectors.dtype)
        shape = list(vectors.shape)
        if len(shape) != 2 or shape[1] != in_features or shape[0] == 0 or tokens % shape[0]:
            expected = f"[B, {in_features}] with B a divisor of M = {tokens}"
            _fail(op, name, expected, f"shape {shape}")
        if vectors.device != x.device:
            _fail(op, name, f"on {x.device}", f"a tensor on {vectors.device}")
        _check_rows(op, name, vectors)
    if scale is not None and shift is not None:
        of_scale, of_shift = scale.shape[0], shift.shape[0]
        if of_scale != of_shift and 1 not in (of_scale, of_shift):
            _fail(op, "shift", f"of as many rows as scale, {of_scale}", of_shift)
    _check_optional(op, "channel_scale", channel_scale, torch.float32, (in_features,), x.device)
    _check_quantize(act_bits, scale_mode, scale_factor, op)
    return in_features


def _weight_shape(out_features: int, in_features: int, weight_bits: int) -> tuple[int, ...]:
    return (-(-out_features // TILE), -(-in_features // TILE), 2, 256 * weight_bits)


def _check_weight(
    op: str, weight: Tensor, out_features: int, in_features: int, weight_bits: int
) -> None:
    _check_choice(op, "weight_bits", weight_bits, WEIGHT_BITS)
    shape = _weight_shape(out_features, in_features, weight_bits)
    _check_tensor(op, "weight", weight, torch.int32, shape, weight.device)


def _check_codebook(
    op: str, weight: Tensor, levels: Tensor, weight_scale: Tensor, out_features: int, bits: int
) -> None:
    shape = (out_features, 1 << bits)
    _check_tensor(op, "levels", levels, torch.int8, shape, weight.device)
    _check_tensor(op, "weight_scale", weight_scale, torch.float32, (out_features,), weight.device)


def _check_prepack(codes: Tensor, in_features: int, weight_bits: int) -> None:
    _check_choice("prepack", "weight_bits", weight_bits, WEIGHT_BITS)
    if codes.dim() != 2:
        _fail("prepack", "codes", "[N, ceil(K/32)*weight_bits]", f"shape {list(codes.shape)}")
    shape = (codes.shape[0], packed_words(in_features, weight_bits))
    _check_tensor("prepack", "codes", codes, torch.int32, shape, codes.device)


def _check_gemm(
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
    op: str = "gemm",
) -> None:
    if x_q.dtype != torch.int8 or x_q.dim() != 2:
        _fail(op, "x_q", "torch.int8 [M, K]", f"{x_q.dtype} {list(x_q.shape)}")
    m, in_features = x_q.shape
    if x_q.numel() and (x_q.stride(1) != 1 or (m > 1 and x_q.stride(0) % 16)):
        _fail(op, "x_q", "of strides [multiple of 16, 1]", f"strides {x_q.stride()}")
    device = x_q.device
    _check_choice(op, "activation", activation, ACTIVATIONS)
    _check_choice(op, "out_dtype", out_dtype, (*FLOAT_DTYPES, torch.int32))
    _check_weight(op, weight, out_features, in_features, weight_bits)
    if weight.device != device:
        _fail(op, "weight", f"on {device}", f"a tensor on {weight.device}")
    _check_codebook(op, weight, levels, weight_scale, out_features, weight_bits)
    _check_tensor(op, "x_scale", x_scale, torch.float32, (m,), device)
    _check_optional(op, "bias", bias, torch.float32, (out_features,), device)
    if out_dtype == torch.int32 and (activation != "none" or bias is not None):
        _fail(op, "out_dtype int32", "used without bias and activation", "one of them")
    if residual is None:
        if gate is not None:
            _fail(op, "gate", "given together with residual", "gate without residual")
        return
    if out_dtype == torch.int32:
        _fail(op, "out_dtype int32", "used without residual", "a residual")
    if residual.dtype != out_dtype or tuple(residual.shape) != (m, out_features):
        got = f"{residual.dtype} {list(residual.shape)}"
        _fail(op, "residual", f"{out_dtype} {[m, out_features]}", got)
    if residual.device != device:
        _fail(op, "residual", f"on {device}", f"a tensor on {residual.device}")
    _check_rows(op, "residual", residual)
    if gate is None:
        return
    if gate.dim() != 2 or gate.shape[0] == 0 or m % gate.shape[0]:
        _fail(op, "gate", f"[B, N] with B a divisor of M = {m}", f"shape {list(gate.shape)}")
    if gate.dtype != out_dtype or gate.shape[1] != out_features:
        got = f"{gate.dtype} {list(gate.shape)}"
        _fail(op, "gate", f"{out_dtype} {[gate.shape[0], out_features]}", got)
    if gate.device != device:
        _fail(op, "gate", f"on {device}", f"a tensor on {gate.device}")
    _check_rows(op, "gate", gate)


def _check_gemm_config(*arguments):  # type: ignore[no-untyped-def]
    if arguments[-1] < 0:  # the end of the list is known where there are kernels
        _fail("gemm_config", "config", "a place in _planner.gemm_configs()", arguments[-1])
    _check_gemm(*(*arguments[:-1], "gemm_config"))


def _check_gemv(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    out_features: int,
) -> None:
    _check_choice("gemv", "dtype of x", x.dtype, _ORACLE_DTYPES)
    if x.dim() != 2 or x.shape[0] > GEMV_MAX_ROWS:
        _fail("gemv", "x", f"[M, K] with M at most {GEMV_MAX_ROWS}", f"shape {list(x.shape)}")
    _check_a16("gemv", x, weight, levels, weight_scale, bias, weight_bits, out_features)


def _check_gemm_a16(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    out_features: int,
    tile_m: int = 0,
) -> None:
    _check_choice("gemm_a16", "dtype of x", x.dtype, _ORACLE_DTYPES)
    if x.dim() != 2:
        _fail("gemm_a16", "x", "[M, K]", f"shape {list(x.shape)}")
    _check_choice("gemm_a16", "tile_m", tile_m, A16_TILES)
    _check_a16("gemm_a16", x, weight, levels, weight_scale, bias, weight_bits, out_features)


def _check_a16(
    op: str,
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    out_features: int,
) -> None:
    _check_rows(op, "x", x)
    _check_weight(op, weight, out_features, x.shape[1], weight_bits)
    if weight.device != x.device:
        _fail(op, "weight", f"on {x.device}", f"a tensor on {weight.device}")
    _check_codebook(op, weight, levels, weight_scale, out_features, weight_bits)
    _check_optional(op, "bias", bias, torch.float32, (out_features,), x.device)


def _check_dequantize(
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    out_features: int,
    in_features: int,
    weight_bits: int,
    out_dtype: torch.dtype,
) -> None:
    _check_choice("dequantize", "out_dtype", out_dtype, FLOAT_DTYPES)
    _check_weight("dequantize", weight, out_features, in_features, weight_bits)
    _check_codebook("dequantize", weight, levels, weight_scale, out_features, weight_bits)


# ---- CPU kernels --------------------------------------------------------------------------------


def _rotate_quantize_cpu(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    act_bits: int,
    scale_mode: str,
    scale_factor: float,
) -> tuple[Tensor, Tensor]:
    arguments = (x, channel_scale, permutation, matrices, rotation, block_size)
    _check_rotate("rotate_quantize", *arguments)
    _check_quantize(act_bits, scale_mode, scale_factor)
    return reference.rotate_quantize(*arguments, act_bits, scale_mode, scale_factor)


def _rotate_cpu(*arguments):  # type: ignore[no-untyped-def]
    _check_rotate("rotate", *arguments)
    result = reference.rotate(*arguments)
    # An op must not return its input: "none" without scale or permutation is the identity.
    return result.clone() if result.data_ptr() == arguments[0].data_ptr() else result


def _rotate_rows_cpu(*arguments):  # type: ignore[no-untyped-def]
    _check_rotate_rows(*arguments)
    return reference.rotate_rows(*arguments)


def _prepack_cpu(codes: Tensor, in_features: int, weight_bits: int) -> Tensor:
    _check_prepack(codes, in_features, weight_bits)
    return reference.prepack(codes, in_features, weight_bits)


def _unprepack_cpu(weight: Tensor, out_features: int, in_features: int, weight_bits: int) -> Tensor:
    _check_weight("unprepack", weight, out_features, in_features, weight_bits)
    return reference.unprepack(weight, out_features, in_features, weight_bits)


def _dequantize_cpu(*arguments):  # type: ignore[no-untyped-def]
    _check_dequantize(*arguments)
    return reference.dequantize(*arguments)


def _gemm_cpu(*arguments):  # type: ignore[no-untyped-def]
    _check_gemm(*arguments)
    return reference.gemm(*arguments)


def _gemm_config_cpu(*arguments):  # type: ignore[no-untyped-def]
    _check_gemm_config(*arguments)
    return reference.gemm(*arguments[:-1])


def _gemv_cpu(*arguments):  # type: ignore[no-untyped-def]
    _check_gemv(*arguments)
    return reference.gemv(*arguments)


def _gemm_a16_cpu(*arguments):  # type: ignore[no-untyped-def]
    _check_gemm_a16(*arguments)
    few = arguments[0].shape[0] <= GEMV_MAX_ROWS
    return (reference.gemv if few else reference.gemm_a16)(*arguments[:7])


# ---- Triton kernels, imported on the first CUDA call --------------------------------------------


def _rotate_quantize_cuda(
    x: Tensor,
    channel_scale: Tensor | None,
    permutation: Tensor | None,
    matrices: Tensor | None,
    rotation: str,
    block_size: int,
    act_bits: int,
    scale_mode: str,
    scale_factor: float,
) -> tuple[Tensor, Tensor]:
    from . import rotate_quantize as kernels

    arguments = (x, channel_scale, permutation, matrices, rotation, block_size)
    _check_rotate("rotate_quantize", *arguments)
    _check_choice("rotate_quantize", "dtype of x on CUDA", x.dtype, FLOAT_DTYPES)
    _check_quantize(act_bits, scale_mode, scale_factor)
    return kernels.rotate_quantize(*arguments, act_bits, scale_mode, scale_factor)


def _rotate_cuda(*arguments):  # type: ignore[no-untyped-def]
    from . import rotate_quantize as kernels

    _check_rotate("rotate", *arguments)
    _check_choice("rotate", "dtype of x on CUDA", arguments[0].dtype, FLOAT_DTYPES)
    return kernels.rotate(*arguments)


# ---- fakes --------------------------------------------------------------------------------------


def _rotate_quantize_fake(  # type: ignore[no-untyped-def]
    x, channel_scale, permutation, matrices, rotation, block_size, act_bits, mode, factor
):
    _check_rotate("rotate_quantize", x, channel_scale, permutation, matrices, rotation, block_size)
    _check_quantize(act_bits, mode, factor)
    scale_dtype = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=scale_dtype)


def _rotate_fake(x, channel_scale, permutation, matrices, rotation, block_size):  # type: ignore[no-untyped-def]
    _check_rotate("rotate", x, channel_scale, permutation, matrices, rotation, block_size)
    return x.new_empty(x.shape)


def _rotate_rows_fake(*arguments):  # type: ignore[no-untyped-def]
    in_features = _check_rotate_rows(*arguments)
    x = arguments[0]
    scale_dtype = torch.promote_types(x.dtype, torch.float32)
    x_q = x.new_empty((*x.shape[:-1], in_features), dtype=torch.int8)
    return x_q, x.new_empty(x.shape[:-1], dtype=scale_dtype)


def _prepack_fake(codes, in_features, weight_bits):  # type: ignore[no-untyped-def]
    _check_prepack(codes, in_features, weight_bits)
    return codes.new_empty(_weight_shape(codes.shape[0], in_features, weight_bits))


def _unprepack_fake(weight, out_features, in_features, weight_bits):  # type: ignore[no-untyped-def]
    _check_weight("unprepack", weight, out_features, in_features, weight_bits)
    return weight.new_empty(out_features, packed_words(in_features, weight_bits))


def _dequantize_fake(*arguments):  # type: ignore[no-untyped-def]
    _check_dequantize(*arguments)
    weight, _, _, out_features, in_features, _, out_dtype = arguments
    return weight.new_empty(out_features, in_features, dtype=out_dtype)


def _gemm_fake(*arguments):  # type: ignore[no-untyped-def]
    _check_gemm(*arguments)
    x_q, out_features, out_dtype = arguments[0], arguments[9], arguments[11]
    return x_q.new_empty(x_q.shape[0], out_features, dtype=out_dtype)


def _gemm_config_fake(*arguments):  # type: ignore[no-untyped-def]
    _check_gemm_config(*arguments)
    return _gemm_fake(*arguments[:-1])


def _gemv_fake(*arguments):  # type: ignore[no-untyped-def]
    _check_gemv(*arguments)
    return arguments[0].new_empty(arguments[0].shape[0], arguments[6])


def _gemm_a16_fake(*arguments):  # type: ignore[no-untyped-def]
    _check_gemm_a16(*arguments)
    return arguments[0].new_empty(arguments[0].shape[0], arguments[6])


_CPU = {
    "rotate_quantize": _rotate_quantize_cpu,
    "rotate": _rotate_cpu,
    "_rotate_rows": _rotate_rows_cpu,
    "prepack": _prepack_cpu,
    "unprepack": _unprepack_cpu,
    "dequantize": _dequantize_cpu,
    "gemm": _gemm_cpu,
    "gemm_config": _gemm_config_cpu,
    "gemv": _gemv_cpu,
    "gemm_a16": _gemm_a16_cpu,
}
_FAKE = {
    "rotate_quantize": _rotate_quantize_fake,
    "rotate": _rotate_fake,
    "_rotate_rows": _rotate_rows_fake,
    "prepack": _prepack_fake,
    "unprepack": _unprepack_fake,
    "dequantize": _dequantize_fake,
    "gemm": _gemm_fake,
    "gemm_config": _gemm_config_fake,
    "gemv": _gemv_fake,
    "gemm_a16": _gemm_a16_fake,
}
for _name in _SCHEMAS:
    _library.impl(_name, _CPU[_name], "CPU")
    torch.library.register_fake(f"lrq::{_name}", _FAKE[_name], lib=_library)
_library.impl("rotate_quantize", _rotate_quantize_cuda, "CUDA")
_library.impl("rotate", _rotate_cuda, "CUDA")


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
) -> Tensor:
    """Prepacked weight to [N, K] in out_dtype (bf16, fp16 or fp32)."""
    return torch.ops.lrq.dequantize.default(
        weight, levels, weight_scale, out_features, in_features, weight_bits, out_dtype
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
    )


def gemv(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    out_features: int,
) -> Tensor:
    """Weight-only linear for at most 16 rows, x [M, K] in 16 bits. See reference.gemv."""
    return torch.ops.lrq.gemv.default(
        x, weight, levels, weight_scale, bias, weight_bits, out_features
    )


def gemm_a16(
    x: Tensor,
    weight: Tensor,
    levels: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    weight_bits: int,
    out_features: int,
    tile_m: int = 0,
) -> Tensor:
    """Weight-only linear for any number of rows, x [M, K] -> [M, N] of x's dtype.

    gemv for at most 16 rows of 16 bits; above that a kernel that decodes into the product on
    Hopper, dequantize and torch's linear elsewhere, for fp32, and where _planner.a16_tile finds it
    quicker. tile_m, tokens of a tile of that kernel, is for tests and benchmarks; there the kernel
    runs for few rows too. See reference.gemm_a16.
    """
    return torch.ops.lrq.gemm_a16.default(
        x, weight, levels, weight_scale, bias, weight_bits, out_features, tile_m
    )
