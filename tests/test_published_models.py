"""The recipes on every published configuration of dit_shapes, on the meta device: what share of the
model they cover, which linears share an input, and what happens to widths that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import diffusers
import pytest
import torch
from tiny_families import build
from torch import nn

from lrq_quant import LRQConfig, QuantPlan, QuantRecipe
from lrq_quant.auto_family import find_blocks
from lrq_quant.families import FAMILIES, MODULATION
from lrq_quant.model_shapes import MODEL_CONFIGS
from lrq_quant.rotation_search import data_free_rotation


class Published(NamedTuple):
    """parameters in units of 1e9, as published or as in shapes.md; groups: quantized inputs,
    blocks times inputs of a block; modulation: linears outside of blocks that make shift and scale
    (those within are told by their names); coverage: least share of the weights of all linears."""

    parameters: float
    groups: int
    modulation: tuple[str, ...] = ()
    coverage: float = 0.98


# q+k+v, out, the same for the text, two feed-forwards of two, two modulations.
DOUBLE = 10
FLUX2_MODULATION = (
    "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.linear",
    "single_stream_modulation.linear",
)
EXPECTED = {
    "flux-dev": Published(11.901, 19 * DOUBLE + 38 * 3, coverage=0.994),
    "flux-schnell": Published(11.891, 19 * DOUBLE + 38 * 3, coverage=0.994),
    "flux-fill": Published(11.902, 19 * DOUBLE + 38 * 3, coverage=0.994),
    "flux2-dev": Published(32.2, 8 * (DOUBLE - 2) + 48 * 2 + 3, FLUX2_MODULATION),
    "flux2-klein-4b": Published(3.88, 5 * (DOUBLE - 2) + 20 * 2 + 3, FLUX2_MODULATION),
    "flux2-klein-9b": Published(9.08, 8 * (DOUBLE - 2) + 24 * 2 + 3, FLUX2_MODULATION),
    "chroma": Published(8.9, 19 * (DOUBLE - 2) + 38 * 2 + 5 * 2),
    "pixart-sigma": Published(0.6109, 28 * 7 + 1, ("adaln_single.linear",)),
    "pixart-alpha": Published(0.6113, 28 * 7 + 1, ("adaln_single.linear",)),
    "sd3-medium": Published(2.03, 24 * DOUBLE - 3),
    # The last block has no text output; 13 have a second attention.
    "sd3.5-medium": Published(2.243, 24 * DOUBLE - 3 + 13 * 2),
    "sd3.5-large": Published(8.06, 38 * DOUBLE - 3),
    "wan2.1-t2v-1.3b": Published(1.419, 30 * 7 + 1, ("condition_embedder.time_proj",)),
    "wan2.1-i2v-14b": Published(16.4, 40 * 8 + 1, ("condition_embedder.time_proj",)),
    "wan2.2-t2v-a14b": Published(14.29, 40 * 7 + 1, ("condition_embedder.time_proj",)),
    "wan2.2-ti2v-5b": Published(5.0, 30 * 7 + 1, ("condition_embedder.time_proj",)),
    # Parameters of this one, of CogVideoX 1.5 and of the later Sanas are the class's own count,
    # which their cards round to 14, 5, 4.8 and 1.6.
    "wan2.1-flf2v-14b": Published(16.4, 40 * 8 + 1, ("condition_embedder.time_proj",)),
    # Twenty more channels of the patch embedding than T2V.
    "wan2.2-i2v-a14b": Published(14.29, 40 * 7 + 1, ("condition_embedder.time_proj",)),
    # The class's own counts. Of the blocks beside, each has an input more, and the first one more.
    "wan2.1-vace-1.3b": Published(
        2.154, 30 * 7 + 15 * 8 + 1 + 1, ("condition_embedder.time_proj",)
    ),
    "wan2.1-vace-14b": Published(17.34, 40 * 7 + 8 * 8 + 1 + 1, ("condition_embedder.time_proj",)),
    # Every fifth block attends to a face.
    "wan2.2-animate-14b": Published(17.27, 40 * 8 + 8 * 3 + 1, ("condition_embedder.time_proj",)),
    # The refiner has two blocks of five inputs.
    "hunyuan-video": Published(12.82, 20 * DOUBLE + 40 * 4 + 2 * 5),
    "hunyuan-video-i2v": Published(12.82, 20 * DOUBLE + 40 * 4 + 2 * 5),
    "cogvideox-2b": Published(1.69, 30 * 6),
    "cogvideox-5b": Published(5.57, 42 * 6),
    "cogvideox1.5-5b": Published(5.57, 42 * 6),
    "cogvideox1.5-5b-i2v": Published(5.57, 42 * 6),
    "ltx-video-2b": Published(1.92, 28 * 7 + 1, ("time_embed.linear",)),
    "ltx-video-13b": Published(13.04, 48 * 7 + 1, ("time_embed.linear",)),
    "sana-1.6b": Published(1.604, 20 * 5 + 1, ("time_embed.linear",)),
    "sana-0.6b": Published(0.592, 28 * 5 + 1, ("time_embed.linear",)),
    "sana1.5-4.8b": Published(4.72, 60 * 5 + 1, ("time_embed.linear",)),
    # Another embedder, of guidance, stays.
    "sana-sprint-1.6b": Published(1.61, 20 * 5 + 1, ("time_embed.linear",), coverage=0.97),
    "qwen-image": Published(20.43, 60 * DOUBLE, coverage=0.998),
    # Two refiner blocks are like the others, two have no modulation.
    "z-image": Published(6.155, 32 * 5 + 2 * 4, coverage=0.998),
    "lumina-image-2.0": Published(2.61, 28 * 5 + 2 * 4),
    # 4 experts and a shared one of two inputs each; 32 caption projections stay.
    "hidream-i1": Published(17.1, 16 * (4 + 10 + 2 + 1) + 32 * (2 + 10 + 1), coverage=0.968),
}
every_model = pytest.mark.parametrize("name", MODEL_CONFIGS)


@pytest.fixture(scope="module")
def model_of() -> Callable[[str], nn.Module]:
    made: dict[str, nn.Module] = {}

    def make(name: str) -> nn.Module:
        if name not in made:
            class_name, config = MODEL_CONFIGS[name]
            with torch.device("meta"):
                made[name] = build(class_name, **config)
        return made[name]

    return make


def weights(model: nn.Module, names: set[str]) -> int:
    return sum(model.get_submodule(name).weight.numel() for name in names)


def named(plan: QuantPlan) -> set[str]:
    return {linear.name for linear in plan.linears}


def test_every_configuration_has_its_numbers():
    assert EXPECTED.keys() == MODEL_CONFIGS.keys()
    assert {class_name for class_name, _ in MODEL_CONFIGS.values()} == FAMILIES.keys()


@every_model
def test_coverage(name: str, model_of: Callable):
    model, expected = model_of(name), EXPECTED[name]
    plan = QuantRecipe().resolve(model)
    assert plan.parameters / 1e9 == pytest.approx(expected.parameters, rel=3e-3)
    assert len(plan.groups) == expected.groups
    assert plan.coverage >= expected.coverage
    assert not [kept for kept in plan.kept if kept.why == "not part of the family's recipe"]


@every_model
def test_all_of_every_block_and_all_modulation(name: str, model_of: Callable):
    """Blocks as their structure shows them, which the recipe does not look at."""
    model, expected = model_of(name), EXPECTED[name]
    plan = QuantRecipe().resolve(model)
    linears = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    # What stands in a list and is no block: the last layer, an embedder for each patch size.
    blocks = tuple(f"{b}." for b in find_blocks(model) if not b.startswith("all_final_layer"))
    inside = {n for n in linears if n.startswith(blocks)}
    outside = set(expected.modulation)
    assert named(plan) == inside | outside
    assert weights(model, inside) > 0.9 * weights(model, named(plan))
    # Modulation is weight-only: by name within blocks, of Chroma the network that makes it.
    found = {linear.name for linear in plan.linears if linear.role == MODULATION}
    kinds = (".linear", "adaLN_modulation.0", "adaLN_modulation.1", "_mod.1")
    by_name = {n for n in inside if n.endswith(kinds) or n.startswith("distilled_guidance")}
    assert found == by_name | outside
    assert all(
        (linear.scheme.act_bits == 16) == (linear.role == MODULATION) for linear in plan.linears
    )


@every_model
def test_attention_inputs_are_shared(name: str, model_of: Callable):
    """Queries, keys and values of self-attention read one input, of cross-attention two."""
    model = model_of(name)
    groups = [{m.name for m in group.linears} for group in QuantRecipe().resolve(model).groups]
    queries = [n for n in set().union(*groups) if n.endswith(".to_q")]
    assert queries or "flux2" in name
    for query in queries:
        (group,) = [g for g in groups if query in g]
        attention = query.removesuffix(".to_q")
        cross = ("attn2" in attention and "sd3" not in name) or "face_adapter" in attention
        members = {n for n in group if n.startswith(attention + ".")}
        whole = {f"{attention}.{n}" for n in ("to_q", "to_k", "to_v")}
        assert members == ({query} if cross else whole)


# ---- widths -------------------------------------------------------------------------------------


@every_model
def test_widths_without_a_block_of_128_say_so(name: str, model_of: Callable):
    """The larger Sanas are 2240 = 35 x 64 wide; every other published width is a multiple of
    128."""
    plan = QuantRecipe().resolve(model_of(name))
    odd = {linear.in_features for linear in plan.linears if linear.in_features % 128}
    assert odd == ({2240} if name.startswith("sana") and name != "sana-0.6b" else set())
    assert ("rotated in blocks of 64" in plan.summary()) == bool(odd)
    for width in odd:
        choice = data_free_rotation("any", width, QuantRecipe().block)
        assert choice.rotation.block_size == 64


def test_a_width_that_does_not_pack_stays_and_is_counted():
    with torch.device("meta"):
        model = diffusers.PixArtTransformer2DModel(
            num_attention_heads=3,
            attention_head_dim=24,
            num_layers=2,
            cross_attention_dim=72,
            caption_channels=64,
        )
    plan = LRQConfig("w4a8").plan(model)
    assert not [linear for linear in plan.linears if linear.in_features % 32]
    why = "in_features 72 is not a multiple of 32"
    stays = [kept for kept in plan.kept if kept.why == why]
    assert len(stays) == 2 * 9 + 1 and why in plan.summary()
    assert plan.coverage < 0.4  # of which nothing is hidden
