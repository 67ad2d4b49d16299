"""lrq info on a machine that pretends to have a GPU."""

from __future__ import annotations

import warnings

import pytest
import torch

from lrq_kernels import activation_path, library
from lrq_quant.__main__ import main
from lrq_quant.info import info_lines


def test_the_kernels_of_a_gpu_are_those_that_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (7, 5)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["new", "old"][index])
    new, old = (line for line in info_lines() if line.startswith("GPU"))
    assert "plain, concat, norm_modulate: CUDA; activation: Triton" in new
    assert old == "GPU 1: old, sm_75, below sm_80: no kernels for it"
    monkeypatch.setattr(activation_path, "CUDA_FORMS", frozenset({"plain"}))
    assert "plain: CUDA; concat, activation, norm_modulate: Triton" in "".join(info_lines())


@pytest.mark.parametrize("gpu", [True, False])
def test_missing_kernels_are_told_where_a_gpu_misses_them(
    gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "LIBRARY_NAME", "nothing.so")
    monkeypatch.setattr(library, "_status", "as it was")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        library.load_cuda_library()
    assert library.cuda_library_status().startswith("not built: nothing.so is absent")
    assert [str(w.message).startswith("lrq_kernels: CUDA kernels are not built") for w in told] == (
        [True] if gpu else []
    )


def test_commands_say_once_that_the_cpu_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["profile", "tiny-flux", "--size", "64", "--steps", "1"]) == 0
    assert capsys.readouterr().err.count("no CUDA GPU: running the reference kernels") == 1
