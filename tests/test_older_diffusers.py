"""What stands in for hooks that diffusers has from 0.39 on, around functions as 0.36 has them.

With those versions themselves the tests of loading and saving were run, see docs/install.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ModelMixin
from diffusers.models import modeling_utils
from safetensors import safe_open
from tiny_models import load, quantized_folder, tiny_pixart
from torch import nn

import lrq_kernels
from lrq_kernels.checkpoint import FILE_NAME, INDEX_NAME
from lrq_quant import older_diffusers
from lrq_quant.diffusers_backend import LRQQuantizer


def save_as_0_36(model: nn.Module, folder: Path, *, safe_serialization: bool = True) -> None:
    """In two files, as max_shard_size makes them."""
    folder.mkdir()
    tensors = sorted(model.state_dict().items())
    for index, part in enumerate((tensors[::2], tensors[1::2])):
        path = str(folder / f"part-{index}.safetensors")
        modeling_utils.safetensors.torch.save_file(dict(part), path, metadata={"format": "pt"})


def test_saves_tensors_and_metadata_of_the_quantizer(tmp_path: Path):
    model = load("pixart", quantized_folder("pixart", tmp_path / "q"))
    save = older_diffusers._saving(save_as_0_36, LRQQuantizer)
    before = {*model.state_dict()}
    save(model, tmp_path / "again")
    expected = model.hf_quantizer.get_state_dict_and_metadata({}, safe_serialization=True)
    found: dict[str, Any] = {}
    for file in (tmp_path / "again").iterdir():
        with safe_open(file, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            assert opened.metadata() == {"format": "pt", **expected[1]}
    assert found.keys() == expected[0].keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected[0].items())
    # Nothing of it stays, also after an error.
    with pytest.raises(FileExistsError):
        save(model, tmp_path / "again")
    assert modeling_utils.safetensors.__name__ == "safetensors"
    assert {*model.state_dict()} == before


def test_other_models_are_saved_as_they_are(tmp_path: Path):
    model = tiny_pixart()
    older_diffusers._saving(save_as_0_36, LRQQuantizer)(model, tmp_path / "dense")
    with safe_open(tmp_path / "dense" / "part-0.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert {*opened.keys()} < {*model.state_dict()}


def test_the_file_is_read_before_the_model_is_filled(tmp_path: Path):
    """As from_pretrained of 0.36 calls, in its order."""
    folder = quantized_folder("pixart", tmp_path / "q")
    expected = load("pixart", folder, torch_dtype=torch.float32)
    assert not (folder / INDEX_NAME).exists()
    quantizer = LRQQuantizer(expected.hf_quantizer.quantization_config, pre_quantized=True)
    model, calls = tiny_pixart(), []

    def fill(model: nn.Module, state_dict: dict[str, Any], **options: Any) -> None:
        for name, tensor in state_dict.items():
            calls.append(name)
            if quantizer.check_if_quantized_param(model, tensor, name, state_dict):
                quantizer.create_quantized_param(model, tensor, name, "cpu", state_dict)

    def load_0_36(
        cls: type, model: nn.Module, state: Any, files: list[str], *_: Any, **options: Any
    ):
        assert not options["is_parallel_loading_enabled"]
        with safe_open(files[0], "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        fill_wrapped(model, tensors, hf_quantizer=options["hf_quantizer"])

    fill_wrapped = older_diffusers._before_tensors(fill, LRQQuantizer)
    wrapped = older_diffusers._before_loading(load_0_36, LRQQuantizer)
    options = {"hf_quantizer": quantizer, "is_parallel_loading_enabled": True}
    wrapped(ModelMixin, model, None, [str(folder / FILE_NAME)], "name", [], **options)
    quantizer.postprocess_model(model)
    own = {n: m for n, m in model.named_modules() if isinstance(m, lrq_kernels.LRQLinear)}
    assert own and calls
    for name, linear in own.items():
        assert torch.equal(linear.dense_weight(), expected.get_submodule(name).dense_weight()), name


def test_a_dense_model_passes_through(tmp_path: Path):
    got = []
    load_0_36 = older_diffusers._before_loading(
        lambda *arguments, **options: got.append((arguments, options)), LRQQuantizer
    )
    load_0_36(ModelMixin, "model", {}, ["file"], "name", ["key"], hf_quantizer=None)
    assert got == [((ModelMixin, "model", {}, ["file"], "name", ["key"]), {"hf_quantizer": None})]
