"""LRQLinear.weight: what it tells, and that its values cannot be used by mistake."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lrq_kernels import LRQLinear, QuantScheme
from lrq_kernels.testing import make_state, relative_error

N, K = 40, 256


def test_looks_like_the_linear_it_replaces():
    state = make_state(N, K, QuantScheme(4, 8))
    linear = LRQLinear.from_state(state, dtype=torch.bfloat16)
    assert isinstance(linear, nn.Linear) and list(linear.parameters()) == []
    weight = linear.weight
    assert weight.shape == weight.data.shape == (N, K) and weight.numel() == N * K
    assert (weight.dtype, weight.device) == (torch.bfloat16, torch.device("cpu"))
    assert weight.is_floating_point() and not weight.requires_grad and "bfloat16" in repr(weight)
    assert torch.equal(linear.bias, state.bias)
    linear.to(torch.float16)
    assert linear.weight.dtype == torch.float16 and torch.equal(linear.bias, state.bias)
    assert copy.deepcopy(linear).weight.dtype == torch.float16


@pytest.mark.parametrize(
    "use",
    [
        lambda w: torch.cat([w.data, w.data]),  # diffusers: fuse_projections
        lambda w: w.data.clone(),  # PEFT: merge(safe_merge=True), which then assigns to .data
        lambda w: w.data.add_(1),  # PEFT: merge()
        lambda w: F.linear(torch.zeros(1, K), w),
        lambda w: torch.zeros(N, K).copy_(w),
        lambda w: w.to(torch.float32),
        lambda w: w[0],
        lambda w: setattr(w, "data", torch.zeros(N, K)),
    ],
)
def test_the_values_of_the_weight_cannot_be_used_by_mistake(use: Callable):
    """Remedy: WeightPlaceholder. A zero-stride tensor gives zeros, a dequantized copy is changed
    and thrown away; both say nothing."""
    linear = LRQLinear.from_state(make_state(N, K, QuantScheme(4, 8)))
    with pytest.raises(RuntimeError, match="this linear holds codes"):
        use(linear.weight)


@pytest.mark.parametrize(
    "scheme", [QuantScheme(4, 8), QuantScheme(3, 16, "none"), QuantScheme(4, 4, "dual")]
)
def test_dense_weight_has_smoothing_and_rotation_undone(scheme: QuantScheme):
    state = make_state(N, K, scheme, permuted=scheme.rotation != "none")
    linear, x = LRQLinear.from_state(state), torch.randn(5, K)
    rotated = state.rotation.apply(x * state.smooth_scale) @ linear.dequantize().T
    dense = linear.dense_weight()
    assert dense.dtype == torch.float32
    assert relative_error(x @ dense.T, rotated.double()) < 1e-5
