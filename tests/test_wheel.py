"""The wheel: what make wheel packs is complete and runs without the checkout.

The torch of this interpreter alone: another torch is another environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.slow

CODE = """
import sys, torch, lrq_kernels, lrq_quant
from lrq_kernels import _planner
from lrq_quant.demo.pipeline import load_pipeline, prompt_generators
site = sys.argv[1]
assert all(m.__file__.startswith(site) for m in (lrq_kernels, lrq_quant, _planner))
from importlib import resources
weights = resources.files("lrq_quant").joinpath("demo/weights")
pipeline = load_pipeline(str(weights))
recipe = lrq_quant.QuantRecipe.from_name("w4a8")
from lrq_quant.pipeline_io import quantize_pipeline
quantize_pipeline(pipeline, recipe, None, sys.argv[2])
loaded = type(pipeline).from_pretrained(sys.argv[2])
assert lrq_quant.check(loaded).problems == ()
from lrq_quant.model_card import model_card
assert "W4A8" in model_card(sys.argv[2], "someone/shapes")
print(torch.__version__, lrq_kernels.cuda_library_status())
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the files that git knows, in a copy, without the CUDA library."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.split("\n"):
        if name and (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps"]
    environment = {**os.environ, "LRQ_BUILD_CUDA": "0"}
    done = subprocess.run(
        [*pip, "--wheel-dir", str(out), "."],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = out.glob("lrq-*.whl")
    return file


def test_it_is_for_this_cpython_and_any_torch_from_2_10(wheel: Path):
    assert f"cp{sys.version_info.major}{sys.version_info.minor}" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [n for n in archive.namelist() if n.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    assert "Requires-Dist: torch>=2.10" in text


def test_everything_that_is_read_at_run_time_is_in_it(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    wanted = {
        str(file.relative_to(ROOT))
        for package in ("lrq_kernels", "lrq_quant")
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".so"
    }
    assert wanted <= packed
    extra = {n for n in packed - wanted if ".dist-info/" not in n and not n.endswith(".so")}
    assert not extra


def test_it_runs_without_the_checkout(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(site), str(tmp_path / "q")],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
