"""families: the published models are covered as stated, on the meta device (shapes.md)."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lrq_quant import QuantPlan, QuantRecipe
from lrq_quant.families import FAMILIES, MODULATION, family_of

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def flux() -> nn.Module:
    with torch.device("meta"):
        return diffusers.FluxTransformer2DModel(guidance_embeds=True)


@pytest.fixture(scope="module")
def pixart() -> nn.Module:
    with torch.device("meta"):
        return diffusers.PixArtTransformer2DModel(
            caption_channels=4096, use_additional_conditions=False
        )


def weights_by_role(plan: QuantPlan, modulation: bool) -> int:
    chosen = [g for g in plan.groups if (g.linears[0].role == MODULATION) == modulation]
    return sum(group.weights for group in chosen)


def test_flux_coverage(flux: nn.Module) -> None:
    plan = QuantRecipe().resolve(flux)
    assert len(plan.linears) + len(plan.kept) == 504
    assert plan.parameters == pytest.approx(11.901e9, rel=1e-4)
    assert weights_by_role(plan, modulation=False) == pytest.approx(8.607e9, rel=1e-4)
    # shapes.md counts norm_out.linear (0.019 B) with the modulation; it belongs to the last layer.
    assert weights_by_role(plan, modulation=True) == pytest.approx(3.228e9, rel=1e-3)
    assert 0.994 < plan.coverage < 0.995
    assert {kept.name for kept in plan.kept} >= {"x_embedder", "context_embedder", "proj_out"}
    assert all(kept.why != "not part of the family's recipe" for kept in plan.kept)


def test_flux_inputs_are_shared(flux: nn.Module) -> None:
    plan = QuantRecipe().resolve(flux)
    members = {g.name: [linear.name for linear in g.linears] for g in plan.groups}
    single = "single_transformer_blocks.37."
    assert members[f"{single}attn.to_q"] == [
        f"{single}{n}" for n in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    ]
    double = "transformer_blocks.0.attn."
    assert members[f"{double}to_q"] == [f"{double}{n}" for n in ("to_q", "to_k", "to_v")]
    added = ("add_q_proj", "add_k_proj", "add_v_proj")
    assert members[f"{double}add_q_proj"] == [f"{double}{n}" for n in added]
    assert len(plan.groups) == 19 * 10 + 38 * 3


def test_pixart_coverage(pixart: nn.Module) -> None:
    plan = QuantRecipe().resolve(pixart)
    assert len(plan.linears) == 28 * 10 + 1 and len(plan.linears) + len(plan.kept) == 286
    assert weights_by_role(plan, modulation=False) == pytest.approx(0.5946e9, rel=1e-3)
    assert 0.987 < plan.coverage < 0.988
    members = {g.name: [linear.name for linear in g.linears] for g in plan.groups}
    block = "transformer_blocks.27."
    assert members[f"{block}attn2.to_k"] == [f"{block}attn2.to_k", f"{block}attn2.to_v"]
    assert members[f"{block}attn2.to_q"] == [f"{block}attn2.to_q"]
    kept = {kept.name: kept.why for kept in plan.kept}
    assert kept["proj_out"] == "last projection"
    assert kept["caption_projection.linear_1"] == "caption embedding"


def test_every_linear_of_a_family_has_a_stated_fate(flux: nn.Module, pixart: nn.Module) -> None:
    for model in (flux, pixart):
        plan = QuantRecipe().resolve(model)
        names = [linear.name for linear in plan.linears] + [kept.name for kept in plan.kept]
        linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
        assert sorted(names) == sorted(linears)
        assert all(kept.why in dict(family_of(model).stays).values() for kept in plan.kept)


def test_unknown_model_names_the_supported_ones() -> None:
    with pytest.raises(ValueError, match="got Linear") as error:
        family_of(nn.Linear(2, 2))
    assert all(name in str(error.value) for name in FAMILIES)


def test_a_subclass_is_of_the_family() -> None:
    class PixArtTransformer2DModel(nn.Module):
        pass

    class Tuned(PixArtTransformer2DModel):
        pass

    assert family_of(Tuned()).model_class == "PixArtTransformer2DModel"
