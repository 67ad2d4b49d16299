"""What was done to a model, layer by layer: what `inspect` prints and a checkpoint folder keeps."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from lrq_kernels.checkpoint import LinearState, stored_bits
from lrq_kernels.scheme import QuantScheme

from .input_makers import MOVES_HEADS, makers_by_name, why_gathered
from .layer_statistics import ChannelSpread, WeightHistogram
from .recipe import KeptLinear, LinearPlan, QuantPlan, QuantRecipe
from .rotation_search import PERMUTED, PERMUTED_PART, RotationChoice


@dataclass(frozen=True)
class LinearReport:
    """One linear.  stored_bits: codes, levels and scales, its own factor of a low-rank branch, and
    at the owner of a shared input its smoothing, rotation and factor; without the bias, which the
    model had before.  weight_sqnr_db is of the rotated, smoothed weight, NaN where no report was
    kept; output_sqnr_db of sampled tokens, None without calibration.  channels are those of the
    shared input, None without calibration; reports of older versions have neither histogram nor
    channels."""

    name: str
    role: str
    scheme: QuantScheme
    shared_input: str
    out_features: int
    in_features: int
    rotation: str
    why: str
    alpha: float | None
    j: float | None
    peak_ratio: float | None
    weight_sqnr_db: float
    output_sqnr_db: float | None
    stored_bits: int
    candidates: dict[str, float]
    histogram: WeightHistogram | None = None
    channels: ChannelSpread | None = None

    @staticmethod
    def of(
        linear: LinearPlan,
        state: LinearState,
        choice: RotationChoice,
        measured: MeasuredLinear,
        channels: ChannelSpread | None,
    ) -> LinearReport:
        bits = sum(n for field, n in stored_bits(state).items() if field != "bias")
        return LinearReport(
            name=linear.name,
            role=linear.role,
            scheme=state.scheme,
            shared_input=state.shared_input or linear.name,
            out_features=linear.out_features,
            in_features=linear.in_features,
            rotation=choice.label,
            why=choice.why,
            alpha=choice.alpha,
            j=choice.j,
            peak_ratio=choice.peak_ratio,
            weight_sqnr_db=measured.weight_sqnr_db,
            output_sqnr_db=measured.output_sqnr_db,
            stored_bits=bits,
            candidates=choice.errors,
            histogram=measured.histogram,
            channels=channels,
        )

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def weight_bits(self) -> float:
        return self.stored_bits / self.weights

    @property
    def sqnr_db(self) -> float:
        """Of the output where it was measured, else of the weight: what layers are compared by."""
        return self.weight_sqnr_db if self.output_sqnr_db is None else self.output_sqnr_db

    @property
    def rotation_kind(self) -> str:
        """none, hadamard, permuted or dual: the label without block and smoothing."""
        return self.rotation.partition(" ")[0].rstrip("0123456789")

    def to_dict(self) -> dict[str, Any]:
        """JSON values: numbers that are not finite become None."""
        values = dataclasses.asdict(self)
        values["weight_bits"] = self.weight_bits
        return _json(values)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> LinearReport:
        values = {key: value for key, value in values.items() if key != "weight_bits"}
        values["scheme"] = QuantScheme.from_dict(values["scheme"])
        if values["weight_sqnr_db"] is None:
            values["weight_sqnr_db"] = math.inf
        if values.get("histogram") is not None:
            values["histogram"] = WeightHistogram.from_dict(values["histogram"])
        if values.get("channels") is not None:
            values["channels"] = ChannelSpread.from_dict(values["channels"])
        return LinearReport(**values)


@dataclass(frozen=True)
class MeasuredLinear:
    """What was measured of a finished linear beside its weight."""

    weight_sqnr_db: float
    output_sqnr_db: float | None
    histogram: WeightHistogram


@dataclass(frozen=True)
class ComparedPicture:
    """One prompt drawn from one seed by the model before and after quantization, and the peak
    signal-to-noise ratio of the two at 8 bits: inf where they are equal."""

    prompt: str
    seed: int
    psnr_db: float

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ComparedPicture:
        psnr = math.inf if values["psnr_db"] is None else values["psnr_db"]
        return ComparedPicture(values["prompt"], values["seed"], psnr)


@dataclass(frozen=True)
class QuantReport:
    """The whole model.  coverage: share of the weights of all linears that is quantized;
    weight_bits: stored bits of the quantized linears over their weights; pictures: those that were
    drawn to compare, if any."""

    model_class: str
    recipe: dict[str, Any]
    calibrated: bool
    coverage: float
    parameters: int
    linears: tuple[LinearReport, ...]
    kept: tuple[KeptLinear, ...]
    pictures: tuple[ComparedPicture, ...] = ()

    @staticmethod
    def of(
        plan: QuantPlan, recipe: QuantRecipe, linears: list[LinearReport], *, calibrated: bool
    ) -> QuantReport:
        return QuantReport(
            plan.model_class,
            recipe.to_dict(),
            calibrated,
            plan.coverage,
            plan.parameters,
            tuple(linears),
            plan.kept,
        )

    @property
    def weights(self) -> int:
        return sum(linear.weights for linear in self.linears)

    @property
    def weight_bits(self) -> float:
        return sum(linear.stored_bits for linear in self.linears) / max(1, self.weights)

    @property
    def bits_include(self) -> str:
        """What weight_bits holds beside codes, in words."""
        rank = self.recipe.get("low_rank", 0)
        branches = f", branches of rank {rank}" if rank else ""
        tables = self.recipe.get("shared_tables", 0)
        shared = f" of {tables} tables that rows share" if tables else ""
        return f"codebooks{shared}, scales{branches} and rotations included"

    @property
    def gathered(self) -> tuple[str, ...]:
        """Shared inputs that a permutation in front of the block Hadamard reorders at run time: it
        cannot be folded into what makes them. ("dual" permutes between its factors.)"""
        return tuple(name for name, (makers, _) in self._permuted().items() if not makers)

    @property
    def foldable(self) -> dict[str, tuple[str, ...]]:
        """Shared inputs whose permutation fold_permutations folds -> the linears whose rows take
        it; until then they are gathered."""
        return {name: makers for name, (makers, _) in self._permuted().items() if makers}

    def _permuted(self) -> dict[str, tuple[tuple[str, ...], str]]:
        """Permuted inputs -> the linears whose rows can take it, and where none can, why."""
        rows = {linear.name: linear.out_features for linear in self.linears}
        found: dict[str, tuple[tuple[str, ...], str]] = {}
        for linear in self.linears:
            if not linear.rotation.startswith(PERMUTED) or linear.shared_input in found:
                continue
            name = linear.shared_input
            makers, first = makers_by_name(name, rows, linear.in_features)
            if makers and first > 0 and not linear.rotation.startswith(PERMUTED_PART):
                found[name] = (), MOVES_HEADS
            else:
                found[name] = tuple(makers), why_gathered(name)
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON values; from_dict is the inverse."""
        return {
            "model_class": self.model_class,
            "recipe": _json(self.recipe),
            "calibrated": self.calibrated,
            "coverage": self.coverage,
            "parameters": self.parameters,
            "weight_bits": self.weight_bits,
            "gathered": list(self.gathered),
            "foldable": list(self.foldable),
            "linears": [linear.to_dict() for linear in self.linears],
            "kept": [dataclasses.asdict(kept) for kept in self.kept],
            "pictures": [_json(dataclasses.asdict(picture)) for picture in self.pictures],
        }

    @staticmethod
    def from_dict(values: dict[str, Any]) -> QuantReport:
        return QuantReport(
            values["model_class"],
            values["recipe"],
            values["calibrated"],
            values["coverage"],
            values["parameters"],
            tuple(LinearReport.from_dict(linear) for linear in values["linears"]),
            tuple(KeptLinear(**kept) for kept in values["kept"]),
            tuple(ComparedPicture.from_dict(picture) for picture in values.get("pictures", ())),
        )

    def table(self) -> str:
        """One line per linear, and the totals."""
        rows = [("linear", "scheme", "rotation", "J", "weight dB", "output dB", "bits", "why")]
        for linear in self.linears:
            rows.append(
                (
                    linear.name,
                    linear.scheme.name,
                    linear.rotation,
                    _number(linear.j),
                    _number(linear.weight_sqnr_db),
                    _number(linear.output_sqnr_db),
                    f"{linear.weight_bits:.3f}",
                    linear.why,
                )
            )
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
        lines = []
        for row in rows:
            cells = [cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)]
            lines.append("  ".join(cells).rstrip())
        lines.append(self.summary())
        if self.foldable:
            lines.append(
                f"{len(self.foldable)} inputs are permuted by the rows of the linears that make "
                "them once fold_permutations or fuse_blocks is called: "
                + ", ".join(f"{name} by {' and '.join(by)}" for name, by in self.foldable.items())
            )
        reasons: dict[str, list[str]] = {}
        for name, (makers, why) in self._permuted().items():
            if not makers:
                reasons.setdefault(why, []).append(name)
        for why, names in reasons.items():
            lines.append(
                f"{len(names)} inputs are permuted at run time, by a gather in front of the "
                f"rotation ({why}): {', '.join(names)}"
            )
        return "\n".join(lines)

    def summary(self) -> str:
        kept = sum(linear.weights for linear in self.kept)
        return (
            f"{self.model_class}: {len(self.linears)} linears quantized, "
            f"{self.weights / 1e6:.2f} M weights at {self.weight_bits:.3f} bits, "
            f"{self.bits_include}; coverage {self.coverage:.2%} of linear weights; "
            f"{len(self.kept)} linears ({kept / 1e6:.2f} M) stay"
        )


def _number(value: float | None) -> str:
    return "-" if value is None or math.isnan(value) else f"{value:.2f}"


def _json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
