"""Streams, CUDA graphs and torch.compile on a GPU: where a launch goes and what a replay reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from op_samples import VALID, call, flat
from torch import Tensor, nn

from lrq_kernels import InputQuantizer, LRQLinear, QuantScheme, fusion
from lrq_kernels.testing import make_state

pytestmark = pytest.mark.gpu

SCHEMES = {
    "w4a8": QuantScheme(4, 8),
    "w3a4": QuantScheme(3, 4, "hadamard", 64, "rms", 0.3545),
    "w2a8-dual": QuantScheme(2, 8, "dual"),
    "w4a16": QuantScheme(4, 16),
}
N, K = 200, 384
# Long enough that what is launched on another stream meanwhile runs first.
SLEEP_CYCLES = 20_000_000
# The tensor of each op that a late copy provides.
LATE = {
    "rotate": "x",
    "rotate_quantize": "x",
    "concat_rotate_quantize": "second",
    "activation_rotate_quantize": "x",
    "norm_modulate_rotate_quantize": "x",
    "prepack": "codes",
    "unprepack": "weight",
    "dequantize": "weight",
    "gemm": "x_q",
    "gemm_config": "x_q",
    "gemv": "x",
    "gemm_a16": "x",
    "_rotate_rows": "x",
    "qk_norm_rope": "q",
    "qk_norm_rope_parts": "q",
}
# Here, so that a machine without a GPU sees an op that is missing.
assert LATE.keys() == VALID.keys(), f"LATE lacks {VALID.keys() - LATE.keys()}"


def make_linear(scheme: QuantScheme) -> LRQLinear:
    permuted = scheme.rotation != "none"
    return LRQLinear.from_state(make_state(N, K, scheme, permuted=permuted)).cuda()


def tokens(rows: int) -> Tensor:
    return torch.randn(rows, K, device="cuda").bfloat16()


@pytest.mark.parametrize("op", VALID)
def test_runs_on_the_current_stream(op: str):
    """The input arrives late on a side stream; a launch on any other stream reads zeros."""
    arguments = VALID[op]("cuda")
    expected = flat(call(op, arguments))
    real = arguments[LATE[op]]
    arguments[LATE[op]] = late = torch.zeros_like(real)
    assert not all(map(torch.equal, flat(call(op, arguments)), expected))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        late.copy_(real)
        got = flat(call(op, arguments))
    stream.synchronize()
    assert all(map(torch.equal, got, expected))


def captured(run: Any) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of run() and the outputs that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # Triton compiles, kernels load
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run()
    return graph, output


@pytest.mark.parametrize("op", VALID)
def test_graph_replay_of_an_op_is_bit_identical(op: str):
    arguments, others = VALID[op]("cuda"), VALID[op]("cuda")
    late = LATE[op]
    original = arguments[late].clone()
    expected = [flat(call(op, {**arguments, late: x})) for x in (original, others[late])]
    graph, output = captured(lambda: call(op, arguments))
    for value, wanted in ((original, expected[0]), (others[late], expected[1])) * 2:
        arguments[late].copy_(value)
        graph.replay()
        assert all(map(torch.equal, flat(output), wanted))


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES.keys())
@pytest.mark.parametrize("rows", [5, 130])
def test_graph_replay_of_a_linear_is_bit_identical(scheme: QuantScheme, rows: int):
    linear = make_linear(scheme)
    x, first, second = (tokens(rows) for _ in range(3))
    expected = [linear(first), linear(second)]
    graph, y = captured(lambda: linear(x))
    for value, wanted in ((first, expected[0]), (second, expected[1])) * 2:
        x.copy_(value)
        graph.replay()
        assert torch.equal(y, wanted)


def test_graph_of_linears_that_share_their_input():
    scheme = SCHEMES["w4a8"]
    first = make_state(N, K, scheme)
    states = [first, *(make_state(N, K, scheme, shared_with=("q", first)) for _ in range(2))]
    shared = InputQuantizer(K, scheme, first.smooth_scale, first.rotation)
    linears = [LRQLinear.from_state(state, shared).cuda() for state in states]
    x, other = tokens(70), tokens(70)
    expected = [linear(other) for linear in linears]
    graph, outputs = captured(lambda: [linear(x) for linear in linears])
    x.copy_(other)
    graph.replay()
    assert all(map(torch.equal, outputs, expected))


class Block(nn.Module):
    """Linears between operations that the compiler fuses and that round alike however fused."""

    def __init__(self) -> None:
        super().__init__()
        self.up = LRQLinear.from_state(make_state(512, K, SCHEMES["w4a8"]))
        self.down = LRQLinear.from_state(make_state(K, 512, SCHEMES["w3a4"]))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(2 * x)))


@pytest.mark.slow
def test_compiled_with_cuda_graphs_equals_eager(monkeypatch: pytest.MonkeyPatch):
    """mode="reduce-overhead" also catches a launch on a stream that is not being captured. Without
    fusion, which rounds the residual once less (test_fusion has it in CUDA graphs)."""
    monkeypatch.setattr(fusion, "_wanted", False)
    fusion.disable()
    torch._dynamo.reset()
    block = Block().cuda().eval()
    compiled = torch.compile(block, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):  # the first runs record, the others replay
            x = tokens(70)
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(x).clone()
            assert torch.equal(got, block(x))
