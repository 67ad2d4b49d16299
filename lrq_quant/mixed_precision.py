"""Weight widths per linear under a budget of bits, by what each does to the model's output.

    states = {b: quantize_model(model, recipe[b], stats=stats).states for b in (2, 3, 4)}
    errors = sensitivities(model, states, capture_inputs(model, run, prompts))
    mixed = mixed_recipe(recipe[4], allocate_bits(errors, code_costs(states), budget))

The error of several quantized linears is taken as the sum of what each causes alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lrq_kernels.checkpoint import LinearState, stored_bits
from lrq_kernels.loader import build_linears

from .recipe import QuantRecipe

# Arguments of one forward of the model.
Call = tuple[tuple, dict[str, Any]]
Errors = dict[str, dict[int, float]]  # linear -> width -> error
# The same at every width, and not what a budget is about; a low-rank branch was chosen to be paid.
_NOT_COUNTED = ("bias", "smooth_scale", "signs", "permutation", "rotation_matrices")


@torch.no_grad()
def capture_inputs(
    model: nn.Module,
    run: Callable[[list[str]], object],
    prompts: Sequence[str],
    limit: int = 8,
) -> list[Call]:
    """Arguments of `limit` forwards spread over run(prompts): early and late steps alike."""
    calls: list[Call] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        run(list(prompts))
    finally:
        hook.remove()
    if not calls:
        raise ValueError("capture_inputs: the run never called the model")
    count = min(limit, len(calls))
    return [calls[i * len(calls) // count] for i in range(count)]


@torch.no_grad()
def sensitivities(
    model: nn.Module,
    states: Mapping[int, Mapping[str, LinearState]],
    calls: Sequence[Call],
    progress: Callable[[str, int, int], None] | None = None,
) -> Errors:
    """Error of the model's output over its power with one linear quantized, all others as they are.

    states: width -> linears, from quantize_model with recipes that differ in weight_bits alone;
    linears of the same width everywhere are left out.  The model is as before afterwards.
    """
    names = _varied_linears(states)
    exact = [_output(model, call) for call in calls]
    power = sum(float(y.square().sum()) for y in exact)
    errors: Errors = {name: {} for name in names}
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    for done, name in enumerate(names):
        original = model.get_submodule(name)
        for width, by_name in states.items():
            state = replace(by_name[name].to(device), shared_input=None)
            try:
                model.set_submodule(name, build_linears({name: state}, dtype)[name])
                outputs = [_output(model, call) for call in calls]
            finally:
                model.set_submodule(name, original)
            noise = sum(float((y - x).square().sum()) for x, y in zip(exact, outputs, strict=True))
            errors[name][width] = noise / max(power, 1e-30)
        if progress is not None:
            progress("sensitivity", done + 1, len(names))
    return errors


def code_costs(states: Mapping[int, Mapping[str, LinearState]]) -> dict[str, dict[int, int]]:
    """Bits of codes, levels, scales and low-rank branch (its first factor counts at the linear that
    stores the input) of each varied linear at each width."""
    costs: dict[str, dict[int, int]] = {}
    for name in _varied_linears(states):
        costs[name] = {
            width: sum(n for key, n in stored_bits(s[name]).items() if key not in _NOT_COUNTED)
            for width, s in states.items()
        }
    return costs


def allocate_bits(
    errors: Errors, costs: Mapping[str, Mapping[int, int]], budget: int
) -> dict[str, int]:
    """Width of each linear with the least summed error whose summed cost is at most `budget` bits.

    Greedy on the lower convex hull of each linear's (cost, error): the step that lowers the error
    most per bit is taken first, so the result is optimal up to the last step.  Raises ValueError
    when even the cheapest widths cost more.
    """
    hulls = {name: _hull(costs[name], errors[name]) for name in errors}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    spent = sum(costs[name][width] for name, width in chosen.items())
    if spent > budget:
        raise ValueError(
            f"allocate_bits: budget must be at least {spent} bits, the cheapest widths, "
            f"got {budget}"
        )
    steps: list[tuple[float, str, int]] = []

    def offer(name: str, place: int) -> None:
        hull = hulls[name]
        if place + 1 < len(hull):
            low, high = hull[place], hull[place + 1]
            gain = errors[name][low] - errors[name][high]
            heapq.heappush(steps, (-gain / (costs[name][high] - costs[name][low]), name, place + 1))

    for name in hulls:
        offer(name, 0)
    while steps:
        _, name, place = heapq.heappop(steps)
        width = hulls[name][place]
        more = costs[name][width] - costs[name][chosen[name]]
        if spent + more <= budget:
            spent += more
            chosen[name] = width
            offer(name, place)
    return chosen


def mixed_recipe(recipe: QuantRecipe, widths: Mapping[str, int]) -> QuantRecipe:
    """`recipe` with the weights of each named linear at its width."""
    overrides = tuple(
        (name, replace(recipe.block, weight_bits=width)) for name, width in widths.items()
    )
    return replace(recipe, overrides=(*recipe.overrides, *overrides))


def _varied_linears(states: Mapping[int, Mapping[str, LinearState]]) -> list[str]:
    first = next(iter(states.values()))
    return [
        name
        for name in first
        if all(by_name[name].scheme.weight_bits == width for width, by_name in states.items())
    ]


def _hull(costs: Mapping[int, int], errors: Mapping[int, float]) -> list[int]:
    """Widths on the lower convex hull of (cost, error), cheapest first, error falling."""
    hull: list[int] = []

    def slope(a: int, b: int) -> float:
        return (errors[b] - errors[a]) / (costs[b] - costs[a])

    for width in sorted(costs, key=costs.__getitem__):
        if hull and errors[width] >= errors[hull[-1]]:
            continue
        while len(hull) > 1 and slope(hull[-1], width) <= slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(width)
    return hull


def _output(model: nn.Module, call: Call) -> Tensor:
    """The first tensor of what the model returns, in fp32."""
    result = model(*call[0], **call[1])
    if not isinstance(result, Tensor):
        result = result[0]
    return result.float()
