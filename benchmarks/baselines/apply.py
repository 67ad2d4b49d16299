"""Puts a method into a model: every linear of the plan becomes a dequantized one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines.method import (
    FLOAT_BITS,
    ActQuantizer,
    InputTransform,
    LayerInput,
    Method,
    Setting,
    WeightContext,
)
from lrq_quant.calibration import ActivationStats
from lrq_quant.families import MODULATION
from lrq_quant.full_precision import full_precision
from lrq_quant.recipe import InputGroup, QuantPlan
from lrq_quant.twin_log import sqnr_db


@dataclass(frozen=True)
class QuantizedLayer:
    """Figures of one linear: real bits, all that the file holds for it but the bias."""

    name: str
    weights: int
    stored_bits: int
    weight_sqnr_db: float


class FakeLinear(nn.Module):
    """y = act(transform(x)) @ W^.T + (transform(x) @ L2.T) @ L1.T + bias, in fp32.

    weight fp32 [N, K] as quantized; down [r, K] and up [N, r] the 16-bit branch, or None.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        transform: InputTransform,
        act: ActQuantizer,
        act_bits: int,
        branch: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        super().__init__()
        # Plain attributes: a cast of the model must not round what is meant to be exact.
        self.quantized, self.bias, self.branch = weight, bias, branch
        self.transform, self.act, self.act_bits = transform, act, act_bits

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.transform.apply(x.float())
        y = F.linear(self.act(tokens, self.act_bits), self.quantized, self.bias)
        if self.branch is not None:
            up, down = self.branch
            y = y + (tokens @ down.T) @ up.T
        return y.to(x.dtype)


def apply_method(
    model: nn.Module,
    plan: QuantPlan,
    stats: dict[str, ActivationStats],
    method: Method,
    setting: Setting,
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> list[QuantizedLayer]:
    """Replace the linears of the plan in `model`; modulation keeps 16-bit inputs and gets no
    transform, at 4 bits a weight (8 where the setting has 8), as this package does."""
    layers = []
    for group in plan.groups:
        if progress is not None:
            progress(group.name)
        layers += _quantize_group(model, group, stats[group.name], method, setting, seed)
    return layers


@torch.no_grad()
@full_precision()
def _quantize_group(
    model: nn.Module,
    group: InputGroup,
    stats: ActivationStats,
    method: Method,
    setting: Setting,
    seed: int,
) -> list[QuantizedLayer]:
    modules = [model.get_submodule(linear.name) for linear in group.linears]
    weights = tuple(module.weight.detach().float() for module in modules)
    modulation = group.linears[0].role == MODULATION
    if modulation:
        setting = Setting(max(4, setting.weight_bits), 16)
    source = LayerInput(stats, weights, setting, seed)
    transform = InputTransform() if modulation else method.transform(source)
    context = WeightContext(source, transform)
    transformed = tuple(transform.apply_weight(weight) for weight in weights)
    act = transform.act
    if act is None:
        tokens = transform.apply(source.sample)
        act = method.act(tokens, transformed, setting.act_bits)
    layers = []
    for linear, module, weight in zip(group.linears, modules, transformed, strict=True):
        branch, branch_bits = None, 0
        if method.low_rank_bits and not modulation:
            branch, branch_bits = _low_rank_branch(weight, method.low_rank_bits)
        residual = weight if branch is None else weight - branch[0] @ branch[1]
        quantized = method.weight(residual, setting.weight_bits, context)
        values = quantized.values
        bias = None if module.bias is None else module.bias.detach().float()
        if bias is not None and transform.shift is not None:
            bias = bias + weight @ transform.rotate(_scaled_shift(transform))
        if bias is not None and method.bias_correction:
            mean_q = context.quantized_mean(act, setting.act_bits)
            bias = bias + residual @ context.mean - values @ mean_q
        fake = FakeLinear(values, bias, transform, act, setting.act_bits, branch)
        model.set_submodule(linear.name, fake)
        own = quantized.stored_bits + branch_bits
        shared = transform.stored_bits if linear.name == group.name else 0
        approximation = values if branch is None else values + branch[0] @ branch[1]
        layers.append(
            QuantizedLayer(
                linear.name, weight.numel(), own + shared, sqnr_db(weight, approximation)
            )
        )
    return layers


def _scaled_shift(transform: InputTransform) -> Tensor:
    shift = transform.shift
    assert shift is not None
    return shift if transform.smooth is None else shift * transform.smooth


def _low_rank_branch(weight: Tensor, bits: float) -> tuple[tuple[Tensor, Tensor], int]:
    """(L1 [N, r], L2 [r, K]) of the largest singular values, rounded to bf16, and their bits; the
    rank is what `bits` a weight pay for, at least 1."""
    rows, columns = weight.shape
    rank = max(1, round(bits * weight.numel() / (FLOAT_BITS * (rows + columns))))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * v[:rank]
    up, down = up.bfloat16().float(), down.bfloat16().float()
    return (up, down), FLOAT_BITS * rank * (rows + columns)
