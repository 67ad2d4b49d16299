"""In which type a linear keeps the channel scale of its input, and what a state dict does to it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_linear import ALL, K, composed, draw, tokens
from torch import Tensor

from lrq_kernels import LinearState, LRQLinear


def with_scale(state: LinearState, smooth_scale: Tensor) -> LinearState:
    return dataclasses.replace(state, smooth_scale=smooth_scale)


def test_scales_that_bf16_holds_are_kept_in_it():
    """What lets a GPU multiply in 16 bits; both kinds give what they were made of."""
    held = (torch.rand(K) + 0.5).bfloat16().float()
    for scheme in (ALL["w4a8"], dataclasses.replace(ALL["w4a8"], rotation="none")):
        drawn = draw(scheme, smooth=True)
        for scale, narrow in (
            (held, scheme.rotation == "hadamard"),
            (held * 1.001, False),
            (held * 2.0**-20, False),  # fp16 has no such numbers
        ):
            state = with_scale(drawn, scale)
            linear = LRQLinear.from_state(state)
            kept = linear.input_quantizer.channel_scale
            assert kept is not None and kept.dtype == (torch.int16 if narrow else torch.int32)
            assert torch.equal(linear.to_state().smooth_scale, scale)
            x = tokens(5)
            assert torch.equal(linear(x), composed(state, x))


@pytest.mark.parametrize("factors", [(1.0, 1.001), (1.001, 1.0)])
def test_a_state_dict_brings_its_kind_of_scale(factors: tuple[float, float]):
    held = (torch.rand(K) + 0.5).bfloat16().float()
    states = [with_scale(draw(ALL["w4a8"], smooth=True), held * f) for f in factors]
    target, source = map(LRQLinear.from_state, states)
    target.load_state_dict(source.state_dict())
    x = tokens(5)
    assert torch.equal(target(x), source(x))
    tensors = source.state_dict()
    scale = tensors["input_quantizer.channel_scale"]
    tensors["input_quantizer.channel_scale"] = scale.float()
    with pytest.raises(RuntimeError, match="channel_scale must be torch.int16 or torch.int32, got"):
        target.load_state_dict(tensors)
