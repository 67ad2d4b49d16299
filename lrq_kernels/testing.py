"""Random problems and error measures shared by tests and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .codebook import TwinLogCodebook
from .packing import pack_codes


@dataclass(frozen=True)
class Problem:
    """Inputs of one lrq::gemm: codes uint8 [N, K] beside the tensors that the op takes."""

    x_q: Tensor
    x_scale: Tensor
    codes: Tensor
    weight: Tensor
    levels: Tensor
    weight_scale: Tensor
    bias: Tensor
    weight_bits: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.x_q.shape[0], self.levels.shape[0], self.x_q.shape[1]


def random_levels(
    n: int, bits: int, *, generator: torch.Generator | None = None, extreme: bool = False
) -> Tensor:
    """int8 [n, 2^bits] that TwinLogCodebook accepts; extreme: reaching -128 and 127."""
    half = 1 << (bits - 1)
    magnitude = torch.rand(2, n, half, generator=generator).sort(dim=-1).values
    if extreme:
        magnitude[..., -1] = 1.0
    positive = (magnitude[0] * 127).round()
    negative = -(1 + magnitude[1] * 127).round()
    return torch.cat([positive, negative], dim=1).to(torch.int8)


def make_problem(
    m: int,
    n: int,
    k: int,
    weight_bits: int,
    *,
    act_bits: int = 8,
    device: torch.device | str = "cpu",
    generator: torch.Generator | None = None,
    extreme: bool = False,
) -> Problem:
    """A random GEMM problem. extreme: every code and level at its largest magnitude is possible."""
    qmax = 2 ** (act_bits - 1) - 1
    codes = torch.randint(0, 1 << weight_bits, (n, k), generator=generator, dtype=torch.uint8)
    levels = random_levels(n, weight_bits, generator=generator, extreme=extreme)
    x_q = torch.randint(-qmax, qmax + 1, (m, k), generator=generator, dtype=torch.int8)
    x_scale = torch.rand(m, generator=generator) * 0.02 + 1e-4
    weight_scale = torch.rand(n, generator=generator) * 0.002 + 1e-5
    bias = torch.randn(n, generator=generator)
    TwinLogCodebook(levels, weight_scale)
    packed = pack_codes(codes, weight_bits).to(device)
    return Problem(
        x_q.to(device),
        x_scale.to(device),
        codes.to(device),
        ops.prepack(packed, k, weight_bits),
        levels.to(device),
        weight_scale.to(device),
        bias.to(device),
        weight_bits,
    )


def relative_error(output: Tensor, reference: Tensor) -> float:
    """||output - reference|| / ||reference|| in float64; NaN anywhere gives NaN."""
    wide = reference.double()
    norm = float(wide.norm())
    error = float((output.double() - wide).norm())
    return error if norm == 0.0 else error / norm


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """10 log10 of signal power over error power, in dB."""
    wide = reference.double()
    error = float((approximation.double() - wide).square().sum())
    signal = float(wide.square().sum())
    if error == 0.0:
        return float("inf")
    return float(10.0 * torch.log10(torch.tensor(signal / error, dtype=torch.float64)))
