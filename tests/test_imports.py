"""The layers: lrq_quant -> lrq_kernels -> torch, safetensors; never back; import is light."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUNTIME_FILES = sorted((ROOT / "lrq_kernels").rglob("*.py"))
# Of third parties the run-time package may import these and nothing else.
RUNTIME_MAY_IMPORT = {"torch", "triton", "safetensors", "numpy", "lrq_kernels"}
IMPORT_BUDGET_SECONDS = 0.3


def run_python(code: str, **environment: str) -> str:
    """stdout of `code` in a fresh interpreter at the repository's root."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported_packages(path: Path) -> set[str]:
    """Top-level names of every absolute import in a file, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_importing_the_runtime_loads_neither_quantizer_nor_diffusers_nor_triton():
    # torch itself may or may not bring triton in: what counts is what lrq_kernels adds.
    loaded = run_python(
        "import sys, torch; before = set(sys.modules); import lrq_kernels;"
        "print(*sorted(set(sys.modules) - before))"
    ).split()
    assert "lrq_kernels" in loaded
    heavy = ("lrq_quant", "diffusers", "transformers", "triton", "numba")
    assert [name for name in loaded if name.split(".")[0] in heavy] == []
    assert "lrq_kernels.rotate_quantize" not in loaded


def test_importing_the_runtime_prints_nothing():
    assert run_python("import lrq_kernels") == ""


def test_importing_the_runtime_is_quick():
    """On top of torch, in its process; the least of several, since the machine may be busy."""
    code = (
        "import torch, time; start = time.perf_counter(); import lrq_kernels;"
        "print(time.perf_counter() - start)"
    )
    run_python(code)  # byte code gets written here
    seconds = []
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
