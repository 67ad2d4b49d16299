"""The ops as torch sees them: schemas, fakes, compilation, fresh outputs, and every error message.

What the ops compute is held by test_reference.py (CPU), test_gemm.py, test_gemv.py, test_prepack.py
and test_rotate_quantize.py (GPU); all of qk_norm_rope's by test_qk_norm_rope.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_samples import (
    SAMPLES,
    VALID,
    Arguments,
    K,
    M,
    N,
    call,
    flat,
    gemm_arguments,
    norm_arguments,
)
from torch._subclasses import FakeTensorMode

from lrq_kernels import cuda_library_status, ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
sampled = pytest.mark.parametrize(
    ("op", "make"),
    [pytest.param(op, make, id=f"{op}-{name}") for op, name, make in SAMPLES],
)


def test_every_op_has_a_sample():
    assert set(VALID) == set(ops._SCHEMAS)


# ---- what torch asks of an op -------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@sampled
def test_opcheck(op: str, make: Callable[[str], Arguments], device: str):
    torch.library.opcheck(getattr(torch.ops.lrq, op).default, tuple(make(device).values()))


@pytest.mark.parametrize("device", DEVICES)
@sampled
def test_outputs_are_fresh_contiguous_and_repeatable(
    op: str, make: Callable[[str], Arguments], device: str
):
    arguments = make(device)
    inputs = [value for value in arguments.values() if isinstance(value, torch.Tensor)]
    before = [tensor.clone() for tensor in inputs]
    first, second = flat(call(op, arguments)), flat(call(op, arguments))
    for one, other in zip(first, second, strict=True):
        assert one.is_contiguous()
        assert torch.equal(one, other)
        if one.numel():
            storages = {tensor.untyped_storage().data_ptr() for tensor in inputs}
            assert one.untyped_storage().data_ptr() not in storages
            assert one.data_ptr() != other.data_ptr()
    assert all(map(torch.equal, inputs, before))


@pytest.mark.parametrize("device", DEVICES)
@sampled
def test_compiles_without_a_graph_break(op: str, make: Callable[[str], Arguments], device: str):
    arguments = make(device)
    torch._dynamo.reset()

    def run(*values: Any) -> Any:
        return call(op, dict(enumerate(values)))

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        flat(compiled(*arguments.values())), flat(call(op, arguments)), strict=True
    ):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_one_compiled_graph_serves_every_number_of_tokens(device: str):
    problem = gemm_arguments(device)

    def linear(x: torch.Tensor) -> torch.Tensor:
        x_q, x_scale = ops.rotate_quantize(x, None, None, None, "hadamard", 128, 8)
        return ops.gemm(x_q, x_scale, *list(problem.values())[2:])

    torch._dynamo.reset()
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, K).to(device, torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 0)  # an error if a check of an op ties the graph to one M
    assert torch.equal(compiled(x), linear(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (64, 3, 17):
            x = torch.randn(rows, K).to(device, torch.bfloat16)
            assert torch.equal(compiled(x), linear(x))


@pytest.mark.parametrize("device", DEVICES)
def test_one_compiled_norm_serves_every_number_of_tokens(device: str):
    """Its samples are counted in the checks: they must not tie the graph to one M or T."""
    constants = list(norm_arguments(device).values())[1:]

    def run(x: torch.Tensor) -> Any:
        return torch.ops.lrq.norm_modulate_rotate_quantize.default(x, *constants)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 5, K).to(device, torch.bfloat16)
    torch._dynamo.mark_dynamic(x, 1)
    assert all(map(torch.equal, compiled(x), run(x)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (64, 3, 17):
            x = torch.randn(2, tokens, K).to(device, torch.bfloat16)
            assert all(map(torch.equal, compiled(x), run(x)))


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_inductor_runs_the_two_launches_of_a_linear(device: str):
    problem = gemm_arguments(device)

    def linear(x: torch.Tensor) -> torch.Tensor:
        x_q, x_scale = ops.rotate_quantize(x * 2, None, None, None, "hadamard", 128, 8)
        return ops.gemm(x_q, x_scale, *list(problem.values())[2:]) + 1

    torch._dynamo.reset()
    x = torch.randn(M, K).to(device, torch.bfloat16)
    assert torch.equal(torch.compile(linear, fullgraph=True)(x), linear(x))


@pytest.mark.parametrize("device", DEVICES)
def test_autocast_changes_nothing(device: str):
    for op, make in VALID.items():
        arguments = make(device)
        if op == "gemm_a16":  # by torch's own product
            arguments["x"] = arguments["x"].float()
        expected = flat(call(op, arguments))
        with torch.autocast(device, dtype=torch.bfloat16):
            for got, want in zip(flat(call(op, arguments)), expected, strict=True):
                assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("device", DEVICES)
def test_gate_and_residual_may_have_row_strides(device: str):
    arguments = gemm_arguments(device, torch.float32, samples=2)
    expected = call("gemm", arguments)
    for name in ("residual", "gate"):
        tensor = arguments[name]
        wide = torch.full((tensor.shape[0], N + 3), float("nan"), device=device)
        wide[:, 2:-1] = tensor
        arguments[name] = wide[:, 2:-1]
    assert torch.equal(call("gemm", arguments), expected)


# ---- arguments that are wrong -------------------------------------------------------------------

Change = Callable[[Arguments, str], Arguments]


def other_device(device: str) -> str:
    """A device that is certainly another one; on it the op runs no kernel."""
    return "meta" if device == "cpu" else "cpu"


def put(**values: Any) -> Change:
    """Replaces arguments by values, or by what a function of the old value gives."""

    def change(arguments: Arguments, device: str) -> Arguments:
        changed = dict(arguments)
        for name, value in values.items():
            changed[name] = value(arguments[name]) if callable(value) else value
        return changed

    return change


def fill(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    def change(arguments: Arguments, device: str) -> Arguments:
        return {**arguments, name: torch.ones(shape, dtype=dtype, device=device)}

    return change


def elsewhere(name: str) -> Change:
    def change(arguments: Arguments, device: str) -> Arguments:
        return {**arguments, name: arguments[name].to(other_device(device))}

    return change


def every_other(tensor: torch.Tensor) -> torch.Tensor:
    """The same values and shape, not contiguous."""
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


def columns_first(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T.contiguous().T


def both(*changes: Change) -> Change:
    def change(arguments: Arguments, device: str) -> Arguments:
        for each in changes:
            arguments = each(arguments, device)
        return arguments

    return change


GATED = both(fill("residual", M, N, dtype=torch.bfloat16), fill("gate", 2, N, dtype=torch.bfloat16))
NO_BIAS_INT32 = put(bias=None, out_dtype=torch.int32)

QUANTIZING = (
    "rotate_quantize concat_rotate_quantize activation_rotate_quantize"
    " norm_modulate_rotate_quantize"
)
ROTATING = "rotate " + QUANTIZING
NORM = "norm_modulate_rotate_quantize"

# op (or ops), change of valid arguments, argument named, expected, got
ERRORS: list[tuple[str, Change, str, str, str]] = [
    (ROTATING, put(rotation="fourier"), "rotation", "one of ('none', 'hadamard', 'dual')",
     "'fourier'"),
    ("rotate rotate_quantize", put(x=lambda x: x.to(torch.int32)), "dtype of x", "one of",
     "torch.int32"),
    ("rotate rotate_quantize", put(x=lambda x: x[0, 0]), "x", "of at least one dimension",
     "a scalar"),
    ("rotate rotate_quantize", put(x=columns_first), "x", "of last stride 1", "strides"),
    (ROTATING, put(block_size=96), "block_size",
     "one of (32, 64, 128, 256, 512, 1024)", "96"),
    (ROTATING, put(block_size=256), "K", "a multiple of block_size 256", "128"),
    (ROTATING, put(rotation="dual"), "matrices", "given exactly when", "without"),
    (ROTATING, fill("matrices", 2, 128, 128), "matrices", "given exactly when",
     "'hadamard' with"),
    (ROTATING,
     both(put(rotation="dual", block_size=64), fill("matrices", 2, 128, 128)), "block_size",
     "one of (128,)", "64"),
    (ROTATING, both(put(rotation="dual"), fill("matrices", 2, 64, 64)), "matrices",
     "torch.float32 [2, 128, 128]", "torch.float32 [2, 64, 64]"),
    (ROTATING, put(channel_scale=lambda s: s.double()), "dtype of channel_scale",
     "one of (torch.float32, torch.bfloat16)", "torch.float64"),
    (ROTATING,
     both(put(rotation="dual"), both(fill("matrices", 2, 128, 128),
                                     put(channel_scale=lambda s: s.bfloat16()))),
     "dtype of channel_scale", "one of (torch.float32,)", "torch.bfloat16"),
    (ROTATING, fill("channel_scale", 127), "channel_scale", "torch.float32 [128]",
     "torch.float32 [127]"),
    (ROTATING, put(channel_scale=every_other), "channel_scale", "contiguous",
     "strides"),
    (ROTATING, elsewhere("channel_scale"), "channel_scale", "on ", "a tensor on"),
    (ROTATING, put(permutation=lambda p: p.long()), "permutation",
     "torch.int32 [128]", "torch.int64 [128]"),
    (ROTATING, fill("permutation", 1, 128, dtype=torch.int32), "permutation",
     "torch.int32 [128]", "torch.int32 [1, 128]"),
    (ROTATING, elsewhere("permutation"), "permutation", "on ", "a tensor on"),
    (QUANTIZING, put(act_bits=16), "act_bits", "one of (4, 8)", "16"),
    (QUANTIZING, put(scale_mode="max"), "scale_mode", "one of ('absmax', 'rms')", "'max'"),
    (QUANTIZING, put(scale_factor=0.0), "scale_factor", "positive and finite", "0.0"),
    (QUANTIZING, put(scale_factor=float("nan")), "scale_factor", "positive and finite",
     "nan"),
    (QUANTIZING, put(scale_factor=float("inf")), "scale_factor", "positive and finite",
     "inf"),
    ("activation_rotate_quantize norm_modulate_rotate_quantize",
     put(x=lambda x: x.to(torch.int32)), "dtype of x", "one of", "torch.int32"),
    ("activation_rotate_quantize norm_modulate_rotate_quantize", put(x=every_other), "x",
     "of last stride 1", "strides"),
    ("concat_rotate_quantize", put(first=lambda x: x.to(torch.int32)), "dtype of first", "one of",
     "torch.int32"),
    ("concat_rotate_quantize", put(first=lambda x: x[0, 0]), "first", "of at least one dimension",
     "a scalar"),
    ("concat_rotate_quantize", put(first=every_other), "first", "of last stride 1", "strides"),
    ("concat_rotate_quantize", put(second=every_other), "second", "of last stride 1", "strides"),
    ("concat_rotate_quantize", put(second=lambda x: x.float()), "second",
     f"torch.bfloat16 [{M}, 32]", f"torch.float32 [{M}, 32]"),
    ("concat_rotate_quantize", put(second=lambda x: x[1:]), "second", f"torch.bfloat16 [{M}, 32]",
     f"torch.bfloat16 [{M - 1}, 32]"),
    ("concat_rotate_quantize", put(second=lambda x: x[0, 0]), "second",
     f"torch.bfloat16 [{M}, 0]", "torch.bfloat16 []"),
    ("concat_rotate_quantize", elsewhere("second"), "second", "on ", "a tensor on"),
    ("concat_rotate_quantize", put(second=lambda x: x[:, :31]), "K", "a multiple of block_size 128",
     "127"),
    ("activation_rotate_quantize", put(activation="relu"), "activation",
     "one of ('gelu_tanh', 'gelu_erf', 'silu')", "'relu'"),
    ("activation_rotate_quantize", fill("gate", M, K), "gate", f"torch.bfloat16 [{M}, {K}]",
     f"torch.float32 [{M}, {K}]"),
    ("activation_rotate_quantize", fill("gate", M, K + 1, dtype=torch.bfloat16), "gate",
     f"torch.bfloat16 [{M}, {K}]", f"torch.bfloat16 [{M}, {K + 1}]"),
    ("activation_rotate_quantize",
     both(fill("gate", M, K, dtype=torch.bfloat16), put(gate=columns_first)), "gate",
     "of last stride 1", "strides"),
    ("activation_rotate_quantize",
     both(fill("gate", M, K, dtype=torch.bfloat16), elsewhere("gate")), "gate", "on ",
     "a tensor on"),
    (NORM, put(norm="batch"), "norm", "one of ('layer', 'rms')", "'batch'"),
    (NORM, put(eps=-1e-6), "eps", "finite and not negative", "-1e-06"),
    (NORM, put(eps=float("nan")), "eps", "finite and not negative", "nan"),
    (NORM, put(x=lambda x: x[None]), "x", "[B, T, K] or [M, K]", f"shape [1, 2, {M // 2}, {K}]"),
    (NORM, put(x=lambda x: x[0, 0]), "x", "[B, T, K] or [M, K]", f"shape [{K}]"),
    (NORM, put(norm_weight=lambda t: t.half()), "norm_weight", f"torch.bfloat16 [{K}]",
     f"torch.float16 [{K}]"),
    (NORM, put(norm_weight=lambda t: t[:-1]), "norm_weight", f"torch.bfloat16 [{K}]",
     f"torch.bfloat16 [{K - 1}]"),
    (NORM, put(norm_bias=every_other), "norm_bias", "contiguous", "strides"),
    (NORM, elsewhere("norm_bias"), "norm_bias", "on ", "a tensor on"),
    (NORM, put(scale=lambda t: t.half()), "scale", f"torch.bfloat16 or torch.float32 [2, {K}]",
     f"torch.float16 [2, {K}]"),
    (NORM, put(scale=lambda t: t[0]), "scale", f"torch.bfloat16 or torch.float32 [2, {K}]",
     f"torch.float32 [{K}]"),
    (NORM, put(shift=lambda t: t[:1]), "shift", f"torch.bfloat16 or torch.float32 [2, {K}]",
     f"torch.bfloat16 [1, {K}]"),
    (NORM, put(shift=every_other), "shift", "of last stride 1", "strides"),
    (NORM, elsewhere("scale"), "scale", "on ", "a tensor on"),
    (NORM, put(x=lambda x: x[0]), "scale", f"torch.bfloat16 or torch.float32 [1, {K}]",
     f"torch.float32 [2, {K}]"),
    ("_rotate_rows", put(x=lambda x: x.to(torch.int8)), "dtype of x", "one of", "torch.int8"),
    ("_rotate_rows", put(x=lambda x: x[0]), "x", "torch.bfloat16 [M, K] or [B, T, K]", "[128]"),
    ("_rotate_rows", put(x=columns_first), "x", "of last stride 1", "strides"),
    ("_rotate_rows", put(second=lambda s: s.half()), "second", "torch.bfloat16 [M, K] or [B, T, K]",
     "torch.float16"),
    ("_rotate_rows", put(second=columns_first), "second", "of last stride 1", "strides"),
    ("_rotate_rows", put(second=lambda s: s[:-1]), "second", f"of as many rows as x, [{M}, {K}]",
     f"shape [{M - 1}, {K}]"),
    ("_rotate_rows", elsewhere("second"), "second", "on ", "a tensor on"),
    ("_rotate_rows", put(norm="batch"), "norm", "one of ('none', 'layer', 'rms')", "'batch'"),
    ("_rotate_rows", put(block_size=96), "block_size", "one of (32, 64, 128, 256, 512, 1024)",
     "96"),
    ("_rotate_rows", put(block_size=512), "K", "a multiple of block_size 512", "256"),
    ("_rotate_rows", put(norm="none"), "scale and shift", "given with a norm only", "norm 'none'"),
    ("_rotate_rows", put(scale=lambda s: s.half()), "scale",
     "of dtype torch.bfloat16 or torch.float32", "torch.float16"),
    ("_rotate_rows", put(scale=lambda s: s[:, :-1]), "scale",
     f"[B, {2 * K}] with B a divisor of M = {M}", f"shape [2, {2 * K - 1}]"),
    ("_rotate_rows", put(shift=lambda s: s.repeat(2, 1)), "shift",
     f"[B, {2 * K}] with B a divisor of M = {M}", f"shape [4, {2 * K}]"),
    ("_rotate_rows", put(shift=lambda s: s[:0]), "shift",
     f"[B, {2 * K}] with B a divisor of M = {M}", f"shape [0, {2 * K}]"),
    ("_rotate_rows", put(scale=columns_first), "scale", "of last stride 1", "strides"),
    ("_rotate_rows", elsewhere("shift"), "shift", "on ", "a tensor on"),
    ("_rotate_rows", put(scale=lambda s: s.repeat(3, 1)), "shift", "of as many rows as scale, 6",
     "2"),
    ("_rotate_rows", put(channel_scale=lambda s: s.double()), "channel_scale",
     f"torch.bfloat16 [{2 * K}]", f"torch.float64 [{2 * K}]"),
    ("_rotate_rows", put(channel_scale=every_other), "channel_scale", "contiguous", "strides"),
    ("_rotate_rows", elsewhere("channel_scale"), "channel_scale", "on ", "a tensor on"),
    ("_rotate_rows", put(act_bits=16), "act_bits", "one of (4, 8)", "16"),
    ("_rotate_rows", put(scale_mode="max"), "scale_mode", "one of ('absmax', 'rms')", "'max'"),
    ("_rotate_rows", put(scale_factor=0.0), "scale_factor", "positive and finite", "0.0"),
    ("prepack", put(codes=lambda c: c.flatten()), "codes", "[N, ceil(K/32)*weight_bits]", "shape"),
    ("prepack", put(codes=lambda c: c.to(torch.uint8)), "codes", f"torch.int32 [{N}, 12]",
     f"torch.uint8 [{N}, 12]"),
    ("prepack", put(in_features=K + 1), "codes", f"torch.int32 [{N}, 15]",
     f"torch.int32 [{N}, 12]"),
    ("prepack", put(codes=columns_first), "codes", "contiguous", "strides"),
    ("prepack unprepack dequantize gemm gemv gemm_a16", put(weight_bits=5), "weight_bits",
     "one of (2, 3, 4)", "5"),
    ("unprepack dequantize gemm gemv gemm_a16", put(weight_bits=3), "weight",
     "torch.int32 [1, 1, 2, 768]", "torch.int32 [1, 1, 2, 1024]"),
    ("unprepack dequantize gemm gemv gemm_a16", put(out_features=129), "weight",
     "torch.int32 [2, 1, 2, 1024]", "torch.int32 [1, 1, 2, 1024]"),
    ("unprepack dequantize", put(in_features=K + 1), "weight", "torch.int32 [1, 2, 2, 1024]",
     "torch.int32 [1, 1, 2, 1024]"),
    ("unprepack dequantize gemm gemv gemm_a16", put(weight=lambda w: w.long()), "weight",
     "torch.int32", "torch.int64"),
    ("unprepack dequantize gemm gemv gemm_a16", put(weight=every_other), "weight", "contiguous",
     "strides"),
    ("gemm gemv gemm_a16", elsewhere("weight"), "weight", "on ", "a tensor on"),
    ("dequantize", put(out_dtype=torch.int32), "out_dtype", "one of", "torch.int32"),
    ("dequantize gemm gemv gemm_a16", put(levels=lambda t: t.to(torch.int32)), "levels",
     f"torch.int8 [{N}, 16]", f"torch.int32 [{N}, 16]"),
    ("dequantize gemm gemv gemm_a16", put(levels=lambda t: t[:, :8].contiguous()), "levels",
     f"torch.int8 [{N}, 16]", f"torch.int8 [{N}, 8]"),
    ("dequantize gemm gemv gemm_a16", put(levels=columns_first), "levels", "contiguous", "strides"),
    ("dequantize gemm gemv gemm_a16", elsewhere("levels"), "levels", "on ", "a tensor on"),
    ("dequantize gemm gemv gemm_a16", put(weight_scale=lambda t: t.half()), "weight_scale",
     f"torch.float32 [{N}]", f"torch.float16 [{N}]"),
    ("dequantize gemm gemv gemm_a16", put(weight_scale=every_other), "weight_scale", "contiguous",
     "strides"),
    ("dequantize gemm gemv gemm_a16", elsewhere("weight_scale"), "weight_scale", "on ",
     "a tensor on"),
    ("gemm gemv gemm_a16", put(bias=lambda t: t.bfloat16()), "bias", f"torch.float32 [{N}]",
     f"torch.bfloat16 [{N}]"),
    ("gemm gemv gemm_a16", put(bias=lambda t: t[:-1]), "bias", f"torch.float32 [{N}]",
     f"torch.float32 [{N - 1}]"),
    ("gemm gemv gemm_a16", elsewhere("bias"), "bias", "on ", "a tensor on"),
    ("gemm", put(x_q=lambda x: x.to(torch.int32)), "x_q", "torch.int8 [M, K]",
     f"torch.int32 [{M}, {K}]"),
    ("gemm", put(x_q=lambda x: x[None]), "x_q", "torch.int8 [M, K]", f"torch.int8 [1, {M}, {K}]"),
    ("gemm", put(x_q=columns_first), "x_q", "of strides [multiple of 16, 1]", "strides"),
    ("gemm", put(x_q=lambda x: torch.cat([x, x[:, :8]], dim=1)[:, :K]), "x_q",
     "of strides [multiple of 16, 1]", "strides"),
    ("gemm", put(x_scale=lambda t: t.double()), "x_scale", f"torch.float32 [{M}]",
     f"torch.float64 [{M}]"),
    ("gemm", put(x_scale=lambda t: t[:, None]), "x_scale", f"torch.float32 [{M}]",
     f"torch.float32 [{M}, 1]"),
    ("gemm", put(x_scale=every_other), "x_scale", "contiguous", "strides"),
    ("gemm", elsewhere("x_scale"), "x_scale", "on ", "a tensor on"),
    ("gemm", put(activation="relu"), "activation", "one of ('none', 'gelu_tanh')", "'relu'"),
    ("gemm", put(out_dtype=torch.float64), "out_dtype", "one of", "torch.float64"),
    ("gemm", put(out_dtype=torch.int32), "out_dtype int32", "used without bias and activation",
     "one of them"),
    ("gemm", put(bias=None, out_dtype=torch.int32, activation="gelu_tanh"), "out_dtype int32",
     "used without bias and activation", "one of them"),
    ("gemm", both(NO_BIAS_INT32, fill("residual", M, N, dtype=torch.int32)), "out_dtype int32",
     "used without residual", "a residual"),
    ("gemm", fill("gate", 2, N, dtype=torch.bfloat16), "gate", "given together with residual",
     "gate without residual"),
    ("gemm", fill("residual", M, N), "residual", f"torch.bfloat16 [{M}, {N}]",
     f"torch.float32 [{M}, {N}]"),
    ("gemm", fill("residual", M, N - 1, dtype=torch.bfloat16), "residual",
     f"torch.bfloat16 [{M}, {N}]", f"torch.bfloat16 [{M}, {N - 1}]"),
    ("gemm", both(GATED, put(residual=columns_first)), "residual", "of last stride 1", "strides"),
    ("gemm", both(GATED, elsewhere("residual")), "residual", "on ", "a tensor on"),
    ("gemm", both(GATED, fill("gate", 4, N, dtype=torch.bfloat16)), "gate",
     f"[B, N] with B a divisor of M = {M}", f"shape [4, {N}]"),
    ("gemm", both(GATED, fill("gate", 0, N, dtype=torch.bfloat16)), "gate",
     f"[B, N] with B a divisor of M = {M}", f"shape [0, {N}]"),
    ("gemm", both(GATED, put(gate=lambda g: g[0])), "gate", f"[B, N] with B a divisor of M = {M}",
     f"shape [{N}]"),
    ("gemm", both(GATED, fill("gate", 2, N - 1, dtype=torch.bfloat16)), "gate",
     f"torch.bfloat16 [2, {N}]", f"torch.bfloat16 [2, {N - 1}]"),
    ("gemm", both(GATED, fill("gate", 2, N)), "gate", f"torch.bfloat16 [2, {N}]",
     f"torch.float32 [2, {N}]"),
    ("gemm", both(GATED, put(gate=columns_first)), "gate", "of last stride 1", "strides"),
    ("gemm", both(GATED, elsewhere("gate")), "gate", "on ", "a tensor on"),
    ("gemm_config", put(config=-1), "config", "", "-1"),
    ("gemm_config", put(activation="relu"), "activation", "one of ('none', 'gelu_tanh')", "'relu'"),
    ("gemv", put(x=lambda x: x.to(torch.int8)), "dtype of x", "one of", "torch.int8"),
    ("gemv", put(x=lambda x: x.repeat(9, 1)), "x", "[M, K] with M at most 16", f"shape [18, {K}]"),
    ("gemv", put(x=lambda x: x[0]), "x", "[M, K] with M at most 16", f"shape [{K}]"),
    ("gemv gemm_a16", put(x=columns_first), "x", "of last stride 1", "strides"),
    ("gemm_a16", put(x=lambda x: x.to(torch.int8)), "dtype of x", "one of", "torch.int8"),
    ("gemm_a16", put(x=lambda x: x[0]), "x", "[M, K]", f"shape [{K}]"),
    ("gemm_a16", put(tile=-2), "tile", "", "-2"),
]  # fmt: skip
CASES = [
    pytest.param(op, *case, id=f"{op}-{case[1]}-{index}")
    for index, (names, *case) in enumerate(ERRORS)
    for op in names.split()
]


def argument_pattern(op: str, argument: str, expected: str, got: str) -> str:
    expected, got = re.escape(expected), re.escape(got)
    return f"lrq::{op}: {argument}( on CUDA)? must be .*{expected}.*, got .*{got}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("op", "change", "argument", "expected", "got"), CASES)
def test_error_names_argument_expected_and_got(
    op: str, change: Change, argument: str, expected: str, got: str, device: str
):
    arguments = VALID[op](device)
    call(op, arguments)  # right before the change
    with pytest.raises(ValueError, match=argument_pattern(op, argument, expected, got)):
        call(op, change(arguments, device))


@pytest.mark.parametrize(("op", "change", "argument", "expected", "got"), CASES)
def test_fakes_raise_the_same_errors(
    op: str, change: Change, argument: str, expected: str, got: str
):
    """Under torch.compile the error must come while tracing, not from a kernel later."""
    wrong = change(VALID[op]("cpu"), "cpu")
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            for name, value in wrong.items()
        }
        with pytest.raises(ValueError, match=argument_pattern(op, argument, expected, got)):
            call(op, fake)


@pytest.mark.parametrize(("op", "change", "argument", "expected", "got"), CASES)
def test_checks_of_the_cuda_library_without_a_gpu(
    op: str, change: Change, argument: str, expected: str, got: str
):
    """CPU tensors given to the CUDA kernels: the checks before that of the device must speak."""
    if op in ROTATING.split() or not cuda_library_status().startswith("loaded"):
        pytest.skip("needs a compiled kernel of csrc")
    to_cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    arguments = change(VALID[op]("cpu"), "cpu")
    with pytest.raises(ValueError) as error:
        getattr(torch.ops.lrq, op).default.redispatch(to_cuda, *arguments.values())
    if "got a tensor on a device that is not CUDA" not in str(error.value):
        assert re.search(argument_pattern(op, argument, expected, got), str(error.value))


@pytest.mark.gpu
@pytest.mark.parametrize("op", [*ROTATING.split(), "gemv", "gemm_a16"])
def test_float64_is_for_the_cpu_alone(op: str):
    arguments = VALID[op]("cuda")
    names = [name for name in ("x", "first", "second") if name in arguments]
    for name in names:
        arguments[name] = arguments[name].double()
    # Of norm_modulate's vectors those in bf16 would be another error.
    for name in {"norm_weight", "shift"} & set(arguments):
        arguments[name] = arguments[name].float()
    pattern = f"lrq::{op}: dtype of {names[0]} on CUDA must be .*torch.float64"
    with pytest.raises(ValueError, match=pattern):
        call(op, arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["gemm", "gemv", "gemm_a16"])
def test_addresses_that_the_kernels_cannot_read_are_refused(op: str):
    arguments = VALID[op]("cuda")
    shifted = torch.empty(arguments["levels"].numel() + 16, dtype=torch.int8, device="cuda")
    arguments["levels"] = shifted[1 : 1 + N * 16].view(N, 16)
    with pytest.raises(ValueError, match=f"lrq::{op}: levels must be aligned to 16 bytes, got .*1"):
        call(op, arguments)


@pytest.mark.gpu
def test_x_q_must_start_on_16_bytes():
    arguments = gemm_arguments("cuda")
    wide = torch.zeros(M, K + 16, dtype=torch.int8, device="cuda")
    arguments["x_q"] = wide[:, 8 : 8 + K]
    with pytest.raises(ValueError, match="lrq::gemm: x_q must be aligned to 16 bytes, got .*8"):
        call("gemm", arguments)
