"""The pages in lrq_quant/docs: their snippets run, and what they show is so."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from test_auto_family import unknown_model
from test_lora import lora_of
from tiny_models import (
    linears,
    load,
    run,
    shared_dense,
    shared_folder,
    tiny_pipeline,
    tiny_pixart,
)

from lrq_quant import QuantRecipe
from lrq_quant.__main__ import main
from lrq_quant.families import FAMILIES
from lrq_quant.model_card import model_card
from lrq_quant.pipeline_io import quantize_pipeline

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "lrq_quant" / "docs"
PAGES = sorted(page for page in DOCS.glob("*.md") if page.name != "model_card.md")
QUANTIZED = "flux-transformer-w4a8"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the names of the pages are tiny models."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lrq_quant.families.FAMILIES", dict(FAMILIES))  # a page registers one
    flux = shared_dense("flux")
    flux.save_pretrained("black-forest-labs/FLUX.1-dev/transformer")
    unknown_model().save_pretrained("fal/AuraFlow/transformer")
    shutil.copytree(shared_folder("flux"), QUANTIZED)
    tensors = lora_of(flux)
    FluxPipeline.save_lora_weights("my-lora", transformer_lora_layers=tensors)
    return tmp_path


def snippets(page: Path) -> list[str]:
    blocks = re.findall(r"^```python *(not-run)?\n(.*?)^```", page.read_text(), re.M | re.S)
    return [code for not_run, code in blocks if not not_run]


def run_page(page: Path) -> dict:
    """Every snippet of a page in one namespace, on the CPU."""
    names: dict = {}
    for code in snippets(page):
        code = code.replace('"cuda"', '"cpu"').replace("use_stream=True", "use_stream=False")
        exec(compile(code, str(page), "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_snippets_run(page: Path, hub: Path):
    assert run_page(page) is not None
    # A page whose models the fixture makes must have used them.
    assert snippets(page) or page.stem == "troubleshooting"


def test_quantize_page(hub: Path):
    names = run_page(DOCS / "quantize.md")
    config, empty = names["config"], names["empty"]
    kinds = {linear.name: linear.scheme.name for linear in config.plan(empty).linears}
    assert kinds["transformer_blocks.1.ff.net.2"] == "w3a8"
    assert not any(n.startswith("transformer_blocks.0.") or "proj_mlp" in n for n in kinds)
    assert len(linears(load("flux", Path(QUANTIZED)))) == 40
    assert not linears(names["dense"])
    diffusers_names = {rule.parent for rule in names["family"].inputs}
    assert "single_transformer_blocks.*.attn" in diffusers_names


def test_format_page(hub: Path):
    """The file can be read without this package."""
    names = run_page(DOCS / "format.md")
    linear = linears(load("flux", Path(QUANTIZED)))[names["name"]]
    assert torch.equal(names["weight"], linear.dequantize())


def test_lora_page(hub: Path):
    before = run(load("flux", Path(QUANTIZED)), "flux")
    assert torch.equal(run(run_page(DOCS / "lora.md")["transformer"], "flux"), before)


def test_every_page_is_linked_and_every_link_leads_somewhere():
    readme = (ROOT / "README.md").read_text()
    for page in DOCS.glob("*.md"):
        assert f"lrq_quant/docs/{page.name}" in readme, page.name
        for link in re.findall(r"\b([a-z_]+\.md)\b", page.read_text()):
            assert (DOCS / link).is_file(), (page.name, link)


def test_quoted_messages_exist():
    """What troubleshooting.md quotes of lrq is what lrq says."""
    source = "".join(
        f.read_text() for d in ("lrq_kernels", "lrq_quant") for f in Path(ROOT / d).glob("*.py")
    )
    for message in (
        "is of no known family",
        "matches no linear",
        "needs the values of a dense weight",
        "LRQLinear is for inference",
        "was altered: its checksum does not match",
        "is truncated at",
        "has format version",
        "below sm_80",
    ):
        assert message in source and message in (DOCS / "troubleshooting.md").read_text()


# ---- model card ---------------------------------------------------------------------------------


def test_model_card_of_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture):
    folder = tmp_path / "shapes-w3a8"
    recipe = QuantRecipe.from_name("w3a8")
    options = {"num_inference_steps": 1}
    report = quantize_pipeline(
        tiny_pipeline(), recipe, ["a red circle"], folder, call_options=options
    )
    assert main(["card", str(folder), "--base", "someone/shapes"]) == 0
    text = (folder / "README.md").read_text()
    assert capsys.readouterr().out.strip().endswith("README.md")
    assert text.startswith("---\nbase_model: someone/shapes\n") and "# shapes-w3a8" in text
    assert "W3A8 (20 linears), W4A16 (1 linears)" in text
    assert f"| {report.coverage:.2%} |" in text and f"| {report.weight_bits:.2f} |" in text
    assert "| calibration | yes |" in text and "dB" in text and "last projection" in text
    assert "{" not in text
    assert f'DiffusionPipeline.from_pretrained("{folder.name}"' in text
    # What a person wrote into it is not overwritten.
    assert main(["card", str(folder), "--base", "someone/shapes"]) == 1
    assert "exists already" in capsys.readouterr().err


def test_model_card_of_a_transformer_without_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = shutil.copytree(shared_folder("pixart"), tmp_path / "transformer")
    text = model_card(folder, "someone/pixart")
    assert "none, from the weights alone" in text and "not measured" in text
    assert type(tiny_pixart()).__name__ in text
    # What it shows loads the folder.
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)
    names: dict = {}
    exec(code.replace('"cuda"', '"cpu"'), names)
    assert linears(names["transformer"])
