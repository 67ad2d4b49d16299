"""QuantRecipe: which linears of a model are quantized, and how.

resolve(model) turns a recipe and the model's family into a QuantPlan: input groups (linears that
share one quantized input), and every linear that stays with the reason.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from torch import nn

from lrq_kernels.codebook import MAX_SHARED_TABLES
from lrq_kernels.scheme import BLOCK_SIZES, INPUT_FIELDS, QuantScheme

from .families import MODULATION, Family, family_of
from .recipe_patterns import check_patterns, matches
from .shared_tables import tables_of_rows

MODES = ("default", "paper")
EXCLUDED = "excluded by the recipe"
ROUNDINGS = ("feedback", "nearest")
# The GEMM and the canonical packing take any K that is a multiple of this.
K_MULTIPLE = 32


def check_shared_tables(shared_tables: int, where: str) -> None:
    """Raise ValueError, naming `where`, unless rows can share so many tables; 0 for none."""
    known = isinstance(shared_tables, int) and not isinstance(shared_tables, bool)
    if not known or not 0 <= shared_tables <= MAX_SHARED_TABLES:
        raise ValueError(
            f"{where}: shared_tables must be a whole number from 0 to {MAX_SHARED_TABLES}, "
            f"got {shared_tables!r}"
        )


def check_low_rank(low_rank: int, where: str) -> None:
    """Raise ValueError, naming `where`, unless `low_rank` is a rank, or 0 for no branch."""
    if not isinstance(low_rank, int) or isinstance(low_rank, bool) or low_rank < 0:
        raise ValueError(f"{where}: low_rank must be a whole number from 0 on, got {low_rank!r}")


@dataclass(frozen=True)
class CalibrationOptions:
    """batch_size: prompts per run; sample_rows: token rows kept per input for the rotation search;
    gram: also accumulate X^T X (fp32 [K, K]: 604 MB at K = 12288); gram_bytes: how much of these
    quantize_model holds at once, running the prompts again for the rest; seed of the sample;
    run_key: what else the statistics depend on (steps, guidance, picture size): a killed run
    resumes with its statistics only where this is unchanged."""

    batch_size: int = 1
    sample_rows: int = 512
    gram: bool = False
    gram_bytes: int = 16 << 30
    seed: int = 0
    run_key: str = ""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.sample_rows < 1:
            raise ValueError(
                "CalibrationOptions: batch_size and sample_rows must be positive, "
                f"got {self.batch_size} and {self.sample_rows}"
            )


@dataclass(frozen=True)
class SearchOptions:
    """rotations: kinds to try, of "none", "hadamard", "permuted", "dual" and "regular", blocks with
    the signs of Rotation.regular; alphas: smoothing strengths to try besides none; tolerance: error
    above the best that a cheaper rotation may have; sample_rows, weight_rows: tokens and output
    rows that finalists are measured on; dual_steps of the greedy search for each dense matrix;
    max_dual_bits: what the two matrices of "dual" may add to a weight of the group, above which it
    is not tried; seed of signs and dense matrices."""

    rotations: tuple[str, ...] = ("none", "hadamard", "permuted", "dual")
    alphas: tuple[float, ...] = (0.3, 0.4, 0.5, 0.6, 0.7)
    tolerance: float = 0.025
    sample_rows: int = 512
    weight_rows: int = 512
    dual_steps: int = 64
    max_dual_bits: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        known = ("none", "hadamard", "permuted", "dual", "regular")
        unknown = [kind for kind in self.rotations if kind not in known]
        if unknown or not self.rotations:
            raise ValueError(
                f"SearchOptions: rotations must be some of {known}, got {self.rotations}"
            )


@dataclass(frozen=True)
class QuantRecipe:
    """block: scheme of attention and feed-forward linears; modulation: scheme of the adaLN linears,
    None to keep them. Patterns are fnmatch patterns on full module names, and one that matches a
    module holds for every linear in it: a linear is quantized if include matches and exclude does
    not; overrides are (pattern, scheme or None) pairs, the first that matches wins. mode "paper" is
    the published method (method.md decision 2). Of a scheme the recipe fixes the bits; rotation and
    activation scale are searched per input when there is calibration data and taken from the scheme
    when there is none. bias_correction adds (W - W^) E[x] to the bias of linears that have one
    (calibrated, mode "default" only). rounding "feedback" rounds each weight with error feedback
    over its quantized input, damped by that share of the input's mean power, and refined in so many
    passes (calibrated, mode "default"); "nearest" rounds each weight by itself. low_rank: rank of a
    16-bit branch beside the linears of every input but modulation (module low_rank), 0 for none;
    not in mode "paper". shared_tables: levels of a linear in so many tables that its rows share,
    16 rows a table at least, 0 for a table of each row's own, which modulation keeps (module
    shared_tables); not in mode "paper". family describes a model unknown to
    lrq_quant.families."""

    block: QuantScheme = QuantScheme(weight_bits=4, act_bits=8)
    modulation: QuantScheme | None = QuantScheme(weight_bits=4, act_bits=16, rotation="none")
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    overrides: tuple[tuple[str, QuantScheme | None], ...] = ()
    mode: str = "default"
    bias_correction: bool = True
    rounding: str = "feedback"
    damping: float = 0.01
    refinement: int = 1
    low_rank: int = 0
    shared_tables: int = 0
    family: Family | None = None
    search: SearchOptions = field(default_factory=SearchOptions)
    calibration: CalibrationOptions = field(default_factory=CalibrationOptions)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"QuantRecipe: mode must be one of {MODES}, got {self.mode!r}")
        if self.rounding not in ROUNDINGS:
            raise ValueError(
                f"QuantRecipe: rounding must be one of {ROUNDINGS}, got {self.rounding!r}"
            )
        if self.damping < 0 or self.refinement < 0:
            raise ValueError(
                "QuantRecipe: damping and refinement must not be negative, "
                f"got {self.damping} and {self.refinement}"
            )
        check_low_rank(self.low_rank, "QuantRecipe")
        check_shared_tables(self.shared_tables, "QuantRecipe")
        for argument in ("low_rank", "shared_tables"):
            if self.mode == "paper" and (given := getattr(self, argument)):
                raise ValueError(f"QuantRecipe: {argument} must be 0 in mode 'paper', got {given}")
        for argument in ("include", "exclude"):
            if isinstance(getattr(self, argument), str):
                raise TypeError(f"QuantRecipe: {argument} must be a tuple of patterns, got a str")

    @staticmethod
    def from_name(name: str, **changes: Any) -> QuantRecipe:
        """Recipe whose blocks have the scheme `name`, such as "w4a8"; changes are fields."""
        block = QuantScheme.from_name(name)
        if block.act_bits == 4:
            # Weights-only A4 needs the Gaussian optimum; absmax costs 2-3 dB (method.md 5.6).
            block = dataclasses.replace(block, scale_mode="rms", scale_factor=0.3545)
        return QuantRecipe(**{"block": block, **changes})

    @property
    def needs_gram(self) -> bool:
        """Whether a calibrated run needs the gram matrices of the inputs."""
        return self.mode == "default" and self.rounding == "feedback"

    def low_rank_of(self, group: InputGroup) -> int:
        """Rank of the branch of one input: no more than the stacked weights of its linears have."""
        if group.linears[0].role == MODULATION:
            return 0  # one row a sample: its launch decodes weights, a branch would be two more
        return min(self.low_rank, group.in_features, group.weights // group.in_features)

    def shared_tables_of(self, linear: LinearPlan) -> int:
        """Tables that the rows of one linear share, 0 for their own."""
        if linear.role == MODULATION or not self.shared_tables:
            return 0
        return tables_of_rows(linear.out_features, self.shared_tables)

    def resolve(self, model: nn.Module, family: Family | None = None) -> QuantPlan:
        """The plan for `model`; it may live on the meta device.  The family is the given one, the
        recipe's or that of the model's class.  Raises ValueError on a model of an unknown family or
        of another than the given one, and on a pattern that matches no linear of it."""
        family = family or self.family or family_of(model)
        if family.model_class not in {cls.__name__ for cls in type(model).__mro__}:
            raise ValueError(
                f"QuantRecipe: family must be of a {type(model).__name__}, as the model is, got "
                f"one of {family.model_class}"
            )
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        self._check_patterns(linears)
        groups: list[InputGroup] = []
        kept: dict[str, str] = {}
        for role, names in family_groups(family, linears):
            # Members with another activation width cannot share one quantized input.
            by_input: dict[int, list[LinearPlan]] = {}
            for name in names:
                scheme, why = self._scheme(name, role, linears[name])
                if scheme is None:
                    kept[name] = why
                    continue
                shape = linears[name].weight.shape
                plan = LinearPlan(name, role, scheme, shape[0], shape[1])
                by_input.setdefault(scheme.act_bits, []).append(plan)
            groups += [InputGroup(tuple(plans)) for plans in by_input.values()]
        position = {name: i for i, name in enumerate(linears)}
        groups.sort(key=lambda group: position[group.name])
        quantized = {linear.name for group in groups for linear in group.linears}
        for name in linears:
            if name not in quantized and name not in kept:
                kept[name] = _why_kept(family, name)
        return QuantPlan(
            type(model).__name__,
            tuple(groups),
            tuple(KeptLinear(n, linears[n].weight.numel(), kept[n]) for n in linears if n in kept),
            sum(p.numel() for p in model.parameters()),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def _scheme(self, name: str, role: str, linear: nn.Linear) -> tuple[QuantScheme | None, str]:
        if not _matches(name, self.include) or _matches(name, self.exclude):
            return None, EXCLUDED
        if linear.in_features % K_MULTIPLE:
            return None, f"in_features {linear.in_features} is not a multiple of {K_MULTIPLE}"
        for pattern, scheme in self.overrides:
            if matches(pattern, name):
                return scheme, f"kept by the override {pattern!r}"
        if role == MODULATION:
            return self.modulation, "the recipe keeps modulation"
        return self.block, ""

    def _check_patterns(self, linears: dict[str, nn.Linear]) -> None:
        patterns = [*self.include, *self.exclude, *(pattern for pattern, _ in self.overrides)]
        check_patterns(patterns, linears, "QuantRecipe")


@dataclass(frozen=True)
class LinearPlan:
    """One linear to quantize: weight [out_features, in_features]."""

    name: str
    role: str
    scheme: QuantScheme
    out_features: int
    in_features: int


@dataclass(frozen=True)
class InputGroup:
    """Linears that read one tensor: one smoothing vector, one rotation, one quantized input."""

    linears: tuple[LinearPlan, ...]

    @property
    def name(self) -> str:
        """Name of the first member, under which the shared tensors are stored."""
        return self.linears[0].name

    @property
    def in_features(self) -> int:
        return self.linears[0].in_features

    @property
    def weights(self) -> int:
        return sum(linear.out_features * linear.in_features for linear in self.linears)


@dataclass(frozen=True)
class KeptLinear:
    name: str
    weights: int
    why: str


@dataclass(frozen=True)
class QuantPlan:
    """groups and kept in the model's order; parameters of the whole model."""

    model_class: str
    groups: tuple[InputGroup, ...]
    kept: tuple[KeptLinear, ...]
    parameters: int

    @cached_property
    def linears(self) -> tuple[LinearPlan, ...]:
        return tuple(linear for group in self.groups for linear in group.linears)

    @property
    def quantized_weights(self) -> int:
        return sum(group.weights for group in self.groups)

    @property
    def coverage(self) -> float:
        """Share of the weights of all linears that is quantized."""
        total = self.quantized_weights + sum(kept.weights for kept in self.kept)
        return self.quantized_weights / total if total else 0.0

    def check_weights_only(self) -> None:
        """Without calibration the schemes say what is searched otherwise: those of one input must
        agree. Raises ValueError naming the first two that do not."""
        for group in self.groups:
            first = group.linears[0]
            for linear in group.linears[1:]:
                for key in INPUT_FIELDS:
                    of_first, of_this = (getattr(of.scheme, key) for of in (first, linear))
                    if of_first != of_this:
                        raise ValueError(
                            f"QuantRecipe: {key} of linears that read one input must agree "
                            f"when nothing is calibrated, got {of_first!r} of {first.name} and "
                            f"{of_this!r} of {linear.name}"
                        )

    def summary(self) -> str:
        """What is quantized and what stays, one line per kind of linear."""
        lines = [
            f"{self.model_class}: {len(self.linears)} of {len(self.linears) + len(self.kept)} "
            f"linears in {len(self.groups)} input groups, {self.coverage:.2%} of linear weights, "
            f"{self.quantized_weights / max(1, self.parameters):.2%} of all parameters"
        ]
        kinds: dict[tuple[str, str, str, str], list[int]] = {}
        for linear in self.linears:
            key = (_kind(linear.name), linear.role, linear.scheme.name, _small_block(linear))
            kinds.setdefault(key, []).append(linear.out_features * linear.in_features)
        for (kind, role, scheme, note), sizes in kinds.items():
            line = f"  {scheme:<6} {role:<13} {len(sizes):>4} x {kind}  {_millions(sizes)}"
            lines.append(line + note)
        stays: dict[tuple[str, str], list[int]] = {}
        for kept in self.kept:
            stays.setdefault((_kind(kept.name), kept.why), []).append(kept.weights)
        for (kind, why), sizes in stays.items():
            lines.append(f"  stays  {len(sizes):>4} x {kind}  {_millions(sizes)}: {why}")
        return "\n".join(lines)


def family_groups(family: Family, linears: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """(role, names of the linears that read one tensor) for every block that a rule matches.
    Raises ValueError for a linear in two inputs."""
    ruled: set[str] = set()
    for rule in family.inputs:
        parents: dict[str, list[str]] = {}
        for member in rule.members:
            for name in linears:
                parent = name.removesuffix(member).removesuffix(".")
                joined = f"{parent}.{member}" if parent else member
                if joined == name and fnmatchcase(parent, rule.parent):
                    parents.setdefault(parent, []).append(name)
        for names in parents.values():
            if twice := ruled.intersection(names):
                raise ValueError(
                    f"Family {family.model_class}: {min(twice)} must be in one input, got several"
                )
            ruled.update(names)
            yield rule.role, names


def _why_kept(family: Family, name: str) -> str:
    for pattern, why in family.stays:
        if fnmatchcase(name, pattern):
            return why
    return "not part of the family's recipe"


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(matches(pattern, name) for pattern in patterns)


def _kind(name: str) -> str:
    """The name with the block index replaced: transformer_blocks.*.attn.to_q."""
    parent, _, rest = name.partition(".")
    index, _, tail = rest.partition(".")
    return f"{parent}.*.{tail}" if index.isdigit() and tail else name


def _small_block(linear: LinearPlan) -> str:
    """Said where the width has no block of 128, the least that calibration would choose."""
    k = linear.in_features
    if k % 128 == 0 or linear.scheme.rotation == "none":
        return ""
    return f", rotated in blocks of {max(size for size in BLOCK_SIZES if k % size == 0)}"


def _millions(sizes: list[int]) -> str:
    return f"{sum(sizes) / 1e6:.2f} M"
