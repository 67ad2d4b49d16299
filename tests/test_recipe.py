"""recipe: patterns and overrides decide what is quantized, and the plan says so."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from lrq_kernels import QuantScheme
from lrq_quant import CalibrationOptions, QuantPlan, QuantRecipe, SearchOptions, quantize_model
from lrq_quant.loading import DenseLoader


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn1 = Attention(width)


class PixArtTransformer2DModel(nn.Module):
    """A name of the registry, without diffusers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block(width), Block(width)])
        self.proj_out = nn.Linear(width, 8)


def groups(plan: QuantPlan) -> list[list[str]]:
    return [[linear.name for linear in group.linears] for group in plan.groups]


@pytest.fixture
def model() -> nn.Module:
    with torch.device("meta"):
        return PixArtTransformer2DModel()


def test_groups_come_in_the_order_of_the_model(model: nn.Module) -> None:
    expected = []
    for i in range(2):
        attention = f"transformer_blocks.{i}.attn1."
        expected += [[f"{attention}{n}" for n in ("to_q", "to_k", "to_v")]]
        expected += [[f"{attention}to_out.0"]]
    assert groups(QuantRecipe().resolve(model)) == expected


def test_include_and_exclude(model: nn.Module) -> None:
    plan = QuantRecipe(include=("*.0.*",), exclude=("*.to_v",)).resolve(model)
    first = "transformer_blocks.0.attn1."
    assert groups(plan) == [[f"{first}to_q", f"{first}to_k"], [f"{first}to_out.0"]]
    why = {kept.name: kept.why for kept in plan.kept}
    assert why[f"{first}to_v"] == "excluded by the recipe"
    assert why["proj_out"] == "last projection"


def test_the_first_override_that_matches_wins(model: nn.Module) -> None:
    three = QuantScheme(3, 8)
    recipe = QuantRecipe(overrides=(("*.1.attn1.to_k", three), ("*.1.*", None)))
    plan = recipe.resolve(model)
    schemes = {linear.name: linear.scheme.name for linear in plan.linears}
    assert schemes["transformer_blocks.1.attn1.to_k"] == "w3a8"
    assert "transformer_blocks.1.attn1.to_q" not in schemes
    assert "kept by the override '*.1.*'" in {kept.why for kept in plan.kept}


def test_members_with_another_activation_width_form_their_own_group(model: nn.Module) -> None:
    recipe = QuantRecipe(overrides=(("*.to_v", QuantScheme(4, 4)), ("*.to_k", QuantScheme(3, 8))))
    first = groups(recipe.resolve(model))[:3]
    a = "transformer_blocks.0.attn1."
    # Weight widths may differ under one input, activation widths may not.
    assert first == [[f"{a}to_q", f"{a}to_k"], [f"{a}to_v"], [f"{a}to_out.0"]]


def test_widths_that_do_not_pack_stay() -> None:
    with torch.device("meta"):
        plan = QuantRecipe().resolve(PixArtTransformer2DModel(width=72))
    assert not plan.groups and plan.coverage == 0
    assert any(kept.why == "in_features 72 is not a multiple of 32" for kept in plan.kept)


def test_a_module_stands_for_the_linears_in_it(model: nn.Module) -> None:
    three = QuantScheme(3, 8)
    by_module = QuantRecipe(
        include=("transformer_blocks",),
        exclude=("*.to_v", "*.1.attn1.to_out"),
        overrides=(("transformer_blocks.0", three),),
    ).resolve(model)
    by_linear = QuantRecipe(
        include=("transformer_blocks.*",),
        exclude=("*.to_v", "*.1.attn1.to_out.0"),
        overrides=(("transformer_blocks.0.*", three),),
    ).resolve(model)
    assert groups(by_module) == groups(by_linear) and len(groups(by_module)) == 3
    schemes = {linear.name: linear.scheme for linear in by_module.linears}
    assert schemes == {linear.name: linear.scheme for linear in by_linear.linears}
    assert {name.split(".")[1] for name, scheme in schemes.items() if scheme == three} == {"0"}
    assert len(schemes) == 5


def test_schemes_of_one_input_agree_where_nothing_is_calibrated() -> None:
    model = PixArtTransformer2DModel(256)
    for field, value in (
        ("rotation", "none"),
        ("block_size", 256),
        ("scale_mode", "rms"),
        ("scale_factor", 0.9),
    ):
        other = QuantScheme(3, 8, **{field: value})
        recipe = QuantRecipe(overrides=(("*.1.attn1.to_k", other),))
        names = "transformer_blocks.1.attn1.to_q and .* of transformer_blocks.1.attn1.to_k"
        with pytest.raises(ValueError, match=f"{field} of linears that read one input .*{names}"):
            quantize_model(model, recipe)
        with pytest.raises(ValueError, match=f"{field} of linears that read one input"):
            DenseLoader(recipe.resolve(model), recipe)
        alike = QuantRecipe(overrides=(("*.1.attn1.*", other),))
        state = quantize_model(model, alike).states["transformer_blocks.1.attn1.to_k"]
        assert state.scheme == other


def test_a_pattern_that_matches_nothing_is_an_error(model: nn.Module) -> None:
    for recipe in (
        QuantRecipe(exclude=("*.to_x",)),
        QuantRecipe(overrides=(("*.to_x", None),)),
    ):
        with pytest.raises(ValueError, match=r"'\*.to_x' matches no linear"):
            recipe.resolve(model)


def test_summary_states_coverage_and_what_stays(model: nn.Module) -> None:
    plan = QuantRecipe.from_name("w3a8").resolve(model)
    text = plan.summary()
    assert "8 of 9 linears in 4 input groups" in text
    assert f"{plan.coverage:.2%}" in text
    assert "w3a8" in text and "transformer_blocks.*.attn1.to_q" in text
    assert "last projection" in text
    assert plan.coverage == pytest.approx(8 * 64 * 64 / (8 * 64 * 64 + 8 * 64))


def test_recipe_names_and_json() -> None:
    recipe = QuantRecipe.from_name("w3a4", mode="paper", modulation=None)
    assert (recipe.block.weight_bits, recipe.block.act_bits, recipe.mode) == (3, 4, "paper")
    assert recipe.modulation is None
    assert json.loads(json.dumps(recipe.to_dict()))["block"]["weight_bits"] == 3
    assert recipe == QuantRecipe.from_name("W3A4", mode="paper", modulation=None)


def test_bad_recipes_are_named() -> None:
    with pytest.raises(ValueError, match="mode must be one of"):
        QuantRecipe(mode="fast")
    with pytest.raises(TypeError, match="exclude must be a tuple"):
        QuantRecipe(exclude="*.to_q")
    with pytest.raises(ValueError, match="w4a8"):
        QuantRecipe.from_name("int4")
    with pytest.raises(ValueError, match="rotations must be some of"):
        SearchOptions(rotations=("fourier",))
    with pytest.raises(ValueError, match="must be positive"):
        CalibrationOptions(batch_size=0)
