"""Adaptive rotation: per shared input, the cheapest rotation whose measured output error is good.

Candidates are {none, signs + block Hadamard, the same behind a mass-balancing permutation, the
outlier-aware dense pair of DuQuant; if asked for, the regular Hadamard matrix of ConvRot} times
smoothing strengths.  Each is measured on sampled tokens and output rows as the quantized layer will
run: activations by reference.token_scale, weights by fit_twin_log, rows scaled to full gain.  J =
RMS of the raw input (LRQ-DiT equation 11) is logged and decides in paper mode alone: it is blind to
the shape of outliers (method.md 2.1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lrq_kernels import reference
from lrq_kernels.rotation import Rotation, block_dense
from lrq_kernels.scheme import DUAL_BLOCK_SIZE, QuantScheme

from .calibration import ActivationStats, name_seed
from .recipe import SearchOptions
from .smoothing import smooth_scale, to_bf16, weight_absmax
from .twin_log import fit_twin_log, sensible_gain

MAX_BLOCK = 1024
# RMS scale of int4 codes that is optimal for a Gaussian (method.md 5.6).
INT4_RMS = 0.3545
# How the labels of permuted rotations start, and of those that permute the last channels alone.
PERMUTED = "permuted"
PERMUTED_PART = f"{PERMUTED}-part"
ScaleRule = tuple[str, float]  # (scale_mode, scale_factor)
# Rules tried while rotations are compared, and once the rotation stands.
_SCREEN_RULES: dict[int, tuple[ScaleRule, ...]] = {
    16: (("absmax", 1.0),),
    8: (("absmax", 1.0),),
    4: (("absmax", 0.85), ("rms", INT4_RMS)),
}
_FINAL_RULES: dict[int, tuple[ScaleRule, ...]] = {
    16: (("absmax", 1.0),),
    8: (("absmax", 1.0), ("absmax", 0.9), ("rms", 0.032), ("rms", 0.04)),
    4: (
        ("absmax", 1.0),
        ("absmax", 0.85),
        ("absmax", 0.7),
        ("absmax", 0.6),
        ("rms", 0.3),
        ("rms", INT4_RMS),
        ("rms", 0.42),
    ),
}
# Numbers of the weights, or the tokens, of the candidates that are measured together: few launches
# on a GPU, the cache of a CPU.
_TOGETHER = {"cpu": 1 << 18, "cuda": 1 << 24}
# A rule must beat the first of _FINAL_RULES by this share of the error to replace it.
_RULE_TOLERANCE = 0.005


@dataclass(frozen=True)
class Candidate:
    """A rotation kind with its block and smoothing strength (None: no smoothing)."""

    kind: str
    block_size: int
    alpha: float | None

    @property
    def rotation_name(self) -> str:
        return {
            "none": "none",
            "hadamard": f"hadamard{self.block_size}",
            "permuted": f"{PERMUTED}{self.block_size}",
            "permuted-part": f"{PERMUTED_PART}{self.block_size}",
            "dual": "dual128",
            "regular": f"regular{self.block_size}",
        }[self.kind]

    @property
    def label(self) -> str:
        return f"{self.rotation_name} alpha={'none' if self.alpha is None else self.alpha}"

    @property
    def cost(self) -> int:
        """Order of run-time cost: none < blocks of 128, 256, ... < with a permutation of a part,
        which is folded away (input_makers) < with any permutation < dual."""
        base = {"permuted-part": 10, "permuted": 100, "dual": 1000}.get(self.kind, 0)
        # Blocks below 128 exist for widths that have nothing larger; they cost what 128 does.
        return base + (0 if self.kind == "none" else max(7, int(math.log2(self.block_size))))


@dataclass(frozen=True)
class RotationChoice:
    """What one shared input gets.  scale_mode and scale_factor complete the scheme; report holds
    output NMSE of each finalist by label, J and the peak-to-RMS ratio of the raw input."""

    rotation: Rotation
    smooth_scale: Tensor | None
    alpha: float | None
    scale_mode: str
    scale_factor: float
    label: str
    why: str
    j: float | None = None
    peak_ratio: float | None = None
    errors: dict[str, float] = field(default_factory=dict)

    def scheme(self, scheme: QuantScheme) -> QuantScheme:
        """`scheme` with the rotation and the activation scale chosen here."""
        return QuantScheme(
            scheme.weight_bits,
            scheme.act_bits,
            self.rotation.kind,
            self.rotation.block_size,
            self.scale_mode,
            self.scale_factor,
        )

    def to(self, device: torch.device | str) -> RotationChoice:
        smooth = None if self.smooth_scale is None else self.smooth_scale.to(device)
        return replace(self, rotation=self.rotation.to(device), smooth_scale=smooth)


def largest_block(in_features: int) -> int:
    """Largest power of two that divides K, at most 1024; 0 when below 32 (no rotation possible)."""
    block = min(in_features & -in_features, MAX_BLOCK)
    return block if block >= 32 else 0


@dataclass(frozen=True)
class SearchedLinear:
    """One linear of the input: weight [N, K], what the recipe fixes of its scheme, and whether its
    bias will take up the mean error (QuantRecipe.bias_correction)."""

    weight: Tensor
    scheme: QuantScheme
    bias_correction: bool = False


def choose_rotation(
    stats: ActivationStats,
    linears: Sequence[SearchedLinear],
    options: SearchOptions | None = None,
    *,
    first_made: int = 0,
) -> RotationChoice:
    """Rotation, smoothing and activation scale of one input by measured output error.

    first_made: the first channel of those whose order is free, since the rows of other linears make
    them (input_makers); where it is not 0, a permutation of these alone is tried too.

    linears: all that read the input, on one device, with one act_bits.  A quick screen ranks every
    candidate on few tokens and rows; the best smoothing of each rotation is measured again, and the
    cheapest rotation within options.tolerance of the best wins.  K that 128 does not divide falls
    back to blocks of 64 or 32, without dual.  Rows count alike whatever their scale, which each has
    to itself in the format: a few large ones would decide for all.
    Deterministic: signs and matrices are drawn from options.seed and the input's name.
    """
    options = options or SearchOptions()
    act_bits = _common_act_bits(linears)
    linears = [replace(linear, weight=_unit_rows(linear.weight)) for linear in linears]
    full = _Problem.sampled(stats, linears, options)
    screen = full.reduced(128, 96)
    weights = [linear.weight for linear in linears]
    maker = _CandidateMaker(stats, weights, full.x, options, first_made)

    def screen_errors(candidates: list[Candidate]) -> dict[Candidate, float]:
        made = [maker.make(candidate) for candidate in candidates]
        found = screen.best_rules(made, _SCREEN_RULES[act_bits])
        return {c: error for c, (_, error) in zip(candidates, found, strict=True)}

    screened = screen_errors(maker.cheap_candidates())
    # The dense pair is searched anew for every smoothing: only the promising ones are tried.
    screened |= screen_errors(maker.dual_candidates(screened))

    finalists = _best_per_rotation(screened)
    made = [maker.make(finalist) for finalist in finalists]
    rules = full.best_rules(made, _FINAL_RULES[act_bits], fit_rounds=2)
    measured = dict(zip(finalists, rules, strict=True))
    best = min(measured, key=lambda c: measured[c][1])
    allowed = measured[best][1] * (1 + options.tolerance)
    chosen = min((c for c in measured if measured[c][1] <= allowed), key=lambda c: c.cost)
    rule, error = measured[chosen]
    why = f"output NMSE {error:.3g}, the least"
    if chosen != best:
        why = (
            f"output NMSE {error:.3g}, cheapest within {options.tolerance:.1%} of "
            f"{best.label} ({measured[best][1]:.3g})"
        )
    rotation, smooth = maker.make(chosen)
    return RotationChoice(
        rotation,
        smooth,
        chosen.alpha,
        *rule,
        label=chosen.label,
        why=why + _block_note(stats.in_features),
        j=stats.j,
        peak_ratio=_peak_ratio(full.x),
        errors={c.label: measured[c][1] for c in measured},
    )


def choose_rotation_paper(
    stats: ActivationStats, weights: Sequence[Tensor], options: SearchOptions | None = None
) -> RotationChoice:
    """The published rule (LRQ-DiT equations 11-12; method.md decision 2): smoothing by absmax with
    alpha 0.5, the dense pair where J of the raw input is at least 1, else a Hadamard rotation, here
    in the largest block; activation scale absmax.  DuQuant's faults D1-D5 are fixed."""
    options = options or SearchOptions()
    act = stats.absmax.to(weights[0].device)
    smooth = smooth_scale(act, weight_absmax(list(weights)), 0.5, name=stats.name, normalize=False)
    generator = torch.Generator().manual_seed(name_seed(stats.name, options.seed))
    block = largest_block(stats.in_features)
    x = stats.sample.to(weights[0].device, torch.float32)
    why = f"J = {stats.j:.3g}, below 1"
    if stats.j >= 1 and block >= DUAL_BLOCK_SIZE:
        rotation, name = dual_rotation(x * smooth, generator, steps=256), "dual128"
        why = f"J = {stats.j:.3g}, not below 1"
    elif block:
        rotation = Rotation.hadamard(stats.in_features, block, generator=generator)
        rotation, name = rotation.to(x.device), f"hadamard{block}"
    else:
        rotation, name = Rotation.none(), "none"
    return RotationChoice(
        rotation,
        smooth,
        0.5,
        "absmax",
        1.0,
        label=f"{name} alpha=0.5",
        why=f"paper mode: {why}{_block_note(stats.in_features)}",
        j=stats.j,
        peak_ratio=_peak_ratio(x),
    )


def data_free_rotation(
    name: str, in_features: int, scheme: QuantScheme, seed: int = 0
) -> RotationChoice:
    """What an input gets without calibration: the scheme's rotation with signs drawn by name, no
    smoothing.  "dual" needs data and raises ValueError; a block that does not divide K becomes the
    largest that does."""
    label, why = "none alpha=none", "no calibration data"
    rotation = Rotation.none()
    if scheme.rotation == "dual":
        raise ValueError(f"{name}: rotation 'dual' needs calibration data, got none")
    block = min(scheme.block_size, largest_block(in_features))
    if scheme.rotation == "hadamard" and block:
        generator = torch.Generator().manual_seed(name_seed(name, seed))
        rotation = Rotation.hadamard(in_features, block, generator=generator)
        label = f"hadamard{block} alpha=none"
    return RotationChoice(
        rotation,
        None,
        None,
        scheme.scale_mode,
        scheme.scale_factor,
        label=label,
        why=why + _block_note(in_features),
    )


# ---- candidates ---------------------------------------------------------------------------------


class _CandidateMaker:
    """Builds the rotation and smoothing vector of a candidate for one input, and remembers them."""

    def __init__(
        self,
        stats: ActivationStats,
        weights: Sequence[Tensor],
        x: Tensor,
        options: SearchOptions,
        first_made: int,
    ) -> None:
        self.name, self.options, self.x = stats.name, options, x
        self.in_features = stats.in_features
        self.first_made = first_made
        self.weights = sum(weight.numel() for weight in weights)
        self.act_rms = stats.rms.to(x.device)
        self.weight_absmax = weight_absmax(list(weights))
        self.made: dict[Candidate, tuple[Rotation, Tensor | None]] = {}
        self.smooth: dict[float | None, Tensor | None] = {None: None}
        for i, alpha in enumerate(options.alphas):
            name = stats.name if i == 0 else None  # dead channels are logged once
            factors = smooth_scale(self.act_rms, self.weight_absmax, alpha, name=name)
            self.smooth[alpha] = to_bf16(factors)

    def cheap_candidates(self) -> list[Candidate]:
        """Everything but dual."""
        blocks, kinds = _blocks(self.in_features), self.options.rotations
        hadamard = [("hadamard", block) for block in blocks]
        shapes = [("none", 128)] if "none" in kinds or not blocks else []
        for kind in ("hadamard", "regular"):
            if kind in kinds:
                shapes += [(kind, block) for block in blocks]
        if "permuted" in kinds and blocks:
            ends = dict.fromkeys((blocks[0], blocks[-1]))
            shapes += [("permuted", block) for block in ends]
            if self.first_made:
                shapes += [("permuted-part", b) for b in ends if self.first_made % b == 0]
        if not shapes and not self._dual_is_possible():
            shapes = hadamard
        return [Candidate(*shape, alpha) for shape in shapes for alpha in self.smooth]

    def dual_candidates(self, screened: dict[Candidate, float]) -> list[Candidate]:
        """The unsmoothed pair and the one with the smoothing that did best elsewhere."""
        if not self._dual_is_possible():
            return []
        best = min(screened, key=screened.__getitem__).alpha if screened else None
        alphas = dict.fromkeys((None, best)) if screened else self.smooth
        return [Candidate("dual", DUAL_BLOCK_SIZE, alpha) for alpha in alphas]

    def _dual_is_possible(self) -> bool:
        bits = 32 * 2 * DUAL_BLOCK_SIZE**2 / self.weights
        divides = self.in_features % DUAL_BLOCK_SIZE == 0
        return "dual" in self.options.rotations and divides and bits <= self.options.max_dual_bits

    def make(self, candidate: Candidate) -> tuple[Rotation, Tensor | None]:
        if candidate not in self.made:
            self.made[candidate] = self._make(candidate)
        return self.made[candidate]

    def _make(self, candidate: Candidate) -> tuple[Rotation, Tensor | None]:
        smooth = self.smooth[candidate.alpha]
        if candidate.kind == "none":
            return Rotation.none(), smooth
        if candidate.kind == "regular":
            size = candidate.block_size
            return Rotation.regular(self.in_features, size, device=self.x.device), smooth
        generator = torch.Generator().manual_seed(name_seed(self.name, self.options.seed))
        if candidate.kind == "dual":
            x = self.x if smooth is None else self.x * smooth
            return dual_rotation(x, generator, self.options.dual_steps), smooth
        permutation = None
        if candidate.kind in ("permuted", "permuted-part"):
            first = 0 if candidate.kind == "permuted" else self.first_made
            mass = self.act_rms if smooth is None else self.act_rms * smooth
            dealt = zigzag_permutation(mass[first:].square(), candidate.block_size)
            fixed = torch.arange(first, dtype=torch.int32, device=dealt.device)
            permutation = torch.cat([fixed, dealt + first])
        rotation = Rotation.hadamard(
            self.in_features,
            candidate.block_size,
            generator=generator,
            permutation=permutation,
            device=self.x.device,
        )
        return rotation, smooth


def _blocks(in_features: int) -> list[int]:
    """Hadamard blocks to try: 128 up to the largest, or the one block that a narrow K has."""
    largest = largest_block(in_features)
    if largest < 128:
        return [largest] if largest else []
    return [block for block in (128, 256, 512, 1024) if block <= largest]


def zigzag_permutation(mass: Tensor, block_size: int) -> Tensor:
    """Permutation (int32 [K]) that deals channels to blocks back and forth by falling mass [K].

    Every block gets one channel of each round, so the heaviest are spread over all blocks and the
    sums of mass come out nearly equal (DuQuant's zigzag; MixQuant's mass balancing).
    """
    blocks = mass.numel() // block_size
    dealt = mass.argsort(descending=True, stable=True).view(block_size, blocks).clone()
    dealt[1::2] = dealt[1::2].flip(1)
    return dealt.T.reshape(-1).to(torch.int32)


def dual_rotation(x: Tensor, generator: torch.Generator, steps: int = 256) -> Rotation:
    """The outlier-aware dense pair R1, permutation, R2 for smoothed tokens x fp32 [M, K].

    DuQuant (arXiv 2406.01721; method.md 2.3) with its faults D1-D5 fixed: the greedy step acts on
    the column that holds the largest entry, the uniform row survives the random factor, the
    permutation is a true zigzag by channel peak, and tokens of all steps are seen.
    """
    first = _greedy_matrix(x, generator, steps)
    rotated = block_dense(x, first)
    permutation = zigzag_permutation(rotated.abs().amax(0), DUAL_BLOCK_SIZE)
    second = _greedy_matrix(rotated[:, permutation.long()], generator, steps)
    return Rotation.dual(torch.stack([first, second]), permutation)


# Blocks of tokens that the greedy search looks at: those of the largest norm hold every peak.
_GREEDY_BLOCKS = 512


def _greedy_matrix(x: Tensor, generator: torch.Generator, steps: int) -> Tensor:
    """Orthogonal fp32 [128, 128], one for all blocks, that lowers the largest |entry| of x."""
    size = DUAL_BLOCK_SIZE
    blocks = x.reshape(-1, size)
    if blocks.shape[0] > _GREEDY_BLOCKS:
        blocks = blocks[blocks.square().sum(1).topk(_GREEDY_BLOCKS).indices]
    spread = _spreading_matrix(generator).to(x.device)
    product = best = torch.eye(size, device=x.device)
    best_peak = blocks.abs().max()
    index = torch.arange(size, device=x.device)
    for _ in range(steps):
        column = blocks.abs().amax(0).argmax()
        # Swap 0 and `column` in rows and columns, so that the uniform row meets the peak column.
        swap = torch.where(index == 0, column, torch.where(index == column, 0, index))
        step = spread[swap][:, swap]
        blocks, product = blocks @ step, product @ step
        peak = blocks.abs().max()
        lower = peak < best_peak
        best, best_peak = torch.where(lower, product, best), torch.where(lower, peak, best_peak)
    # Rounding piles up over the product: the nearest orthogonal matrix, by its polar factor.
    u, _, v = torch.linalg.svd(best.double())
    return (u @ v).float()


def _spreading_matrix(generator: torch.Generator) -> Tensor:
    """Random orthogonal fp32 [128, 128] whose row 0 is uniform, 1/sqrt(128)."""
    size = DUAL_BLOCK_SIZE
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    gaussian[0] = 1.0
    q, r = torch.linalg.qr(gaussian.T)
    return (q * r.diagonal().sign()).T.float()


# ---- measurement --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Problem:
    """What candidates are measured on.

    x fp32 [M, K] sampled tokens; weight fp32 [n, K] sampled output rows of all linears; parts: how
    many of them each linear has, with its weight bits and whether its bias takes a correction;
    output fp32 [M, n] exact.
    """

    x: Tensor
    weight: Tensor
    parts: tuple[tuple[int, int, bool], ...]
    act_bits: int
    output: Tensor

    @staticmethod
    def sampled(
        stats: ActivationStats, linears: Sequence[SearchedLinear], options: SearchOptions
    ) -> _Problem:
        if stats.sample.shape[0] == 0:
            raise ValueError(f"choose_rotation: the statistics of {stats.name} hold no sample")
        total = sum(linear.weight.shape[0] for linear in linears)
        picked, parts = [], []
        for linear in linears:
            if linear.weight.shape[1] != stats.in_features:
                raise ValueError(
                    f"choose_rotation: weights of {stats.name} must have K = {stats.in_features}, "
                    f"got shape {tuple(linear.weight.shape)}"
                )
            share = max(16, round(options.weight_rows * linear.weight.shape[0] / total))
            picked.append(_spread_rows(linear.weight.detach(), share).float())
            bits = linear.scheme.weight_bits
            parts.append((picked[-1].shape[0], bits, linear.bias_correction))
        weight = torch.cat(picked)
        x = _spread_rows(stats.sample, options.sample_rows).to(weight)
        act_bits = linears[0].scheme.act_bits
        return _Problem(x, weight, tuple(parts), act_bits, x @ weight.T)

    def reduced(self, sample_rows: int, weight_rows: int) -> _Problem:
        rows = max(8, weight_rows // len(self.parts))
        weights = [_spread_rows(part, rows) for part in self.weight.split(self._counts())]
        parts = tuple((len(w), *part[1:]) for w, part in zip(weights, self.parts, strict=True))
        x, weight = _spread_rows(self.x, sample_rows), torch.cat(weights)
        return _Problem(x, weight, parts, self.act_bits, x @ weight.T)

    def _counts(self) -> list[int]:
        return [count for count, _, _ in self.parts]

    def best_rules(
        self,
        made: Sequence[tuple[Rotation, Tensor | None]],
        rules: Sequence[ScaleRule],
        fit_rounds: int = 0,
    ) -> list[tuple[ScaleRule, float]]:
        """By candidate, the activation-scale rule of least error, and that error; the first rule
        wins ties."""
        found = []
        size = _TOGETHER.get(self.x.device.type, _TOGETHER["cpu"])
        together = max(1, size // max(self.x.numel(), self.weight.numel()))
        for first in range(0, len(made), together):
            for errors in self._errors(made[first : first + together], rules, fit_rounds):
                best = min(range(len(rules)), key=errors.__getitem__)
                if errors[0] <= errors[best] * (1 + _RULE_TOLERANCE):
                    best = 0
                found.append((rules[best], errors[best]))
        return found

    def _errors(
        self,
        made: Sequence[tuple[Rotation, Tensor | None]],
        rules: Sequence[ScaleRule],
        fit_rounds: int,
    ) -> list[list[float]]:
        """Output NMSE by candidate and rule, averaged over the linears: rows with the scale that
        they will be stored with, which gives back what levels, clipping and noise take of their
        gain."""
        x = torch.stack([r.apply(self.x if s is None else self.x * s) for r, s in made])
        weight = torch.stack(
            [r.apply(self.weight if s is None else self.weight / s) for r, s in made]
        )
        decoded = self._decoded(weight, x.square().mean(1), fit_rounds)
        corrected = torch.cat([x.new_full((n,), float(c)) for n, _, c in self.parts])
        energy = self.output.square().sum(0)
        errors = []
        for rule in rules:
            quantized = dequantized_activation(x.flatten(0, 1), self.act_bits, *rule)
            y = quantized.view_as(x) @ decoded.mT
            y *= sensible_gain(energy / (self.output * y).sum(1))[:, None]
            y += (self.output - y).mean(1, keepdim=True) * corrected
            errors.append(self._nmse(y))
        return torch.stack(errors, dim=1).tolist()

    def _decoded(self, weight: Tensor, importance: Tensor, fit_rounds: int) -> Tensor:
        """Quantized weights [C, n, K] of C candidates, importance [C, K]: linears of one width are
        fitted in one call."""
        decoded = torch.empty_like(weight)
        bits = torch.cat([torch.full((n,), b) for n, b, _ in self.parts]).to(weight.device)
        for width in dict.fromkeys(b for _, b, _ in self.parts):
            rows = bits == width
            chosen = weight[:, rows]
            each = importance[:, None].expand_as(chosen).flatten(0, 1)
            flat = chosen.flatten(0, 1)
            codebook = fit_twin_log(flat, width, importance=each, rounds=fit_rounds)
            decoded[:, rows] = codebook.decode(codebook.encode(flat)).view_as(chosen)
        return decoded

    def _nmse(self, approximate: Tensor) -> Tensor:
        """Of outputs [C, M, n], the mean over the linears, fp64 [C]."""
        error = (self.output - approximate).double().square().sum(1)
        power = self.output.double().square().sum(0)
        parts = zip(error.split(self._counts(), 1), power.split(self._counts()), strict=True)
        return torch.stack([e.sum(1) / p.sum().clamp_min(1e-30) for e, p in parts]).mean(0)


def dequantized_activation(
    x: Tensor, act_bits: int, scale_mode: str, scale_factor: float
) -> Tensor:
    """What the GEMM sees of rotated tokens x fp32 [M, K]: codes times step; x for 16 bits."""
    if act_bits == 16:
        return x
    scale = reference.token_scale(x, act_bits, scale_mode, scale_factor)
    return reference.quantize_by_scale(x, scale, act_bits).float() * scale[:, None]


def _unit_rows(weight: Tensor) -> Tensor:
    """weight [N, K] with the RMS of every row that is not zero at 1, fp32."""
    rows = weight.detach().float()
    rms = rows.square().mean(1, keepdim=True).sqrt()
    return rows / torch.where(rms > 0, rms, torch.ones_like(rms))


def _best_per_rotation(screened: dict[Candidate, float]) -> list[Candidate]:
    """The best smoothing of every rotation that is not hopeless, and the unsmoothed "none"."""
    best: dict[str, Candidate] = {}
    for candidate, error in screened.items():
        name = candidate.rotation_name
        if name not in best or error < screened[best[name]]:
            best[name] = candidate
    limit = 1.3 * min(screened.values())
    return [candidate for candidate in best.values() if screened[candidate] <= limit]


def _peak_ratio(x: Tensor) -> float:
    """Mean over tokens of max|x| / RMS(x): the outlier measure that J is not."""
    rms = x.square().mean(1).sqrt().clamp_min(1e-30)
    return float((x.abs().amax(1) / rms).mean())


def _spread_rows(rows: Tensor, limit: int) -> Tensor:
    if rows.shape[0] <= limit:
        return rows
    index = torch.arange(limit, device=rows.device) * rows.shape[0] // limit
    return rows[index]


def _common_act_bits(linears: Sequence[SearchedLinear]) -> int:
    act_bits = {linear.scheme.act_bits for linear in linears}
    if len(act_bits) != 1:
        raise ValueError(f"choose_rotation: schemes must have one act_bits, got {sorted(act_bits)}")
    return act_bits.pop()


def _block_note(in_features: int) -> str:
    if in_features % 128 == 0:
        return ""
    block = largest_block(in_features)
    return f"; K = {in_features} has " + (f"no block above {block}" if block else "no block")
