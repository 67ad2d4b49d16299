"""Random inputs of every family: what its class takes, at any size and batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import TINY_FAMILIES
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lrq_quant.__main__ import main
from lrq_quant.families import FAMILIES
from lrq_quant.model_inputs import classes_with_inputs, model_inputs

# That one reads pictures beside the noise, and is the class of another.
NAMES = sorted({*TINY_FAMILIES} - {"z-image-omni"})
LATENTS = ("hidden_states", "x")


def sizes(inputs: dict[str, Any]) -> dict[str, int]:
    """Values of all tensors of an argument."""
    return {
        name: sum(leaf.numel() for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
        for name, value in inputs.items()
    }


def test_every_family_has_inputs():
    assert {*FAMILIES} == {*classes_with_inputs()}


@pytest.mark.parametrize("name", NAMES)
def test_a_forward_takes_them(name: str):
    model = TINY_FAMILIES[name].make()
    options = {"device": "cpu", "dtype": torch.float32}
    inputs = model_inputs(type(model).__name__, model.config, size=64, batch=2, **options)
    with torch.no_grad():
        output = model(**inputs, return_dict=False)[0]
    latents = next(inputs[name] for name in LATENTS if name in inputs)
    # Of as many samples and places as there is noise, whatever the channels.
    assert len(output) == len(latents) == 2
    assert (
        sum(map(torch.numel, output))
        % (sum(map(torch.numel, latents)) // model.config["in_channels"])
        == 0
    )
    assert all(sample.isfinite().all() for sample in output)


@pytest.mark.parametrize("name", NAMES)
def test_they_grow_with_size_and_batch(name: str):
    model = TINY_FAMILIES[name].make()
    make = {"class_name": type(model).__name__, "config": model.config, "device": "cpu"}
    small, large = (model_inputs(**make, size=size, batch=1) for size in (64, 128))
    both = model_inputs(**make, size=128, batch=2)
    for latents in (name for name in LATENTS if name in small):
        assert sizes(large)[latents] == 4 * sizes(small)[latents]
        assert sizes(both)[latents] == 8 * sizes(small)[latents]
    floats = [x for x in tree_leaves(both) if isinstance(x, Tensor) and x.is_floating_point()]
    assert floats and all(x.dtype == torch.bfloat16 for x in floats)
    with pytest.raises(ValueError, match=r"size must be a multiple of \d+ pixels, got 65"):
        model_inputs(**make, size=65)


def test_a_list_of_pictures_is_profiled(tmp_path, capsys):
    TINY_FAMILIES["z-image"].make().to(torch.bfloat16).save_pretrained(tmp_path)
    assert main(["profile", str(tmp_path), "--size", "64", "--steps", "1", "--device", "cpu"]) == 0
    assert "ZImage" not in capsys.readouterr().err
