"""Random problems and error measures shared by tests and benchmarks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .checkpoint import LinearState
from .codebook import TwinLogCodebook
from .packing import pack_codes
from .rotation import Rotation
from .scheme import DUAL_BLOCK_SIZE, QuantScheme


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
    table_of_row: Tensor | None = None

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.x_q.shape[0], self.codes.shape[0], self.x_q.shape[1]

    def weight_levels(self) -> Tensor:
        """int8 [N, K] from the codes, past every packing and every kernel."""
        of_row = self.table_of_row
        levels = self.levels if of_row is None else self.levels[of_row.long()]
        return torch.gather(levels, 1, self.codes.long())


def random_levels(
    n: int,
    bits: int,
    *,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
    extreme: bool = False,
) -> Tensor:
    """int8 [n, 2^bits] that TwinLogCodebook accepts; extreme: reaching -128 and 127."""
    half = 1 << (bits - 1)
    magnitude = torch.rand(2, n, half, device=device, generator=generator).sort(dim=-1).values
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
    tables: int | None = None,
) -> Problem:
    """A random GEMM problem, drawn on the generator's device, or on `device` without one.

    x_q has rows 16 bytes apart, as lrq::gemm wants; what lies between K and the next row is random.
    extreme: levels reach -128 and 127. tables: so many, shared by the rows, in place of one each.
    """
    qmax = 2 ** (act_bits - 1) - 1
    where = torch.device(device) if generator is None else generator.device
    options = {"device": where, "generator": generator}
    codes = torch.randint(0, 1 << weight_bits, (n, k), dtype=torch.uint8, **options)
    levels = random_levels(tables or n, weight_bits, extreme=extreme, **options)
    of_row = None
    if tables is not None:
        of_row = torch.randint(0, tables, (n,), dtype=torch.uint8, **options)
    x_q = torch.randint(-qmax, qmax + 1, (m, -(-k // 16) * 16), dtype=torch.int8, **options)
    x_scale = torch.rand(m, **options) * 0.02 + 1e-4
    weight_scale = torch.rand(n, **options) * 0.002 + 1e-5
    bias = torch.randn(n, **options)
    TwinLogCodebook(levels, weight_scale, of_row)
    packed = pack_codes(codes, weight_bits).to(device)
    return Problem(
        x_q.to(device)[:, :k],
        x_scale.to(device),
        codes.to(device),
        ops.prepack(packed, k, weight_bits),
        levels.to(device),
        weight_scale.to(device),
        bias.to(device),
        weight_bits,
        None if of_row is None else of_row.to(device),
    )


def make_rotation(
    in_features: int,
    scheme: QuantScheme,
    *,
    permuted: bool = False,
    generator: torch.Generator | None = None,
) -> Rotation:
    """A random rotation of the scheme's kind."""
    if scheme.rotation == "none":
        return Rotation.none()
    permutation = None
    if permuted:
        permutation = torch.randperm(in_features, generator=generator).to(torch.int32)
    if scheme.rotation == "hadamard":
        return Rotation.hadamard(
            in_features, scheme.block_size, generator=generator, permutation=permutation
        )
    draw = torch.randn(2, DUAL_BLOCK_SIZE, DUAL_BLOCK_SIZE, generator=generator)
    return Rotation.dual(torch.linalg.qr(draw.double()).Q.float().contiguous(), permutation)


def make_state(
    out_features: int,
    in_features: int,
    scheme: QuantScheme,
    *,
    bias: bool = True,
    smooth: bool = True,
    permuted: bool = False,
    shared_with: tuple[str, LinearState] | None = None,
    shared_tables: int = 0,
    generator: torch.Generator | None = None,
) -> LinearState:
    """A random quantized linear; shared_with (name, state): one that has the same input.
    shared_tables: so many tables of levels, each of which some row has."""
    codes = torch.randint(
        0, 1 << scheme.weight_bits, (out_features, in_features), generator=generator
    )
    if shared_with is None:
        owner = None
        rotation = make_rotation(in_features, scheme, permuted=permuted, generator=generator)
        smooth_scale = torch.rand(in_features, generator=generator) + 0.5 if smooth else None
    else:
        owner = shared_with[0]
        rotation, smooth_scale = shared_with[1].rotation, shared_with[1].smooth_scale
    of_row = None
    if shared_tables:
        order = torch.randperm(out_features, generator=generator)
        of_row = (order % shared_tables).to(torch.uint8)
    tables = shared_tables or out_features
    return LinearState(
        codes=pack_codes(codes.to(torch.uint8), scheme.weight_bits),
        levels=random_levels(tables, scheme.weight_bits, generator=generator),
        table_of_row=of_row,
        weight_scale=torch.rand(out_features, generator=generator) * 0.002 + 1e-5,
        bias=torch.randn(out_features, generator=generator) if bias else None,
        scheme=scheme,
        in_features=in_features,
        out_features=out_features,
        smooth_scale=smooth_scale,
        rotation=rotation,
        shared_input=owner,
    )


def with_low_rank(
    state: LinearState,
    rank: int,
    *,
    like: LinearState | None = None,
    generator: torch.Generator | None = None,
) -> LinearState:
    """`state` with a random low-rank branch of about the size of its codes' weight; like: one that
    has the same input, and so the same first factor."""
    down = torch.randn(rank, state.in_features, generator=generator).bfloat16()
    up = torch.randn(state.out_features, rank, generator=generator) * (0.1 / rank**0.5)
    return dataclasses.replace(
        state,
        low_rank_down=down if like is None else like.low_rank_down,
        low_rank_up=up.bfloat16(),
    )


def relative_error(output: Tensor, reference: Tensor) -> float:
    """||output - reference|| / ||reference|| in float64; NaN anywhere gives NaN."""
    wide = reference.double()
    norm = float(wide.norm())
    error = float((output.double() - wide).norm())
    return error if norm == 0.0 else error / norm


def assert_at_most_twice(output: Tensor, baseline: Tensor, oracle: Tensor) -> None:
    """The error rule where arithmetic is not exact: against a float64 oracle, `output` may be at
    most twice as wrong as `baseline`, which is torch in the same precision."""
    if oracle.dtype != torch.float64 or output.dtype != baseline.dtype:
        raise TypeError(
            "assert_at_most_twice: oracle must be float64 and baseline like output, got "
            f"{oracle.dtype}, {baseline.dtype} and {output.dtype}"
        )
    error, limit = relative_error(output, oracle), 2.0 * relative_error(baseline, oracle)
    if not error <= limit:
        raise AssertionError(f"relative error {error:.3e}, twice that of torch is {limit:.3e}")


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, memory that torch.empty and its kin return holds NaN (the largest integer)."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    was_filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=warned)
        torch.utils.deterministic.fill_uninitialized_memory = was_filling


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """10 log10 of signal power over error power, in dB."""
    wide = reference.double()
    error = float((approximation.double() - wide).square().sum())
    signal = float(wide.square().sum())
    if error == 0.0:
        return float("inf")
    return float(10.0 * torch.log10(torch.tensor(signal / error, dtype=torch.float64)))
