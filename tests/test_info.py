"""lrq info on a machine that pretends to have a GPU."""

from __future__ import annotations

import pytest
import torch

from lrq_kernels import activation_path
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
