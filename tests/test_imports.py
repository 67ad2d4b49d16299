"""The layers: lrq_quant -> lrq_kernels -> torch, safetensors; never back; import is light."""

from __future__ import annotations

import ast
import graphlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import shared_folder

ROOT = Path(__file__).resolve().parents[1]
RUNTIME_FILES = sorted((ROOT / "lrq_kernels").rglob("*.py"))
# Of third parties the run-time package may import these and nothing else.
RUNTIME_MAY_IMPORT = {"torch", "triton", "safetensors", "numpy", "lrq_kernels"}
IMPORT_BUDGET_SECONDS = 0.3


def run_python(code: str, *arguments: str) -> str:
    """stdout of `code` in a fresh interpreter at the repository's root."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


# What each import of one process adds, in the order of a program that knows diffusers before it
# knows lrq. One process for all, since importing these takes longer than the tests.
CODE = """
import json, sys

def load(statement):
    before = set(sys.modules)
    exec(statement)
    return sorted(set(sys.modules) - before)

added = {name: load(f"import {name}") for name in sys.argv[2:]}
from diffusers import PixArtTransformer2DModel
added["is_quantized"] = PixArtTransformer2DModel.from_pretrained(sys.argv[1]).is_quantized
print(json.dumps(added))
"""
IMPORTS = ("torch", "lrq_kernels", "diffusers", "lrq_quant", "lrq_quant.demo")


@pytest.fixture(scope="module")
def said() -> str:
    """stdout of CODE."""
    return run_python(CODE, str(shared_folder("pixart")), *IMPORTS)


@pytest.fixture(scope="module")
def added(said: str) -> dict:
    return json.loads(said.splitlines()[-1])


def imported_packages(path: Path) -> set[str]:
    """Top-level names of every absolute import in a file, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_importing_the_runtime_loads_neither_quantizer_nor_diffusers_nor_triton(added: dict):
    # torch itself may or may not bring triton in: what counts is what lrq_kernels adds.
    loaded = added["lrq_kernels"]
    assert "lrq_kernels" in loaded and "diffusers" in added["diffusers"]
    heavy = ("lrq_quant", "diffusers", "transformers", "triton", "numba")
    assert [name for name in loaded if name.split(".")[0] in heavy] == []
    assert "lrq_kernels.rotate_quantize" not in loaded


def test_importing_prints_nothing(said: str):
    assert len(said.splitlines()) == 1


def test_an_import_after_that_of_diffusers_registers(added: dict):
    """Remedy: register() at import. diffusers knows nothing of plugins. (The other order is that of
    test_wheel.py.)"""
    assert "lrq_quant" in added["lrq_quant"] and added["is_quantized"] is True


def test_importing_the_demo_is_light(added: dict):
    """It adds nothing of torch and diffusers to what lrq_quant has loaded."""
    assert "lrq_quant.demo" in added["lrq_quant.demo"]
    heavy = [m for m in added["lrq_quant.demo"] if m.split(".")[0] in ("torch", "diffusers")]
    assert heavy == []


def test_importing_the_runtime_is_quick(said: str):
    """On top of torch, in its process; the least of several, since the machine may be busy."""
    code = (
        "import torch, time; start = time.perf_counter(); import lrq_kernels;"
        "print(time.perf_counter() - start)"
    )
    seconds = []  # byte code was written when `said` was
    for _ in range(6):
        seconds.append(float(run_python(code)))
        if min(seconds) <= IMPORT_BUDGET_SECONDS:
            break
    assert min(seconds) <= IMPORT_BUDGET_SECONDS, seconds


@pytest.mark.parametrize("path", RUNTIME_FILES, ids=lambda path: path.stem)
def test_runtime_imports_only_what_it_may(path: Path):
    third_party = imported_packages(path) - set(sys.stdlib_module_names)
    assert third_party <= RUNTIME_MAY_IMPORT


def test_runtime_modules_import_in_one_order():
    """No cycle, not even one that works because of the order in which names get bound."""
    graph: dict[str, set[str]] = {}
    for path in RUNTIME_FILES:
        if path.stem == "__init__":
            continue
        nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom)]
        names = [n.module.split(".")[0] for n in nodes if n.level == 1 and n.module]
        names += [alias.name for n in nodes if n.level == 1 and not n.module for alias in n.names]
        graph[path.stem] = set(names)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle


def test_only_the_binding_of_csrc_sees_torch():
    """Kernels and launchers take pointers: they compile in seconds and never depend on a torch."""
    including = {
        path.name
        for path in (ROOT / "csrc").rglob("*")
        if path.is_file() and re.search(r"#include\s+[<\"](torch|ATen|c10)/", path.read_text())
    }
    assert including <= {"ops.cpp", "torch_utils.h"}


def test_runtime_files_are_found():
    # Guards the parametrization above against a move that would leave it without a case.
    assert {"__init__", "ops", "linear", "checkpoint"} <= {path.stem for path in RUNTIME_FILES}
