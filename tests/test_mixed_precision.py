"""mixed_precision: the allocation is optimal, sensitivities are those of single linears."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from lrq_quant.demo.scenes import heldout_captions
from lrq_quant.mixed_precision import (
    allocate_bits,
    capture_inputs,
    code_costs,
    mixed_recipe,
    sensitivities,
)
from lrq_quant.pipeline import quantize_model
from lrq_quant.recipe import QuantRecipe

pytest.importorskip("diffusers")

from tiny_models import tiny_pipeline  # noqa: E402


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


def test_sensitivities_are_those_of_the_linear_alone():
    pipeline = tiny_pipeline()
    model: nn.Module = pipeline.transformer

    def run(prompts: list[str]) -> None:
        generators = [torch.Generator().manual_seed(len(text)) for text in prompts]
        pipeline(prompt=prompts, generator=generators, num_inference_steps=3, output_type="pt")

    states = {w: quantize_model(model, QuantRecipe.from_name(f"w{w}a8")).states for w in (2, 4)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls = capture_inputs(model, run, heldout_captions(2), limit=2)
    errors = sensitivities(model, states, calls)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    # Modulation has four bits in both.
    assert set(errors) == {n for n, s in states[2].items() if s.scheme.weight_bits == 2}
    for by_width in errors.values():
        assert 0 < by_width[4] < by_width[2] < 1
    costs = code_costs(states)
    budget = 3 * sum(model.get_submodule(name).weight.numel() for name in errors)
    budget += sum(costs[n][4] - 4 * model.get_submodule(n).weight.numel() for n in errors)
    widths = allocate_bits(errors, costs, budget)
    assert set(widths.values()) == {2, 4}
    mixed = quantize_model(model, mixed_recipe(QuantRecipe.from_name("w4a8"), widths)).states
    assert {name: mixed[name].scheme.weight_bits for name in widths} == widths
    worst = max(errors, key=lambda name: errors[name][2] / costs[name][2])
    assert widths[worst] == 4
