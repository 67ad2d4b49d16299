"""Widths of weights and activations per input, under a budget of bits, by what each does to the
model's output.

    budget = BitBudget(weight_bits=3.5)
    mixed = budgeted_recipe(model, QuantRecipe.from_name("w4a8"), budget, run, prompts)
    quantized = quantize_model(model, mixed, run=run, prompts=prompts)

Every input of the blocks is quantized alone, at each width, and the error of the model's output is
measured on a few forwards; the error of several is taken as the sum of what each causes alone.
Linears of one input get one width, so that they stay one GEMM. What is measured is rounded to
nearest, which costs no second moments; the recipe that comes out quantizes as it says.
"""

from __future__ import annotations

import heapq
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrq_kernels.checkpoint import LinearState, stored_bits
from lrq_kernels.loader import build_linears
from lrq_kernels.scheme import ACT_BITS, WEIGHT_BITS, QuantScheme

from .auto_family import with_family
from .calibration import ActivationStats, Progress, collect_stats
from .model_stats import strided_sample
from .pipeline import quantize_model
from .recipe import InputGroup, QuantPlan, QuantRecipe
from .sharding import processes
from .work_folder import WorkFolder

logger = logging.getLogger(__name__)

DENSE_BITS = 16  # as a width of weights: the linears stay as they are
# Arguments of one forward of the model.
Call = tuple[tuple, dict[str, Any]]
Run = Callable[[list[str]], object]
Errors = dict[str, dict[int, float]]  # input -> width -> error
Widths = dict[str, int]  # input -> width
# A forward of few prompts is enough to rank inputs by.
_PROMPTS = 4


@dataclass(frozen=True)
class BitBudget:
    """weight_bits: what a weight of the blocks may take on average, counted as in reports: codes,
    levels, scales, smoothing, rotation and low-rank branch, and 16 where linears stay dense; dealt
    out over `widths`, of 2, 3, 4 and 16 (dense). act_bits: bits of activations on average, each
    input counted by the weights that it meets; over act_widths, of 4, 8 and 16. None: as the recipe
    says; not both. forwards: how many the error is measured on, from early and late steps."""

    weight_bits: float | None = None
    act_bits: float | None = None
    widths: tuple[int, ...] = (*WEIGHT_BITS, DENSE_BITS)
    act_widths: tuple[int, ...] = ACT_BITS
    forwards: int = 4

    def __post_init__(self) -> None:
        if self.weight_bits is None and self.act_bits is None:
            raise ValueError("BitBudget: weight_bits or act_bits must be given, got neither")
        for field, known in (
            ("widths", (*WEIGHT_BITS, DENSE_BITS)),
            ("act_widths", ACT_BITS),
        ):
            given = getattr(self, field)
            if not given or not set(given) <= set(known):
                raise ValueError(f"BitBudget: {field} must be some of {known}, got {given}")
        for field, least in (
            ("weight_bits", min(self.widths)),
            ("act_bits", min(self.act_widths)),
        ):
            given = getattr(self, field)
            if given is not None and not least <= given < float("inf"):
                raise ValueError(
                    f"BitBudget: {field} must be at least {least}, the least width, got {given}"
                )
        if self.forwards < 1:
            raise ValueError(f"BitBudget: forwards must be positive, got {self.forwards}")


def budgeted_recipe(
    model: nn.Module,
    recipe: QuantRecipe,
    budget: BitBudget,
    run: Run,
    prompts: Sequence[str],
    *,
    work_folder: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> QuantRecipe:
    """`recipe` with an override for every input of the blocks whose widths the budget changes.

    run and prompts: as of quantize_model; the prompts are drawn once for statistics, four of them
    again for what the error is measured on. The model holds quantized linears meanwhile, a group at
    a time, and is as before afterwards. Inputs that an override of the recipe names, and
    modulation, keep what the recipe says and are not counted. work_folder keeps the result, so that
    a killed run goes on with the same widths. Processes of torch.distributed must all call this;
    each measures for itself and the result is that of the first.

    Raises ValueError for a budget below the narrowest widths, with what those take, and what
    quantize_model raises.
    """
    with processes() as shards:
        recipe = with_family(recipe, model, lambda: run(list(prompts[:1])))
        plan = recipe.resolve(model)
        work = None if work_folder is None else WorkFolder(Path(work_folder))
        key = _key(model, recipe, budget, prompts)
        kept = None if work is None else work.load_widths(key)
        # The first process writes what all have chosen, when all have looked for it here.
        shards.agree("the widths that the work folder holds", str(kept))
        if kept is None:
            options = replace(recipe.calibration, gram=False)
            stats = collect_stats(run, model, plan.groups, prompts, options, progress)
            calls = capture_inputs(model, run, prompts[:_PROMPTS], budget.forwards)
            chosen = choose_widths(
                model, recipe, budget, stats, calls, device=device, progress=progress
            )
            kept = shards.of_first(list(chosen))
            if work is not None and shards.rank == 0:
                work.save_widths(key, kept)
        acts, weights = kept
        return mixed_recipe(recipe, plan, acts, weights)


def choose_widths(
    model: nn.Module,
    recipe: QuantRecipe,
    budget: BitBudget,
    stats: dict[str, ActivationStats],
    calls: Sequence[Call],
    *,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> tuple[Widths, Widths]:
    """(widths of activations, widths of weights) of the inputs of the blocks, each empty where the
    budget does not ask for it. stats: of every input of the plan; calls: from capture_inputs."""
    plan = recipe.resolve(model)
    groups = {group.name: group for group in _dealt(plan, recipe)}
    candidate = replace(
        recipe, modulation=None, rounding="nearest" if recipe.mode == "default" else recipe.rounding
    )

    def states_at(scheme: QuantScheme) -> dict[str, LinearState]:
        made = replace(candidate, block=scheme)
        return quantize_model(model, made, stats=stats, device=device, progress=progress).states

    def measured(schemes: Mapping[int, QuantScheme]) -> tuple[Errors, dict[str, dict[int, int]]]:
        states = {width: states_at(scheme) for width, scheme in schemes.items()}
        errors = sensitivities(model, states, groups, calls, progress)
        return errors, stored_costs(states, groups)

    sizes = {name: group.weights for name, group in groups.items()}
    total = sum(sizes.values())
    acts: Widths = {}
    weights: Widths = {}
    if budget.act_bits is not None:
        base = recipe.block.weight_bits
        errors, _ = measured({a: scheme_with(recipe, base, a) for a in budget.act_widths})
        costs = {name: {a: a * sizes[name] for a in budget.act_widths} for name in sizes}
        acts = allocate_bits(errors, costs, int(budget.act_bits * total), "act_bits", total)
    if budget.weight_bits is not None:
        widths = [width for width in budget.widths if width != DENSE_BITS]
        base = recipe.block.act_bits
        errors, costs = measured({w: scheme_with(recipe, w, base) for w in widths})
        if DENSE_BITS in budget.widths:
            for name, size in sizes.items():
                errors.setdefault(name, {})[DENSE_BITS] = 0.0
                costs.setdefault(name, {})[DENSE_BITS] = DENSE_BITS * size
        limit = int(budget.weight_bits * total)
        weights = allocate_bits(errors, costs, limit, "weight_bits", total)
    return acts, weights


@torch.no_grad()
def capture_inputs(model: nn.Module, run: Run, prompts: Sequence[str], limit: int) -> list[Call]:
    """Arguments of `limit` forwards spread over those that draw the prompts one by one: early and
    late steps alike."""
    calls: list[Call] = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    try:
        for prompt in prompts:
            run([prompt])
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
    groups: Mapping[str, InputGroup],
    calls: Sequence[Call],
    progress: Progress | None = None,
) -> Errors:
    """Error of the model's output over its power with the linears of one input quantized, all
    others as they are.

    states: width -> linears, of every member of the groups.  The model is as before afterwards.
    """
    exact = [_output(model, call) for call in calls]
    power = sum(float(y.square().sum()) for y in exact)
    errors: Errors = {}
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    for done, (name, group) in enumerate(groups.items()):
        originals = {x.name: model.get_submodule(x.name) for x in group.linears}
        errors[name] = {}
        for width, by_name in states.items():
            own = {linear: by_name[linear].to(device) for linear in originals}
            try:
                for linear, module in build_linears(own, dtype).items():
                    model.set_submodule(linear, module)
                outputs = [_output(model, call) for call in calls]
            finally:
                for linear, original in originals.items():
                    model.set_submodule(linear, original)
            noise = sum(float((y - x).square().sum()) for x, y in zip(exact, outputs, strict=True))
            errors[name][width] = noise / max(power, 1e-30)
        if progress is not None:
            progress("sensitivity", done + 1, len(groups))
    return errors


def stored_costs(
    states: Mapping[int, Mapping[str, LinearState]], groups: Mapping[str, InputGroup]
) -> dict[str, dict[int, int]]:
    """Bits of the linears of each input at each width: all that is stored but biases."""
    return {
        name: {
            width: sum(
                bits
                for linear in group.linears
                for field, bits in stored_bits(by_name[linear.name]).items()
                if field != "bias"
            )
            for width, by_name in states.items()
        }
        for name, group in groups.items()
    }


def allocate_bits(
    errors: Errors,
    costs: Mapping[str, Mapping[int, int]],
    budget: int,
    argument: str = "budget",
    weights: int = 1,
) -> Widths:
    """Width of each input with the least summed error whose summed cost is at most `budget` bits.

    Greedy on the lower convex hull of each input's (cost, error): the step that lowers the error
    most per bit is taken first, so the result is optimal up to the last step.  Raises ValueError,
    naming `argument` and both figures over `weights`, when even the cheapest widths cost more.
    """
    hulls = {name: _hull(costs[name], errors[name]) for name in errors}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    spent = sum(costs[name][width] for name, width in chosen.items())
    if spent > budget:
        raise ValueError(
            f"allocate_bits: {argument} must be at least {spent / weights:.6g}, the cheapest "
            f"widths, got {budget / weights:.6g}"
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


def mixed_recipe(
    recipe: QuantRecipe, plan: QuantPlan, acts: Mapping[str, int], weights: Mapping[str, int]
) -> QuantRecipe:
    """`recipe` with overrides for the linears of inputs whose widths differ from it."""
    overrides = []
    for group in _dealt(plan, recipe):
        width = weights.get(group.name, recipe.block.weight_bits)
        act_bits = acts.get(group.name, recipe.block.act_bits)
        scheme = None if width == DENSE_BITS else scheme_with(recipe, width, act_bits)
        if scheme != recipe.block:
            overrides += [(linear.name, scheme) for linear in group.linears]
    logger.info("bit budget: %d of %d linears differ", len(overrides), len(plan.linears))
    return replace(recipe, overrides=(*recipe.overrides, *overrides))


def scheme_with(recipe: QuantRecipe, weight_bits: int, act_bits: int) -> QuantScheme:
    """The scheme of the blocks at other widths; another width of activations has its own rule for
    their scale, that of QuantRecipe.from_name."""
    if act_bits == recipe.block.act_bits:
        return replace(recipe.block, weight_bits=weight_bits)
    named = QuantRecipe.from_name(f"w{weight_bits}a{act_bits}").block
    return replace(named, rotation=recipe.block.rotation, block_size=recipe.block.block_size)


def _dealt(plan: QuantPlan, recipe: QuantRecipe) -> list[InputGroup]:
    """The inputs that a budget is for: all linears have the scheme of the blocks."""
    return [g for g in plan.groups if all(linear.scheme == recipe.block for linear in g.linears)]


def _key(model: nn.Module, recipe: QuantRecipe, budget: BitBudget, prompts: Sequence[str]) -> str:
    facts = {"recipe": recipe.to_dict(), "budget": repr(budget), "prompts": list(prompts)}
    return WorkFolder.fingerprint(facts, [strided_sample(p) for p in model.parameters()])


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
