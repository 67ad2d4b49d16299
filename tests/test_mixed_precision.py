"""mixed_precision: the allocation is optimal, sensitivities are those of single inputs, a budget is
kept to and dealt out by what widths do."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from lrq_kernels.loader import build_linears
from lrq_kernels.testing import sqnr_db
from lrq_quant.calibration import collect_stats
from lrq_quant.demo.scenes import heldout_captions
from lrq_quant.mixed_precision import (
    DENSE_BITS,
    BitBudget,
    allocate_bits,
    budgeted_recipe,
    capture_inputs,
    mixed_recipe,
    sensitivities,
    stored_costs,
)
from lrq_quant.pipeline import quantize_model
from lrq_quant.recipe import QuantRecipe, SearchOptions

pytest.importorskip("diffusers")

from tiny_models import tiny_pipeline  # noqa: E402

from lrq_quant.__main__ import main  # noqa: E402
from lrq_quant.pipeline_io import load_report, quantize_pipeline, save_pipeline  # noqa: E402

Run = Callable[[list[str]], None]
SEARCH = SearchOptions(
    rotations=("none", "hadamard"), alphas=(0.5,), sample_rows=64, weight_rows=32
)
FAST = {"rounding": "nearest", "search": SEARCH}
PROMPTS = heldout_captions(2)
STEPS = {"num_inference_steps": 2}


def test_allocation_is_within_one_step_of_the_best(generator):
    """Against all combinations: no better one fits a budget that is one step smaller."""
    names, widths = "abcde", (2, 3, 4)
    sizes = {name: int(torch.randint(50, 400, (), generator=generator)) for name in names}
    costs = {name: {w: w * sizes[name] for w in widths} for name in names}
    errors = {}
    for name in names:
        drops = torch.rand(3, generator=generator).sort(descending=True).values.tolist()
        errors[name] = dict(zip(widths, drops, strict=True))
    for share in (2.0, 2.4, 3.1, 4.0):
        budget = int(share * sum(sizes.values()))
        chosen = allocate_bits(errors, costs, budget)
        spent = sum(costs[name][chosen[name]] for name in names)
        total = sum(errors[name][chosen[name]] for name in names)
        assert spent <= budget
        for other in itertools.product(widths, repeat=len(names)):
            cost = sum(costs[n][w] for n, w in zip(names, other, strict=True))
            if cost <= budget - 2 * max(sizes.values()):
                error = sum(errors[n][w] for n, w in zip(names, other, strict=True))
                assert total <= error + 1e-9
    with pytest.raises(ValueError, match="budget must be at least"):
        allocate_bits(errors, costs, 2 * sum(sizes.values()) - 1)


def test_a_width_that_is_worse_and_dearer_is_never_taken():
    chosen = allocate_bits({"a": {2: 0.5, 3: 0.6, 4: 0.1}}, {"a": {2: 20, 3: 30, 4: 40}}, budget=39)
    assert chosen == {"a": 2}


def a_run(pipeline: object) -> Run:
    def run(prompts: list[str]) -> None:
        generators = [torch.Generator().manual_seed(len(text)) for text in prompts]
        pipeline(prompt=prompts, generator=generators, output_type="pt", **STEPS)  # type: ignore

    return run


@torch.no_grad()
def test_sensitivities_are_those_of_the_input_alone():
    pipeline = tiny_pipeline()
    model: nn.Module = pipeline.transformer
    recipe = QuantRecipe.from_name("w4a8", modulation=None)
    plan = recipe.resolve(model)
    groups = {group.name: group for group in plan.groups}
    recipes = {w: replace(recipe, block=replace(recipe.block, weight_bits=w)) for w in (2, 4)}
    states = {w: quantize_model(model, made).states for w, made in recipes.items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = capture_inputs(model, a_run(pipeline), PROMPTS, limit=2)
    errors = sensitivities(model, states, groups, calls)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert set(errors) == set(groups)
    for by_width in errors.values():
        assert 0 < by_width[4] < by_width[2] < 1
    # Of one input the error is that of a model in which it alone is quantized.
    name = plan.groups[-1].name
    alone = replace(recipes[2], include=tuple(x.name for x in groups[name].linears))
    exact = [model(*args, **kwargs)[0].float() for args, kwargs in calls]
    quantized = quantize_model(model, alone)
    for linear, module in build_linears(quantized.states, torch.float32).items():
        model.set_submodule(linear, module)
    got = [model(*args, **kwargs)[0].float() for args, kwargs in calls]
    measured = -sqnr_db(torch.cat(exact), torch.cat(got)) / 10
    assert errors[name][2] == pytest.approx(10**measured, rel=1e-3)


def bits_by_input(recipe: QuantRecipe, model: nn.Module) -> dict[str, int]:
    plan = recipe.resolve(model)
    widths = {x.name: x.scheme.weight_bits for x in plan.linears}
    return widths | {x.name: DENSE_BITS for x in plan.kept}


@pytest.mark.parametrize("mean", [2.9, 3.7, 6.0])
def test_a_budget_of_weights_is_kept_to_and_goes_where_it_helps(mean: float):
    pipeline = tiny_pipeline()
    model: nn.Module = pipeline.transformer
    recipe = QuantRecipe.from_name("w4a8", modulation=None, **FAST)
    run = a_run(pipeline)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mixed = budgeted_recipe(model, recipe, BitBudget(mean), run, PROMPTS)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    widths = bits_by_input(mixed, model)
    plan = recipe.resolve(model)
    for group in plan.groups:  # linears of one input stay one GEMM
        assert len({widths[linear.name] for linear in group.linears}) == 1
    dealt = {group.name: widths[group.name] for group in plan.groups}
    assert len(set(dealt.values())) > 1
    quantized = quantize_model(model, mixed, run=run, prompts=PROMPTS).report
    sizes = {linear.name: linear.weights for linear in quantized.linears}
    total = sum(group.weights for group in plan.groups)
    dense = total - sum(sizes.values())
    stored = quantized.weight_bits * sum(sizes.values()) + DENSE_BITS * dense
    # Rotations are chosen again, for other weights: their bits may differ.
    assert mean - 1.2 < stored / total < mean + 0.1
    # It is the allocation of what single inputs do, measured here on the same forwards.
    options = {w: replace(recipe, block=replace(recipe.block, weight_bits=w)) for w in (2, 3, 4)}
    stats = collect_stats(run, model, plan.groups, PROMPTS)
    states = {w: quantize_model(model, made, stats=stats).states for w, made in options.items()}
    calls = capture_inputs(model, run, PROMPTS, BitBudget(mean).forwards)
    groups = {group.name: group for group in plan.groups}
    errors, costs = sensitivities(model, states, groups, calls), stored_costs(states, groups)
    for group in plan.groups:
        errors[group.name][DENSE_BITS], costs[group.name][DENSE_BITS] = 0.0, 16 * group.weights
    assert dealt == allocate_bits(errors, costs, int(mean * total))


def test_a_budget_of_activations_counts_inputs_by_their_weights():
    pipeline = tiny_pipeline()
    model: nn.Module = pipeline.transformer
    recipe = QuantRecipe.from_name("w4a4", modulation=None, **FAST)
    mixed = budgeted_recipe(model, recipe, BitBudget(None, 6.0), a_run(pipeline), PROMPTS)
    plan = mixed.resolve(model)
    used = sum(group.weights * group.linears[0].scheme.act_bits for group in plan.groups)
    assert 5.0 < used / plan.quantized_weights <= 6.0
    assert len({group.linears[0].scheme.act_bits for group in plan.groups}) > 1
    assert len(plan.groups) == len(recipe.resolve(model).groups)
    # Each width of activations with the scale rule that its scheme has by name.
    for linear in plan.linears:
        named = QuantRecipe.from_name(linear.scheme.name).block
        assert (linear.scheme.scale_mode, linear.scheme.scale_factor) == (
            named.scale_mode,
            named.scale_factor,
        )
    quantize_model(model, mixed, run=a_run(pipeline), prompts=PROMPTS)


def test_what_the_recipe_names_is_left_alone():
    pipeline = tiny_pipeline()
    model: nn.Module = pipeline.transformer
    named = QuantRecipe.from_name("w3a8").block
    recipe = QuantRecipe.from_name(
        "w4a8", overrides=(("*.0.ff", named), ("*.1.attn1", None)), **FAST
    )
    mixed = budgeted_recipe(model, recipe, BitBudget(2.9), a_run(pipeline), PROMPTS)
    schemes = {linear.name: linear.scheme for linear in mixed.resolve(model).linears}
    assert all(s == named for n, s in schemes.items() if ".0.ff." in n)
    assert not [n for n in schemes if ".1.attn1." in n]
    modulation = [x for x in mixed.resolve(model).linears if x.role == "modulation"]
    assert {x.scheme for x in modulation} == {recipe.modulation}


def test_a_killed_run_goes_on_with_the_same_widths(tmp_path: Path):
    pipeline = tiny_pipeline()
    model: nn.Module = pipeline.transformer
    recipe = QuantRecipe.from_name("w4a8", **FAST)
    run = a_run(pipeline)
    first = budgeted_recipe(model, recipe, BitBudget(3.2), run, PROMPTS, work_folder=tmp_path)

    def never(prompts: list[str]) -> None:
        raise AssertionError("nothing is left to measure")

    again = budgeted_recipe(model, recipe, BitBudget(3.2), never, PROMPTS, work_folder=tmp_path)
    assert again == first and first.overrides
    with pytest.raises(AssertionError, match="nothing is left"):
        budgeted_recipe(model, recipe, BitBudget(3.3), never, PROMPTS, work_folder=tmp_path)
    (tmp_path / "widths.json").write_text("{")  # damaged: measured again
    with pytest.raises(AssertionError, match="nothing is left"):
        budgeted_recipe(model, recipe, BitBudget(3.2), never, PROMPTS, work_folder=tmp_path)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({}, "neither"),
        ({"weight_bits": 1.9}, "weight_bits must be at least 2"),
        ({"weight_bits": float("nan")}, "weight_bits"),
        ({"act_bits": 3.0}, "act_bits must be at least 4"),
        ({"weight_bits": 3.0, "widths": (2, 5)}, "widths must be some of"),
        ({"weight_bits": 3.0, "forwards": 0}, "forwards"),
    ],
)
def test_a_budget_that_cannot_be_is_refused(fields: dict, named: str):
    with pytest.raises(ValueError, match=named):
        BitBudget(**fields)


def test_a_budget_below_the_narrowest_widths_says_what_they_take():
    pipeline = tiny_pipeline()
    recipe = QuantRecipe.from_name("w4a8", **FAST)
    with pytest.raises(ValueError, match=r"weight_bits must be at least 2\.\d+"):
        budgeted_recipe(pipeline.transformer, recipe, BitBudget(2.0), a_run(pipeline), PROMPTS)


def test_the_command_and_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pipeline = tiny_pipeline()
    source, out = tmp_path / "source", tmp_path / "out"
    save_pipeline(pipeline, {}, source)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    command = ["quantize", str(source), str(out), "--steps", "2", "--device", "cpu"]
    command += ["--modulation", "keep", "--pictures", "0", "--mean-bits", "3.4"]
    command += ["--mean-act-bits", "7", "--scheme", "w4a8"]
    assert main([*command, "--weights-only"]) == 1
    assert "--mean-bits" in capsys.readouterr().err
    assert main([*command, "--prompts", str(prompts)]) == 0
    report = load_report(out)
    assert len({linear.scheme.name for linear in report.linears}) > 2
    with pytest.raises(ValueError, match="prompts must be given with a budget"):
        quantize_pipeline(
            pipeline, QuantRecipe(), None, tmp_path / "other", budget=BitBudget(weight_bits=3.0)
        )
    assert not (tmp_path / "other").exists()


def test_dense_inputs_stay_and_others_of_the_block_do_not():
    model: nn.Module = tiny_pipeline().transformer
    recipe = QuantRecipe.from_name("w4a8", modulation=None)
    plan = recipe.resolve(model)
    first, second = plan.groups[0], plan.groups[1]
    mixed = mixed_recipe(recipe, plan, {}, {first.name: DENSE_BITS, second.name: 4})
    assert len(mixed.overrides) == len(first.linears)  # four bits is what the recipe says
    kept = {linear.name for linear in mixed.resolve(model).kept}
    assert {linear.name for linear in first.linears} <= kept
    assert second.name not in kept


def test_costs_count_all_but_biases():
    model: nn.Module = tiny_pipeline().transformer
    recipe = QuantRecipe.from_name("w4a8", modulation=None)
    plan = recipe.resolve(model)
    quantized = quantize_model(model, recipe)
    costs = stored_costs({4: quantized.states}, {group.name: group for group in plan.groups})
    bits = sum(cost[4] for cost in costs.values())
    assert bits / plan.quantized_weights == pytest.approx(quantized.report.weight_bits)
