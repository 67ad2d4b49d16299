"""auto_family: what one forward shows of a model, compared with what was written by hand."""

from __future__ import annotations

import copy
import logging
from pathlib import Path

import diffusers
import pytest
import torch
from tiny_families import TINY_FAMILIES, Tiny, forward
from tiny_models import BF16, linears, load, run, tiny_pipeline, tiny_pixart
from torch import Tensor, nn

from lrq_kernels import load_quantized
from lrq_kernels.testing import relative_error
from lrq_quant import (
    Family,
    LRQConfig,
    QuantPlan,
    QuantRecipe,
    auto_family,
    check,
    quantize_model,
    register_family,
)
from lrq_quant.auto_family import family_by_names, find_blocks
from lrq_quant.families import ATTENTION, FAMILIES, FEED_FORWARD, MODULATION, SharedInput
from lrq_quant.model_shapes import MODEL_CONFIGS
from lrq_quant.pipeline_io import quantize_pipeline

RECIPE = QuantRecipe.from_name("w4a8")
every_family = pytest.mark.parametrize("tiny", TINY_FAMILIES.values(), ids=list(TINY_FAMILIES))


def described(plan: QuantPlan) -> set[tuple[frozenset[str], str]]:
    return {(frozenset(m.name for m in g.linears), g.linears[0].role) for g in plan.groups}


def fate(plan: QuantPlan) -> dict[str, str]:
    return {kept.name: kept.why for kept in plan.kept}


@every_family
def test_finds_what_is_written_by_hand(tiny: Tiny):
    """The same groups with the same roles, nothing more and nothing less."""
    model, inputs = tiny.make(), tiny.inputs()
    family = auto_family(model, lambda: forward(model, inputs))
    assert described(RECIPE.resolve(model, family)) == described(RECIPE.resolve(model))
    # One rule for all blocks, in which case a model of 60 blocks has a recipe of one page.
    assert len(family.inputs) < 25 and all("blocks.0" not in rule.parent for rule in family.inputs)


def test_a_published_model_on_the_meta_device():
    name, config = MODEL_CONFIGS["flux-dev"]
    options = {"device": "meta"}
    with torch.device("meta"):
        model = getattr(diffusers, name)(**config)
    inputs = {
        "hidden_states": torch.empty(1, 9, 64, **options),
        "encoder_hidden_states": torch.empty(1, 5, 4096, **options),
        "pooled_projections": torch.empty(1, 768, **options),
        "timestep": torch.empty(1, **options),
        "guidance": torch.empty(1, **options),
        "img_ids": torch.empty(9, 3, **options),
        "txt_ids": torch.empty(5, 3, **options),
    }
    family = auto_family(model, lambda: model(**inputs))
    assert described(RECIPE.resolve(model, family)) == described(RECIPE.resolve(model))


@pytest.mark.parametrize("failing", [False, True])
def test_the_model_is_left_as_it_was(failing: bool):
    tiny = TINY_FAMILIES["flux"]
    model, inputs = tiny.make(), tiny.inputs()
    expected = forward(model, inputs)

    def run_once() -> None:
        if failing:
            raise RuntimeError("out of pictures")
        forward(model, inputs)

    if failing:
        with pytest.raises(RuntimeError, match="out of pictures"):
            auto_family(model, run_once)
    else:
        auto_family(model, run_once)
    hooks = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert not hooks and torch.equal(forward(model, inputs), expected)


def test_the_run_ends_with_the_first_forward():
    tiny = TINY_FAMILIES["pixart"]
    model, inputs = tiny.make(), tiny.inputs()
    after: list[str] = []

    def two_steps() -> None:
        forward(model, inputs)
        after.append("the first forward")

    auto_family(model, two_steps)
    assert not after


def test_a_run_that_misses_the_model_is_an_error():
    with pytest.raises(ValueError, match=r"run\(\) never called the PixArtTransformer2DModel"):
        auto_family(tiny_pixart(), lambda: None)
    with pytest.raises(ValueError, match="Linear has no list of blocks"):
        auto_family(nn.Linear(2, 2), lambda: None)


# ---- what the forward does not reach ------------------------------------------------------------


def test_linears_that_were_not_reached_stay():
    model, family = watched("shared", "shared")
    for block in model.blocks:
        block.spare = nn.Linear(64, 64)
    plan = RECIPE.resolve(model, family)
    assert fate(plan)["blocks.1.spare"] == "not reached by the forward that was watched"
    assert fate(plan)["last"] == "outside the blocks"
    assert len(plan.linears) == 2 * 5


def test_experts_without_tokens_are_as_the_others():
    """One token reaches one expert of two; the other has the same structure."""
    tiny = TINY_FAMILIES["hidream"]
    model, inputs = tiny.make(), tiny.inputs()
    moe = model.double_stream_blocks[0].block.ff_i
    assert len(moe.experts) == 2
    with torch.no_grad():  # every token chooses the first expert
        moe.gate.forward = lambda x: (
            torch.zeros(x.shape[0] * x.shape[1], 1, dtype=torch.long),
            torch.ones(x.shape[0] * x.shape[1], 1),
            None,
        )
    family = auto_family(model, lambda: forward(model, inputs))
    assert described(RECIPE.resolve(model, family)) == described(RECIPE.resolve(model))


# ---- what a forward can do ----------------------------------------------------------------------


class Block(nn.Module):
    """x + ff(attention(modulated x)), in the ways that the tests below need."""

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.attn = nn.ModuleDict({n: nn.Linear(width, width) for n in ("to_q", "to_k", "out")})
        self.shift = nn.Linear(width, 2 * width)
        self.up = nn.Linear(width, width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        scale, shift = self.shift(torch.relu(temb)).unsqueeze(-2).chunk(2, dim=-1)
        h = x * scale + shift
        q = self.attn["to_q"](h)
        if self.kind == "in place":
            h.add_(1)
        elif self.kind == "copied":
            h = h.clone()
        k = self.attn["to_k"](h)
        mixed = (q @ k.transpose(-1, -2)).softmax(-1) @ h
        if self.kind == "written":
            both = torch.empty_like(mixed)
            both[...] = mixed
            mixed = both
        return x + self.up(self.attn["out"](mixed))


class Model(nn.Module):
    def __init__(self, *kinds: str, width: int = 64) -> None:
        super().__init__()
        self.embed, self.time = nn.Linear(16, width), nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width, kind) for kind in kinds)
        self.last = nn.Linear(width, 16)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, temb = self.embed(x), self.time(t)
        for block in self.blocks:
            x = block(x, temb)
        return self.last(x)


def groups_of(model: nn.Module, family: Family) -> set[tuple[str, ...]]:
    plan = RECIPE.resolve(model, family)
    return {tuple(linear.name for linear in group.linears) for group in plan.groups}


def watched(*kinds: str, packed: bool = False) -> tuple[Model, Family]:
    model = Model(*kinds)
    x = torch.randn(7, 16) if packed else torch.randn(2, 7, 16)
    t = torch.randn(1, 64) if packed else torch.randn(2, 64)
    return model, auto_family(model, lambda: model(x, t))


def test_a_tensor_changed_in_place_is_another():
    model, family = watched("shared", "shared")
    assert ("blocks.0.attn.to_q", "blocks.0.attn.to_k") in groups_of(model, family)
    for kind in ("in place", "copied"):
        model, family = watched(kind, kind)
        assert ("blocks.0.attn.to_q",) in groups_of(model, family)


def test_tokens_written_into_a_new_tensor_are_tokens():
    model, family = watched("written", "written")
    assert SharedInput("blocks.*.attn", ("out",), ATTENTION) in family.inputs
    assert SharedInput("blocks.*", ("shift",), MODULATION) in family.inputs
    assert SharedInput("blocks.*", ("up",), FEED_FORWARD) in family.inputs


def test_blocks_of_different_structure_get_their_own_rules():
    model, family = watched("shared", "copied")
    found = groups_of(model, family)
    assert ("blocks.0.attn.to_q", "blocks.0.attn.to_k") in found
    assert {("blocks.1.attn.to_q",), ("blocks.1.attn.to_k",)} <= found
    assert len(found) == 4 + 5


def test_tokens_without_a_batch_axis_are_told_by_what_the_block_returns():
    """[T, C] has as many axes as a conditioning vector."""
    model, family = watched("shared", "shared", packed=True)
    roles = {linear.name: linear.role for linear in RECIPE.resolve(model, family).linears}
    assert roles["blocks.1.up"] == FEED_FORWARD and roles["blocks.1.attn.out"] == ATTENTION
    assert roles["blocks.1.shift"] == MODULATION


# ---- a class that nobody described --------------------------------------------------------------


def unknown_model() -> nn.Module:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_mmdit_layers=1,
        num_single_dit_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        caption_projection_dim=128,
        joint_attention_dim=96,
        out_channels=4,
        pos_embed_max_size=64,
    ).eval()


def unknown_inputs() -> dict:
    return {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 96),
        "timestep": torch.tensor([0.5, 0.5]),
    }


def test_an_unknown_model_is_calibrated_saved_and_loaded(tmp_path: Path):
    model, inputs = unknown_model(), unknown_inputs()
    dense = forward(model, inputs)
    calls: list[list[str]] = []

    def draw(batch: list[str]) -> None:
        calls.append(batch)
        forward(model, inputs)

    result = quantize_model(model, RECIPE, run=draw, prompts=["a", "b"])
    # Watched, then calibrated: statistics, then Gram matrices in one pass.
    assert calls == [["a"], *[["a"], ["b"]] * 2]
    assert result.report.coverage > 0.93
    path = result.save(tmp_path)
    first = forward(load_quantized(copy.deepcopy(model), path), inputs)
    assert torch.equal(forward(load_quantized(copy.deepcopy(model), path), inputs), first)
    assert 0 < relative_error(first, dense) < 0.2


def test_an_unknown_model_without_a_run_is_refused():
    with pytest.raises(ValueError, match=r"register_family\(auto_family\(model, run\)\)"):
        quantize_model(unknown_model(), RECIPE)


def test_an_unknown_model_is_quantized_while_it_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """Nothing runs while a checkpoint loads: blocks by their structure, roles by their names."""
    dense, inputs = unknown_model(), unknown_inputs()
    dense.save_pretrained(tmp_path / "dense")
    config = LRQConfig("w4a8")
    with caplog.at_level(logging.WARNING):
        model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert "is of no known family" in caplog.text
    assert 0 < relative_error(forward(model, inputs), forward(dense, inputs)) < 0.2
    bits = {name.split(".")[2]: m.scheme.act_bits for name, m in linears(model).items()}
    assert bits["norm1"] == 16 and bits["attn"] == bits["ff"] == 8
    assert "dense linears: the class is of no known family" in str(check(model))
    attention = model.single_transformer_blocks[0].attn
    assert attention.to_q.input_quantizer.shared is not attention.to_k.input_quantizer.shared
    model.save_pretrained(tmp_path / "q")
    again = type(dense).from_pretrained(tmp_path / "q")
    assert torch.equal(forward(again, inputs), forward(model, inputs))
    # Once watched it is as good as known.
    monkeypatch.setattr("lrq_quant.families.FAMILIES", dict(FAMILIES))
    register_family(auto_family(dense, lambda: forward(dense, inputs)))
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=config)
    attention = model.single_transformer_blocks[0].attn
    assert attention.to_q.input_quantizer.shared is attention.to_k.input_quantizer.shared
    assert not check(model).problems


def test_an_unknown_pipeline_needs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The states are those of the family written by hand, bit for bit."""
    prompts, options = ["a red circle"], {"num_inference_steps": 1}
    pipeline = tiny_pipeline()
    for name in ("known", "watched"):
        if name == "watched":
            monkeypatch.setattr("lrq_quant.families.FAMILIES", {})
        quantize_pipeline(pipeline, RECIPE, prompts, tmp_path / name, call_options=options)
    known, automatic = (load("pixart", tmp_path / n / "transformer") for n in ("known", "watched"))
    assert linears(known).keys() == linears(automatic).keys()
    assert torch.equal(run(known, "pixart", BF16), run(automatic, "pixart", BF16))


# ---- by names -----------------------------------------------------------------------------------


@every_family
def test_names_never_give_tokens_to_weight_only_or_the_last_layer_to_the_blocks(tiny: Tiny):
    """What is found by names is right where it is found; it may be less than there is."""
    model = tiny.make()
    by_hand = {linear.name: linear.role for linear in RECIPE.resolve(model).linears}
    plan = RECIPE.resolve(model, family_by_names(model))
    assert all(len(group.linears) == 1 for group in plan.groups)
    # q, k and v may be found as another role than proj_mlp, which reads the same.
    wrong = {
        linear.name
        for linear in plan.linears
        if (linear.role == MODULATION) != (by_hand.get(linear.name) == MODULATION)
        or linear.name not in by_hand
    }
    assert not wrong
    assert len(plan.linears) > 0.7 * len(by_hand)


def test_blocks_are_the_outermost_lists():
    blocks = find_blocks(TINY_FAMILIES["hidream"].make())
    assert "double_stream_blocks.0" in blocks and not any("experts" in name for name in blocks)
