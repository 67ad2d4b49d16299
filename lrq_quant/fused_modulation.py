"""The modulation linears of all blocks of FLUX as one launch for a whole forward.

Each adaLN linear of a block reads silu(temb), one row for each sample. stack_modulation merges them
into one linear of the model, MODULATION, and leaves in their places what computes its own rows; a
fused block asks for its rows by temb, and the first to ask computes those of all.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lrq_kernels import LRQLinear, StackedLinear, StackedRows, stack_linears
from lrq_kernels.stacked_linear import stacking_obstacle

from .adapters import no_longer, undo_before_adapters

# The child of a model that holds what is stacked.
MODULATION = "lrq_modulation"
_NORMS = ("AdaLayerNormZero", "AdaLayerNormZeroSingle")


def stack_modulation(model: nn.Module) -> None:
    """Merge the modulation linears of `model` where all of them fit together; see
    modulation_obstacle. The weights are held once, before and after."""
    norms = _norms(model)
    if is_stacked(model) or modulation_obstacle(model) is not None or not norms:
        return
    stack, places = stack_linears([norm.linear for norm in norms.values()])
    for name, norm, rows in zip(norms, norms.values(), places, strict=True):
        # A linear that was made without a name gets that of its place, for checkpoints.
        stack.parts[rows.index] = (rows.parts[0][0] or f"{name}.linear", rows.out_features)
        norm.linear = rows
    model.add_module(MODULATION, stack)
    undo_before_adapters(model, unstack_modulation)


def unstack_modulation(model: nn.Module) -> None:
    """Undo stack_modulation: every linear is again what it was, bit for bit."""
    for norm in _norms(model).values():
        if isinstance(norm.linear, StackedRows):
            norm.linear = norm.linear.linear()
    if isinstance(getattr(model, MODULATION, None), StackedLinear):
        delattr(model, MODULATION)
    no_longer(model, unstack_modulation)


def modulation_obstacle(model: nn.Module) -> str | None:
    """Why the modulation of `model` is not one launch and could not be; None where it is or could,
    and where there is none."""
    norms = _norms(model)
    linears = []
    for name, norm in norms.items():
        if isinstance(norm.linear, StackedRows):
            return None
        if type(norm.linear) is not LRQLinear:
            return f"{name}.linear is a {type(norm.linear).__name__}"
        plain = getattr(norm, "emb", None) is None and type(norm.silu) is nn.SiLU
        if len(norm.linear.parts) != 1 or not plain:
            return f"{name} is not plain modulation"
        for module in (norm, norm.linear):
            if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
                return f"{name} has hooks"
        linears.append(norm.linear)
    return stacking_obstacle(linears) if linears else None


def is_stacked(model: nn.Module) -> bool:
    return isinstance(getattr(model, MODULATION, None), StackedLinear)


def modulation(norm: Any, temb: Tensor, count: int) -> tuple[Tensor, ...]:
    """The `count` vectors [B, K] of an adaLN norm for temb [B, K], by what its linear is."""
    linear = norm.linear
    if type(linear) is StackedRows:
        return linear.read(temb, F.silu).chunk(count, dim=1)
    return linear(F.silu(temb)).chunk(count, dim=1)


def _norms(model: nn.Module) -> dict[str, Any]:
    """The adaLN norms of the blocks, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).__name__ in _NORMS and hasattr(module, "linear")
    }
