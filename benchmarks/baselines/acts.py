"""Activation quantizers: dynamic, per token or per group of channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.baselines.method import ActQuantizer, ActRule
from lrq_quant.rotation_search import dequantized_activation

_TINY = 1e-12


@dataclass(frozen=True)
class Absmax:
    """Symmetric codes, step max|x| * clip / qmax over the token, or over groups of its channels."""

    clip: float = 1.0
    group: int | None = None

    def __call__(self, x: Tensor, bits: int) -> Tensor:
        if bits == 16:
            return x
        parts = x if self.group is None else x.unflatten(-1, (-1, self.group))
        qmax = 2 ** (bits - 1) - 1
        step = parts.abs().amax(-1, keepdim=True).clamp_min(_TINY) * (self.clip / qmax)
        return ((parts / step).round().clamp(-qmax, qmax) * step).view(x.shape)


@dataclass(frozen=True)
class MinMax:
    """Asymmetric codes over [min, max] * clip of the token, with an integer zero point."""

    clip: float = 1.0

    def __call__(self, x: Tensor, bits: int) -> Tensor:
        if bits == 16:
            return x
        low = x.amin(-1, keepdim=True).clamp_max(0) * self.clip
        high = x.amax(-1, keepdim=True).clamp_min(0) * self.clip
        step = ((high - low) / (2**bits - 1)).clamp_min(_TINY)
        zero = (-low / step).round()
        return ((x / step + zero).round().clamp(0, 2**bits - 1) - zero) * step


def fixed(quantizer: ActQuantizer) -> ActRule:
    """The same everywhere."""
    return lambda tokens, weights, bits: quantizer


def clip_searched(clips: Sequence[float] = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)) -> ActRule:
    """Absmax with the clip of least output error on the calibration tokens."""

    def rule(tokens: Tensor, weights: tuple[Tensor, ...], bits: int) -> ActQuantizer:
        weight = torch.cat([w[:128] for w in weights])

        def error(clip: float) -> float:
            return float(((Absmax(clip)(tokens, bits) - tokens) @ weight.T).square().sum())

        return Absmax(min(clips, key=error))

    return rule


def scale_rule(mode: str, factor: float) -> ActQuantizer:
    """The rules of this package: reference.token_scale."""

    def quantize(x: Tensor, bits: int) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return dequantized_activation(rows, bits, mode, factor).view(x.shape)

    return quantize
