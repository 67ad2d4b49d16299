"""For tests of several processes: on a CPU, and where there are two GPUs on those."""

from __future__ import annotations

import pytest
import torch

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
cpu_and_two_gpus = pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, two_gpus])]
)
