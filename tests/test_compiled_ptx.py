"""The code that Triton makes of the kernels of a token, run on the CPU: right codes in bf16, every
byte in its place, no access past the end of a tensor. See ptx_emulator.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compiled_kernels import activation_kernel, norm_kernel, row_kernel
from ptx_emulator import Kernel
from rotate_cases import (
    Case,
    assert_codes_of_rounded_norm,
    assert_codes_within_tie_budget,
    assert_rotated_within_rounding,
    assert_rounded_norm,
    assert_rounded_once,
    draw,
    norm_oracle,
    not_interpreted,
)
from test_fused_rotate_quantize import RMS_INT4, SCALE_ERROR, TIE_RATE, draw_vectors

from lrq_kernels import reference, rotate_kernels
from lrq_kernels.rotate_quantize import row_launch

pytestmark = not_interpreted
Tensor = torch.Tensor
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
TOKENS = 2


def run(kernel, compiled, num_warps: int, values: dict[str, object]) -> None:
    """Every program of a compiled kernel; values by the names of its arguments that it kept."""
    program = Kernel(compiled.asm["ptx"], 32 * num_warps)
    arguments = [values[name] for name in kernel.arg_names if name in values]
    for token in range(TOKENS):
        program(token, arguments)


def memory(tensor: Tensor) -> np.ndarray:
    """The bytes of a contiguous tensor; what is written to them is seen in it."""
    return tensor.view(torch.uint8).numpy()


def outputs(in_features: int) -> tuple[Tensor, Tensor]:
    """Poisoned: whatever a kernel leaves out shows. Rows are of a multiple of eight."""
    shape = (TOKENS, -(-in_features // 8) * 8)
    return torch.full(shape, 99, dtype=torch.int8), torch.full((TOKENS,), torch.nan)


def shared_values(tensors: tuple, case: Case, out: Tensor, x_scale: Tensor | None) -> dict:
    _, channel_scale, permutation, _ = tensors
    rms = case.scale_mode == "rms"
    values: dict[str, object] = {
        "channel_scale_ptr": memory(channel_scale),
        "out_ptr": memory(out),
        "step_factor": case.scale_factor if rms else case.scale_factor / case.qmax,
    }
    if permutation is not None:
        values["permutation_ptr"] = memory(permutation)
    if x_scale is not None:
        values["x_scale_ptr"] = memory(x_scale)
    return values


def warps(in_features: int, case: Case) -> int:
    return row_launch(in_features, case.block_size if case.rotation == "hadamard" else 1).num_warps


@pytest.mark.parametrize(
    "in_features, case, dtype, permuted",
    [
        (3072, Case(), torch.bfloat16, False),
        (1152, Case(), torch.bfloat16, True),  # chunks of 32 and 4
        (1920, Case(), torch.float16, False),  # padded or not, chunks of every size
        (9728, Case(), torch.bfloat16, False),  # four warps
        (2048, Case(block_size=1024), torch.bfloat16, False),
        (1536, Case(block_size=512, **RMS_INT4), torch.bfloat16, True),
        (1280, Case(block_size=256), torch.float32, False),
        (192, Case(block_size=64, **RMS_INT4), torch.bfloat16, False),
        (96, Case(block_size=32), torch.bfloat16, False),
        (1000, Case("none"), torch.bfloat16, False),
        (1001, Case("none"), torch.bfloat16, True),  # no two columns in one access
    ],
)
def test_codes(in_features: int, case: Case, dtype: torch.dtype, permuted: bool) -> None:
    tensors = draw(TOKENS, in_features, dtype, case, permuted=permuted)
    x, (x_q, x_scale) = tensors[0], outputs(in_features)
    aligned = in_features % 16 == 0
    compiled = row_kernel(in_features, case, NAMES[dtype], 90, permuted=permuted, aligned=aligned)
    sources = {"x_ptr": memory(x), "x_row_stride": in_features, "second_row_stride": 0}
    values = sources | shared_values(tensors, case, x_q, x_scale)
    run(rotate_kernels.row_kernel, compiled, warps(in_features, case), values)
    assert not x_q[:, in_features:].any()
    x_q = x_q[:, :in_features].contiguous()
    assert_codes_within_tie_budget(x_q, x_scale, tensors, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotated_row(dtype: torch.dtype) -> None:
    case = Case()
    tensors, y = draw(TOKENS, 1152, dtype, case), torch.full((TOKENS, 1152), torch.nan).to(dtype)
    compiled = row_kernel(1152, case, NAMES[dtype], 90, quantize=False)
    sources = {"x_ptr": memory(tensors[0]), "x_row_stride": 1152, "second_row_stride": 0}
    values = sources | shared_values(tensors, case, y, None)
    run(rotate_kernels.row_kernel, compiled, warps(1152, case), values)
    assert_rotated_within_rounding(y, tensors, case)


def test_special_rows() -> None:
    case = Case()
    tensors, (x_q, x_scale) = draw(TOKENS, 384, torch.bfloat16, case), outputs(384)
    tensors[0][0, 5], tensors[0][1] = float("nan"), 0.0
    compiled = row_kernel(384, case, "bf16", 90)
    sources = {"x_ptr": memory(tensors[0]), "x_row_stride": 384, "second_row_stride": 0}
    values = sources | shared_values(tensors, case, x_q, x_scale)
    run(rotate_kernels.row_kernel, compiled, warps(384, case), values)
    assert x_scale[0].isnan() and x_scale[1] == 0 and not x_q.any()


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("split, in_features", [(1024, 5120), (1000, 1152), (37, 384)])
def test_two_sources(split: int, in_features: int, permuted: bool) -> None:
    case = Case()
    tensors = draw(TOKENS, in_features, torch.bfloat16, case, permuted=permuted)
    x_q, x_scale = outputs(in_features)
    first, second = (part.contiguous() for part in tensors[0].tensor_split([split], dim=1))
    # Rows of 37 values do not begin on 16 bytes: not what the compiler was promised.
    compiled = row_kernel(
        in_features, case, "bf16", 90, split=split, permuted=permuted, aligned=split % 8 == 0
    )
    sources = {
        "x_ptr": memory(first),
        "x_row_stride": split,
        "second_ptr": memory(second),
        "second_row_stride": in_features - split,
    }
    values = sources | shared_values(tensors, case, x_q, x_scale)
    run(rotate_kernels.row_kernel, compiled, warps(in_features, case), values)
    assert_codes_within_tie_budget(x_q, x_scale, tensors, case)


@pytest.mark.parametrize("name", ["gelu_tanh", "silu"])
def test_activation(name: str) -> None:
    """A pair for "silu"; both keep what they quantize. erf is a call that is not emulated."""
    case, k = Case(), 1152
    tensors, (x_q, x_scale) = draw(TOKENS, k, torch.bfloat16, case), outputs(k)
    x, kept = tensors[0], torch.full((TOKENS, k), torch.nan).bfloat16()
    gate = torch.randn(TOKENS, k).bfloat16() if name == "silu" else None
    compiled, num_warps = activation_kernel(name, gate is not None, True, k, 90)
    sources = {
        "x_ptr": memory(x),
        "x_row_stride": k,
        "gate_row_stride": k,
        "kept_ptr": memory(kept),
    }
    if gate is not None:
        sources["gate_ptr"] = memory(gate)
    values = sources | shared_values(tensors, case, x_q, x_scale)
    run(rotate_kernels.activation_kernel, compiled, num_warps, values)
    y = reference.activate(x.double(), None if gate is None else gate.double(), name)
    assert_codes_within_tie_budget(
        x_q, x_scale, (y, *tensors[1:]), case, tie_rate=TIE_RATE, scale_error=SCALE_ERROR
    )
    assert_rounded_once(kept, y)


@pytest.mark.parametrize(
    "norm, affine, in_features, permuted",
    [
        ("layer", False, 3072, False),
        ("layer", True, 4608, False),  # two warps
        ("rms", True, 1152, True),
        ("layer", True, 1000, False),  # padding that a mean must not count
    ],
)
def test_norm(norm: str, affine: bool, in_features: int, permuted: bool) -> None:
    """Two samples of one token each. scale and shift are fp32: operations in bf16 are not
    emulated."""
    case = Case() if in_features % 128 == 0 else Case("none")
    tensors = draw(TOKENS, in_features, torch.bfloat16, case, permuted=permuted)
    x, (x_q, x_scale) = tensors[0] + 1.0, outputs(in_features)
    weight, bias, scale, shift = draw_vectors(TOKENS, in_features, torch.bfloat16)
    scale, shift, bias = scale.contiguous(), shift.float().contiguous(), bias.float()
    keep = not permuted
    compiled, num_warps = norm_kernel(
        norm, affine, keep, in_features, 90, case=case, permuted=permuted, vectors="fp32"
    )
    kept = torch.full(x.shape, torch.nan).bfloat16()
    sources = {
        "x_ptr": memory(x),
        "x_sample_stride": in_features,
        "x_row_stride": in_features,
        "tokens_per_sample": 1,
        "scale_ptr": memory(scale),
        "scale_row_stride": in_features,
        "shift_ptr": memory(shift),
        "shift_row_stride": in_features,
        "eps": 1e-6,
    }
    if affine:
        sources |= {"norm_weight_ptr": memory(weight), "norm_bias_ptr": memory(bias)}
    if keep:
        sources["kept_ptr"] = memory(kept)
    values = sources | shared_values(tensors, case, x_q, x_scale)
    run(rotate_kernels.norm_kernel, compiled, num_warps, values)
    vectors = (weight, bias) if affine else (None, None)
    y = norm_oracle(x[:, None], (*vectors, scale, shift), norm, 1e-6)[:, 0]
    assert_codes_of_rounded_norm(x_q, x_scale, (y, *tensors[1:]), case)
    if keep:
        assert_rounded_norm(kept, y)


def test_a_swapped_byte_would_be_seen() -> None:
    """The fault that an earlier form of the kernel had: codes 1 and 2 of every four."""
    case = Case()
    tensors, (x_q, x_scale) = draw(TOKENS, 384, torch.bfloat16, case), outputs(384)
    compiled = row_kernel(384, case, "bf16", 90)
    ptx = compiled.asm["ptx"]
    assert ptx.count("0x5410U") > 0, "the selector that puts two halves of a word together"
    compiled.asm = {"ptx": ptx.replace("0x5410U", "0x5140U")}
    sources = {"x_ptr": memory(tensors[0]), "x_row_stride": 384, "second_row_stride": 0}
    values = sources | shared_values(tensors, case, x_q, x_scale)
    run(rotate_kernels.row_kernel, compiled, warps(384, case), values)
    with pytest.raises(AssertionError, match="codes differ"):
        assert_codes_within_tie_budget(x_q, x_scale, tensors, case)
