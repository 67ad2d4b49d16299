"""Every family end to end: a tiny random instance of its real class, quantized, saved, loaded."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tiny_families import TINY_FAMILIES, Tiny, forward, quantized_family
from tiny_models import BF16, all_tensors, assert_same_tensors, linears
from torch import nn

from lrq_kernels import load_quantized
from lrq_kernels.testing import relative_error
from lrq_quant import LRQConfig, QuantRecipe, check, collect_stats, profiling
from lrq_quant.families import family_of
from lrq_quant.kernel_families import GEMM
from lrq_quant.pipeline_io import save_transformer
from lrq_quant.profiled_model import ProfileOptions, profile_model

RECIPE = QuantRecipe.from_name("w4a8")
# W4A8 of random weights at 32 to 128 channels; a linear left out or fed another input gives 1.
MAX_ERROR = 0.2


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_quantize_save_load_forward(family: str, tmp_path: Path) -> None:
    (model, quantized), inputs = quantized_family(family), TINY_FAMILIES[family].inputs()
    dense = forward(model, inputs)
    path = quantized.save(tmp_path)
    first = forward(load_quantized(copy.deepcopy(model), path), inputs)
    second = forward(load_quantized(copy.deepcopy(model), path), inputs)
    assert torch.equal(first, second)
    assert 0 < relative_error(first, dense) < MAX_ERROR


@pytest.mark.parametrize("tiny", TINY_FAMILIES.values(), ids=list(TINY_FAMILIES))
def test_members_of_a_group_read_one_tensor(tiny: Tiny) -> None:
    """collect_stats refuses a group whose members are given different tensors."""
    model, inputs = tiny.make(), tiny.inputs()
    groups = RECIPE.resolve(model).groups
    stats = collect_stats(lambda _: forward(model, inputs), model, groups, ["a prompt"])
    assert all(stats[group.name].count > 0 for group in groups)


@pytest.mark.parametrize("tiny", TINY_FAMILIES.values(), ids=list(TINY_FAMILIES))
def test_every_linear_is_quantized_or_stays_for_a_stated_reason(tiny: Tiny) -> None:
    model = tiny.make()
    plan = RECIPE.resolve(model)
    assert (len(plan.linears), len(plan.groups)) == (tiny.linears, tiny.groups)
    names = [linear.name for linear in plan.linears] + [kept.name for kept in plan.kept]
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(names) == sorted(linears)
    reasons = dict(family_of(model).stays).values()
    assert all(kept.why in reasons or "in_features" in kept.why for kept in plan.kept)


@pytest.mark.parametrize("tiny", TINY_FAMILIES.values(), ids=list(TINY_FAMILIES))
def test_through_diffusers(tiny: Tiny, tmp_path: Path) -> None:
    """Quantized while it loads, saved in shards, loaded: the same bits, nothing left on meta."""
    dense, inputs = tiny.make(), tiny.inputs()
    dense.save_pretrained(tmp_path / "dense")
    config = LRQConfig("w4a8")
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=config)
    assert len(linears(model)) == sum(
        kept.name not in str(model._keep_in_fp32_modules) for kept in config.plan(dense).linears
    )
    assert not [name for name, tensor in all_tensors(model).items() if tensor.is_meta]
    first = forward(model, inputs)
    assert 0 < relative_error(first, forward(dense, inputs)) < MAX_ERROR
    model.save_pretrained(tmp_path / "q", max_shard_size="100KB")
    again = type(dense).from_pretrained(tmp_path / "q")
    assert_same_tensors(again, model)
    assert torch.equal(forward(again, inputs), first)
    assert not check(again).problems


# Z-Image Omni is the class of another.
@pytest.mark.parametrize("family", sorted({*TINY_FAMILIES} - {"z-image-omni"}))
def test_profile_of_a_folder(family: str, tmp_path: Path, monkeypatch) -> None:
    """Dense in bf16 and quantized, with the inputs that its pipeline passes. Forwards that are
    not recorded are left out, to be quick."""
    monkeypatch.setattr(profiling, "_warm_up", lambda forwards: None)
    monkeypatch.setattr(profiling, "_median_ms", lambda forwards, steps: 0.0)
    model, quantized = quantized_family(family)
    model.to(BF16).save_pretrained(tmp_path / "dense")
    save_transformer(model, quantized, tmp_path / "quantized")
    size = 64 if family == "pixart" else 32  # of one token or more
    ops = {"dense": ("bf16", "aten::linear"), "quantized": ("w4a8", "lrq::gemm")}
    for folder, (scheme, op) in ops.items():
        options = ProfileOptions(str(tmp_path / folder), size=size, steps=1, device="cpu")
        profile = profile_model(options)
        assert profile.facts["scheme"] == scheme and profile.wall_ms > 0
        (gemm,) = (row for row in profile.families if row.name == GEMM)
        assert gemm.launches > 0 and op in {kernel.name for kernel in profile.kernels}
