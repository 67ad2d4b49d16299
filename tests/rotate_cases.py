"""What the tests of rotate_quantize and its fused forms share: cases, data, and the rules by which
results are judged against the float64 oracle of reference.py.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import pytest
import torch

from lrq_kernels import ops, reference

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
in_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_kernels_in_interpreter")

# kernels.md section 6: a code may differ by 1 where v / x_scale is this close to a half ...
TIE_DISTANCE = 1e-3
# ... in this share of the codes; SMALL_SAMPLE codes more, for samples too small to show a rate.
TIE_RATE = 20e-6
SMALL_SAMPLE = 2
SCALE_ERROR = 1e-6
# fp32 error of one rotated value, relative to the largest of its row.
ROTATION_ERROR = 1e-6


@dataclass(frozen=True)
class Case:
    """The arguments of the ops that are not tensors."""

    rotation: str = "hadamard"
    block_size: int = 128
    act_bits: int = 8
    scale_mode: str = "absmax"
    scale_factor: float = 1.0

    @property
    def qmax(self) -> int:
        return 2 ** (self.act_bits - 1) - 1

    @property
    def rotate_arguments(self) -> tuple[str, int]:
        return self.rotation, self.block_size

    @property
    def arguments(self) -> tuple[str, int, int, str, float]:
        return (*self.rotate_arguments, self.act_bits, self.scale_mode, self.scale_factor)


Tensors = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


def draw(
    tokens: int,
    in_features: int,
    dtype: torch.dtype,
    case: Case,
    *,
    permuted: bool = False,
    device: str = "cpu",
    narrow: bool = False,
) -> Tensors:
    """x [M, K] with a few loud channels, channel_scale with signs, permutation, matrices. narrow:
    channel_scale in bf16."""
    x = torch.randn(tokens, in_features, device=device)
    x[:, :: max(1, in_features // 8)] *= 20.0
    signs = torch.randint(0, 2, (in_features,), device=device) * 2 - 1
    channel_scale = (torch.rand(in_features, device=device) + 0.5) * signs
    if narrow:
        channel_scale = channel_scale.bfloat16()
    permutation = torch.randperm(in_features, device=device).int() if permuted else None
    matrices = None
    if case.rotation == "dual":
        matrices = torch.linalg.qr(torch.randn(2, 128, 128, device=device)).Q.contiguous()
    return x.to(dtype), channel_scale, permutation, matrices


def launch(op: str, *arguments: object) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """The op on a GPU through the dispatcher, or its kernels in the interpreter."""
    if not INTERPRETED:
        return getattr(ops, op)(*arguments)
    from lrq_kernels import rotate_quantize as kernels

    return getattr(kernels, op)(*arguments)


def _compared(
    x_q: torch.Tensor, x_scale: torch.Tensor, tensors: Tensors, case: Case
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Relative errors of x_scale and distances of codes from float64's, and its x_scale; dtypes and
    shapes are as they should be, and codes are off by 1 at most."""
    expected_q, expected_scale = reference.rotate_quantize(*widened(tensors), *case.arguments)
    assert x_q.dtype == torch.int8 and x_q.is_contiguous() and x_q.shape == tensors[0].shape
    assert x_scale.dtype == torch.float32 and x_scale.shape == tensors[0].shape[:-1]
    errors = (x_scale.double() - expected_scale).abs() / expected_scale.clamp(min=1e-300)
    difference = (x_q.int() - expected_q.int()).abs()
    worst = int(difference.max()) if difference.numel() else 0
    assert worst <= 1, f"codes differ by up to {worst}"
    return errors, difference, expected_scale


def assert_codes_within_tie_budget(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    tensors: Tensors,
    case: Case,
    tie_rate: float = TIE_RATE,
    scale_error: float = SCALE_ERROR,
) -> None:
    """x_scale to fp32 accuracy; codes equal float64's but for a few, by 1, at ties."""
    errors, difference, expected_scale = _compared(x_q, x_scale, tensors, case)
    if x_q.numel() == 0:
        return
    worst = float(errors.max())
    assert worst <= scale_error, f"x_scale is off by {worst:.2e} of itself"
    steps = reference.rotate(*widened(tensors), *case.rotate_arguments) / expected_scale[..., None]
    differing = steps[difference == 1]
    to_half = ((differing - differing.floor()) - 0.5).abs()
    assert not (to_half > TIE_DISTANCE).any(), f"{float(to_half.max()):.2e} from a half, not a tie"
    budget = math.ceil(tie_rate * x_q.numel()) + SMALL_SAMPLE
    assert len(differing) <= budget, f"{len(differing)} ties in {x_q.numel()} codes, over {budget}"


def widened(tensors: Tensors) -> Tensors:
    """The same problem in float64; tokens of 16 bits times a scale of bf16 as they are rounded."""
    x, scale, permutation, matrices = tensors
    narrow = scale is not None and scale.dtype == torch.bfloat16
    if scale is None or not narrow or x.dtype in (torch.float32, torch.float64):
        return x.double(), scale, permutation, matrices
    gathered = x if permutation is None else x[..., permutation.long()]
    return (gathered * scale.to(x.dtype)).double(), None, None, matrices


def norm_oracle(
    x: torch.Tensor, vectors: tuple, norm: str, eps: float, joined: torch.Tensor | None = None
) -> torch.Tensor:
    """reference.norm_modulate with its norm in float64; vectors: weight, bias, scale, shift;
    joined: a channel scale in the order of x."""
    weight, bias, scale, shift = vectors
    wide = x.double()
    normed = reference.norm_modulate(wide, weight, bias, None, None, norm, eps)
    return reference.modulate(normed, x, scale, shift, joined)


# A norm rounded to 16 bits: where fp32 is this near the middle of two of them, one y is off by its
# last digit, and with it, by a little, the 128 values that its rotation makes of it.
ROUNDED_CODES = 300e-6  # share of codes that this moves at most, by 1
ROUNDED_SCALES = 0.03  # share of tokens of which it moves the largest value
ROUNDED_SCALE_ERROR = 2.0**-7
ROUNDED_VALUES = 1e-3  # share of y that are off


def assert_codes_of_rounded_norm(
    x_q: torch.Tensor,
    x_scale: torch.Tensor,
    tensors: Tensors,
    case: Case,
    moved_scales: float = ROUNDED_SCALES,
) -> None:
    """x_q and x_scale of y in 16 bits, tensors[0], but for the few y that rounded the other way."""
    errors, difference, _ = _compared(x_q, x_scale, tensors, case)
    if x_q.numel() == 0:
        return
    assert float(errors.max()) <= ROUNDED_SCALE_ERROR, f"x_scale is off by {errors.max():.2e}"
    moved = int((errors > SCALE_ERROR).sum())
    budget = math.ceil(moved_scales * errors.numel()) + SMALL_SAMPLE
    assert moved <= budget, f"{moved} of {errors.numel()} x_scale differ, over {budget}"
    # In a token of few codes all may move at once.
    budget = math.ceil(ROUNDED_CODES * x_q.numel()) + x_q.shape[-1] // 8
    differing = int(difference.sum())
    assert differing <= budget, f"{differing} of {x_q.numel()} codes differ, over {budget}"


def assert_rounded_norm(y: torch.Tensor, expected: torch.Tensor) -> None:
    """y in 16 bits is what is expected, but for the few that rounded the other way."""
    assert y.shape == expected.shape and y.dtype == expected.dtype and y.is_contiguous()
    off = y != expected
    assert int(off.sum()) <= ROUNDED_VALUES * y.numel() + SMALL_SAMPLE
    unit = torch.finfo(y.dtype).eps * expected.double().abs().clamp(min=1e-3)
    # Each of four steps may round the other way, before a sum that may be much smaller.
    row = expected.double().abs().amax(-1, keepdim=True)
    error = (y.double() - expected.double()).abs()
    assert bool((error <= 4 * torch.maximum(unit, torch.finfo(y.dtype).eps * row)).all())


def assert_rotated_within_rounding(y: torch.Tensor, tensors: Tensors, case: Case) -> None:
    """y is the float64 rotation, rounded once to its dtype (and fp32 error before that)."""
    wide = widened(tensors)
    assert y.dtype == tensors[0].dtype
    assert_rounded_once(y, reference.rotate(*wide, *case.rotate_arguments))


def assert_rounded_once(y: torch.Tensor, expected: torch.Tensor) -> None:
    """y is float64's value, rounded to y's dtype (and fp32 error before that)."""
    assert y.shape == expected.shape and y.is_contiguous()
    half_unit = expected.abs() * torch.finfo(y.dtype).eps / 2
    row = expected.abs().amax(-1, keepdim=True) if expected.numel() else expected
    excess = (y.double() - expected).abs() - half_unit - ROTATION_ERROR * row
    assert not (excess > 0).any(), f"beyond one rounding by {float(excess.max()):.2e}"


def check_quantize(tensors: Tensors, case: Case) -> None:
    x_q, x_scale = launch("rotate_quantize", *tensors, *case.arguments)
    assert_codes_within_tie_budget(x_q, x_scale, tensors, case)


def check_rotate(tensors: Tensors, case: Case) -> None:
    y = launch("rotate", *tensors, *case.rotate_arguments)
    assert isinstance(y, torch.Tensor)
    assert_rotated_within_rounding(y, tensors, case)


def check_special_rows(device: str, dtype: torch.dtype, case: Case) -> None:
    """A zero row, and rows with NaN or inf, next to ordinary ones that must not notice."""
    tensors = draw(6, 384, dtype, case, device=device)
    x = tensors[0]
    x[1] = 0.0
    x[3, 200] = float("nan")
    x[4, 7] = float("-inf")
    x_q, x_scale = launch("rotate_quantize", *tensors, *case.arguments)
    assert float(x_scale[1]) == 0.0 and not x_q[1].any()
    assert not x_scale[3:5].isfinite().any() and not x_q[3:5].any()
    finite = torch.tensor([0, 2, 5], device=device)
    rows = (x[finite], *tensors[1:])
    assert_codes_within_tie_budget(x_q[finite], x_scale[finite], rows, case)
