"""What a method consists of, and what it is given."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lrq_kernels.rotation import Rotation
from lrq_quant.calibration import ActivationStats, name_seed
from lrq_quant.error_feedback import ErrorFeedback, rotated_gram
from lrq_quant.quantized_input import QuantizedInput

# x fp32 [..., K], bits -> the values that the codes stand for, fp32 [..., K].
ActQuantizer = Callable[[Tensor, int], Tensor]

FLOAT_BITS = 16  # of a stored scale, smoothing factor or matrix entry of a baseline


@dataclass(frozen=True)
class Setting:
    """Bits of weights and activations of the blocks."""

    weight_bits: int
    act_bits: int

    @staticmethod
    def parse(name: str) -> Setting:
        match = re.fullmatch(r"w(\d+)a(\d+)", name)
        if match is None:
            raise ValueError(f"Setting: name must look like 'w4a8', got {name!r}")
        return Setting(int(match[1]), int(match[2]))

    @property
    def name(self) -> str:
        return f"w{self.weight_bits}a{self.act_bits}"


@dataclass(frozen=True)
class LayerInput:
    """One shared input: its statistics (with gram), the weights fp32 [N_i, K] that read it."""

    stats: ActivationStats
    weights: tuple[Tensor, ...]
    setting: Setting
    seed: int = 0

    @property
    def in_features(self) -> int:
        return self.stats.in_features

    @cached_property
    def sample(self) -> Tensor:
        """Token rows fp32 [M, K] on the device of the weights."""
        return self.stats.sample.to(self.weights[0].device, torch.float32)

    @property
    def weight_absmax(self) -> Tensor:
        """Largest |W[:, k]| of all weights, fp32 [K]."""
        return torch.stack([weight.abs().amax(0) for weight in self.weights]).amax(0)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(name_seed(self.stats.name, self.seed))


@dataclass(frozen=True)
class InputTransform:
    """x -> rotate((x - shift) * smooth); the weight takes the inverse and the bias W @ shift.

    smooth, shift fp32 [K]; rotation of the package, or dense fp32 [K, K], orthogonal, from the
    right.  stored_bits: what the transform adds to the file.  act: the activation quantizer, where
    it was chosen together with the transform.
    """

    smooth: Tensor | None = None
    rotation: Rotation = field(default_factory=Rotation.none)
    dense: Tensor | None = None
    shift: Tensor | None = None
    stored_bits: int = 0
    act: ActQuantizer | None = None

    def rotate(self, x: Tensor) -> Tensor:
        return self.rotation.apply(x) if self.dense is None else x @ self.dense

    def apply(self, x: Tensor) -> Tensor:
        """x fp32 [..., K]."""
        if self.shift is not None:
            x = x - self.shift
        return self.rotate(x if self.smooth is None else x * self.smooth)

    def apply_weight(self, weight: Tensor) -> Tensor:
        """weight fp32 [N, K]."""
        return self.rotate(weight if self.smooth is None else weight / self.smooth)


def shifted_stats(stats: ActivationStats, shift: Tensor) -> ActivationStats:
    """Statistics of x - shift, on the CPU; absmax is that of the sample, the rest exact."""
    c, total = shift.double().cpu(), stats.sum.cpu()
    sample = stats.sample.float().cpu() - shift.cpu()
    tensors = {
        "count": torch.tensor(stats.count),
        "absmax": sample.abs().amax(0),
        "square_sum": (stats.square_sum.cpu() - 2 * c * total + stats.count * c * c).clamp_min(0),
        "sum": total - stats.count * c,
        "sample": sample,
    }
    if stats.gram is not None:
        cross = torch.outer(total, c)
        gram = stats.gram.double().cpu() - cross - cross.T + stats.count * torch.outer(c, c)
        tensors["gram"] = gram.float()
    return ActivationStats.from_tensors(stats.name, tensors)


@dataclass(frozen=True)
class WeightContext:
    """What a weight quantizer may know: the transformed input of its linear."""

    source: LayerInput
    transform: InputTransform

    @cached_property
    def stats(self) -> ActivationStats:
        """Of the tokens that are smoothed and rotated: less the shift."""
        stats, shift = self.source.stats, self.transform.shift
        if stats.gram is None:
            raise ValueError(f"{stats.name}: statistics must hold the gram matrix, got none")
        return stats if shift is None else shifted_stats(stats, shift)

    @cached_property
    def gram(self) -> Tensor:
        """sum x x^T of the transformed tokens, fp32 [K, K]."""
        gram = self.stats.gram.to(self.source.weights[0].device)
        return rotated_gram(gram, self.transform.smooth, self.transform.rotate)

    @cached_property
    def quantized_input(self) -> QuantizedInput:
        """As this package sees it, for a transform that brought its activation quantizer along."""
        act, bits = self.transform.act, self.source.setting.act_bits
        return QuantizedInput(
            self.stats,
            self.transform.smooth,
            self.transform.rotate,
            lambda tokens: tokens if act is None else act(tokens, bits),
            device=self.source.weights[0].device,
        )

    @cached_property
    def feedback(self) -> ErrorFeedback:
        return ErrorFeedback(self.gram)

    @cached_property
    def importance(self) -> Tensor:
        """E[x_k^2] of the transformed tokens, fp32 [K]."""
        return self.gram.diagonal() / max(self.source.stats.count, 1)

    @cached_property
    def mean(self) -> Tensor:
        """E[x_k] of the transformed tokens, fp32 [K]."""
        mean = self.source.stats.mean.to(self.source.weights[0].device)
        return self.transform.apply(mean[None])[0]

    def quantized_mean(self, act: ActQuantizer, bits: int) -> Tensor:
        """E[x_k] of what the product sees: the mean, and the mean error of the sampled tokens."""
        tokens = self.transform.apply(self.source.sample)
        return self.mean + (act(tokens, bits) - tokens).mean(0)


@dataclass(frozen=True)
class QuantizedWeight:
    """values fp32 [N, K], every one representable; stored_bits of codes, scales and codebooks."""

    values: Tensor
    stored_bits: int


TransformRule = Callable[[LayerInput], InputTransform]
WeightQuantizer = Callable[[Tensor, int, WeightContext], QuantizedWeight]
# Tokens of the transformed input, transformed weights -> the quantizer that calibration settles on.
ActRule = Callable[[Tensor, tuple[Tensor, ...], int], ActQuantizer]


@dataclass(frozen=True)
class Method:
    """source: where it was published.  low_rank_bits: bits a weight spent on a 16-bit branch
    L1 (L2 x) beside the quantized residual, 0 for none.  bias_correction adds (W - W^) E[x]."""

    name: str
    source: str
    transform: TransformRule
    weight: WeightQuantizer
    act: ActRule
    low_rank_bits: float = 0.0
    bias_correction: bool = False
