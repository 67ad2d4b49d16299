"""LRQLinear.weight: what it tells, and that its values cannot be used by mistake."""

from __future__ import annotations

import copy
import io
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
        lambda w: w.data.clone().add_(1),  # PEFT: merge(safe_merge=True), which then sets .data
        lambda w: w.data.add_(1),  # PEFT: merge()
        lambda w: F.linear(torch.zeros(1, K), w),
        lambda w: torch.zeros(N, K).copy_(w),
        lambda w: w * 2,
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


def test_the_state_dict_shows_it_and_can_be_moved_copied_and_pickled():
    """Remedy: an entry "weight" (FLUX's LoRA loader reads its shape, accelerate moves it)."""
    linear = LRQLinear.from_state(make_state(N, K, QuantScheme(4, 8)), dtype=torch.bfloat16)
    tensors = linear.state_dict()
    assert tensors["weight"].shape == (N, K)
    moved = {name: tensor.to("cpu") for name, tensor in tensors.items()}
    file = io.BytesIO()
    torch.save(copy.deepcopy(moved), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded["weight"].shape == (N, K) and loaded["weight"].dtype == torch.bfloat16
    assert tensors["weight"].to(torch.float32).dtype == torch.float32
    with pytest.raises(RuntimeError, match="this linear holds codes"):
        loaded["weight"].float()
    linear.load_state_dict(loaded)
    with pytest.raises(RuntimeError, match='Unexpected key.*"weight"'):
        linear.load_state_dict({**tensors, "weight": torch.zeros(N, K)})


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
