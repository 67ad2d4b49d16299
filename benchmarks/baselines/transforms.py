"""Input transforms: smoothing, rotations, centring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.baselines.acts import scale_rule
from benchmarks.baselines.method import (
    FLOAT_BITS,
    ActQuantizer,
    InputTransform,
    LayerInput,
    TransformRule,
    WeightContext,
    WeightQuantizer,
    shifted_stats,
)
from lrq_kernels.rotation import Rotation, block_hadamard
from lrq_quant.recipe import SearchOptions
from lrq_quant.rotation_search import (
    RotationChoice,
    SearchedLinear,
    choose_rotation,
    choose_rotation_paper,
    dual_rotation,
)
from lrq_quant.smoothing import smooth_scale


def nothing(source: LayerInput) -> InputTransform:
    return InputTransform()


def smoothed(alpha: float) -> TransformRule:
    """SmoothQuant: factors from the absmax of inputs and weights."""

    def rule(source: LayerInput) -> InputTransform:
        return InputTransform(smooth=_smooth(source, alpha), stored_bits=_factors(source))

    return rule


def smoothed_by_error(
    alphas: Sequence[float], weight: WeightQuantizer, act: ActQuantizer
) -> TransformRule:
    """SVDQuant and deepcompressor: the strength of least output error on the calibration tokens."""

    def rule(source: LayerInput) -> InputTransform:
        def error(alpha: float) -> float:
            return _output_error(source, smoothed(alpha)(source), weight, act)

        return smoothed(min(alphas, key=error))(source)

    return rule


def full_hadamard(alpha: float | None = None) -> TransformRule:
    """QuaRot and ViDiT-Q: random signs and a Hadamard matrix as wide as K, a power of two; behind
    smoothing of strength alpha."""

    def rule(source: LayerInput) -> InputTransform:
        width = source.in_features
        if width & (width - 1):
            raise ValueError(f"full_hadamard: K must be a power of two, got {width}")
        device = source.weights[0].device
        signs = torch.randint(0, 2, (width,), generator=source.generator()) * 2 - 1
        dense = block_hadamard(torch.eye(width, device=device) * signs.to(device), width)
        smooth = None if alpha is None else _smooth(source, alpha)
        stored = width + (0 if smooth is None else _factors(source))
        return InputTransform(smooth=smooth, dense=dense, stored_bits=stored)

    return rule


def duquant(alpha: float = 0.5) -> TransformRule:
    """DuQuant: smoothing, greedy 128 x 128 rotation, zigzag permutation, second rotation; its
    faults mended (lrq_quant.rotation_search.dual_rotation)."""

    def rule(source: LayerInput) -> InputTransform:
        smooth = _smooth(source, alpha)
        rotation = dual_rotation(source.sample * smooth, source.generator(), steps=256)
        stored = _factors(source) + _rotation_bits(rotation)
        return InputTransform(smooth=smooth, rotation=rotation, stored_bits=stored)

    return rule


def lrq_paper(source: LayerInput) -> InputTransform:
    """LRQ-DiT: smoothing 0.5, Hadamard where J < 1, else the dual rotation."""
    return _of_choice(choose_rotation_paper(source.stats, source.weights))


def lrq_search(
    options: SearchOptions | None = None, *, centred: bool = False, weight_bits: int | None = None
) -> TransformRule:
    """This package's search, for ablations.  centred subtracts the mean of the calibration tokens
    first; weight_bits: as if the weights had these (the search knows 2 to 4)."""

    def rule(source: LayerInput) -> InputTransform:
        from lrq_kernels.scheme import QuantScheme

        bits = weight_bits or min(source.setting.weight_bits, 4)
        scheme = QuantScheme(bits, source.setting.act_bits)
        linears = [SearchedLinear(weight, scheme, True) for weight in source.weights]
        shift = source.stats.mean.to(source.weights[0].device) if centred else None
        stats = source.stats if shift is None else shifted_stats(source.stats, shift)
        transform = _of_choice(choose_rotation(stats, linears, options))
        if shift is None:
            return transform
        stored = transform.stored_bits + shift.numel() * FLOAT_BITS
        return replace(transform, shift=shift, stored_bits=stored)

    return rule


def _of_choice(choice: RotationChoice) -> InputTransform:
    smooth = choice.smooth_scale
    stored = _rotation_bits(choice.rotation) + (0 if smooth is None else smooth.numel() * 32)
    return InputTransform(
        smooth=smooth,
        rotation=choice.rotation,
        stored_bits=stored,
        act=scale_rule(choice.scale_mode, choice.scale_factor),
    )


def _rotation_bits(rotation: Rotation) -> int:
    tensors = (rotation.signs, rotation.permutation, rotation.matrices)
    return sum(t.numel() * t.element_size() * 8 for t in tensors if t is not None)


def _smooth(source: LayerInput, alpha: float) -> Tensor:
    act = source.stats.absmax.to(source.weights[0].device)
    return smooth_scale(act, source.weight_absmax, alpha)


def _factors(source: LayerInput) -> int:
    return source.in_features * FLOAT_BITS


def _output_error(
    source: LayerInput, transform: InputTransform, quantize: WeightQuantizer, act: ActQuantizer
) -> float:
    context = WeightContext(source, transform)
    tokens = act(transform.apply(source.sample), source.setting.act_bits)
    total = 0.0
    for weight in source.weights:
        rows = weight[:256]
        values = quantize(transform.apply_weight(rows), source.setting.weight_bits, context).values
        exact = source.sample @ rows.T
        error = (tokens @ values.T - exact).square().sum() / exact.square().sum().clamp_min(1e-30)
        total += float(error)
    return total
