"""The graph pass under torch.compile: what it finds in models, what it must leave, what it changes.

The pass runs on what inductor's decompositions make of a graph, which then runs as it is; one test
goes through inductor itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_families import forward
from tiny_models import TINY, as_near, load, shared_folder
from torch import Tensor, nn
from torch._dynamo.utils import counters

from lrq_kernels import LRQLinear, QuantScheme, fusion
from lrq_kernels.testing import make_state, sqnr_db
from lrq_quant import fuse_projections

WIDTH, HIDDEN = 128, 256
W4A8 = QuantScheme(4, 8)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    torch._dynamo.reset()
    fusion.disable()
    fusion.reset_counts()
    monkeypatch.setattr(fusion, "_wanted", True)
    yield
    torch._dynamo.reset()


def passed(module: nn.Module, **options: Any) -> tuple[Callable, list[dict[str, int]]]:
    """`module` compiled with the pass alone, and the matches of each graph."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._inductor.decomposition import select_decomp_table

    found: list[dict[str, int]] = []

    def compiler(graph_module: torch.fx.GraphModule, _: list) -> Callable:
        found.append(fusion.fuse(graph_module.graph))
        graph_module.recompile()
        return graph_module.forward

    backend = aot_autograd(fw_compiler=compiler, decompositions=select_decomp_table())
    return torch.compile(module, backend=backend, fullgraph=True, **options), found


# ---- models -------------------------------------------------------------------------------------

# Two blocks of each kind. A double block of FLUX has two streams of attention and feed-forward.
FLUX = {
    "gemm_gelu": 2 * 2 + 2,
    "norm_modulate": 2 * 4 + 2,
    "concat": 2,
    "gemm_residual": 2 * 4 + 2,
}
EXPECTED = {
    # q, k, v of each stream; q, k, v and the feed-forward of a single block.
    ("flux", False): {"shared_input": 2 * (2 + 2) + 2 * 3, **FLUX},
    ("flux", True): {"shared_input": 2 * 1, **FLUX},
    # Both attentions and the feed-forward add to the residual; the second attention has no norm.
    ("pixart", True): {"gemm_gelu": 2, "norm_modulate": 2 * 2, "gemm_residual": 2 * 3},
}


@pytest.fixture
def made() -> Callable[[str, torch.dtype], nn.Module]:
    def get(kind: str, dtype: torch.dtype) -> nn.Module:
        return load(kind, shared_folder(kind, torch.float32), torch_dtype=dtype)

    return get


def inputs_of(kind: str, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
    torch.manual_seed(0)
    given = TINY[kind][1](torch.float32).items()
    return {n: x.to(device, dtype) if isinstance(x, Tensor) else x for n, x in given}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "fused", "dtype"),
    [
        *((*case, torch.float32) for case in EXPECTED),
        ("flux", True, torch.bfloat16),
        ("pixart", True, torch.bfloat16),
    ],
)
def test_every_pattern_of_a_model_is_found(kind: str, fused: bool, dtype: torch.dtype, made):
    model = made(kind, dtype)
    if fused:
        fuse_projections(model)
    given = inputs_of(kind, dtype)
    fast, found = passed(model)
    got, eager = forward(fast, given), forward(model, given)
    assert found == [EXPECTED[kind, fused]]
    if dtype == torch.float32:
        assert sqnr_db(eager, got) > 45
    else:  # of fewer roundings: as near to the model in fp32 as the steps one by one
        exact = forward(made(kind, torch.float32), inputs_of(kind, torch.float32))
        assert as_near(exact, got, eager)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd3", "wan"])
def test_models_with_other_norms_keep_their_output(kind: str, made):
    """What is found where a norm is in fp32 (Wan) or a block leaves out a part of it (SD3)."""
    model, given = made(kind, torch.float32), inputs_of(kind, torch.float32)
    fast, found = passed(model)
    assert sqnr_db(forward(model, given), forward(fast, given)) > 45
    assert found[0]["norm_modulate"] and found[0]["gemm_residual"] and found[0]["shared_input"]


# ---- patterns -----------------------------------------------------------------------------------


class Block(nn.Module):
    """Tokens to `formula`, with two quantized linears and vectors to write it with."""

    def __init__(self, formula: Callable[[Block, Tensor], Tensor], width: int = WIDTH) -> None:
        super().__init__()
        self.up = LRQLinear.from_state(make_state(HIDDEN, width, W4A8), name="up")
        self.down = LRQLinear.from_state(make_state(WIDTH, HIDDEN, W4A8), name="down")
        self.weight, self.bias = torch.rand(width) + 0.5, torch.randn(width)
        self.scale, self.shift = torch.randn(2, 3, width)[:, :, None]  # [3, 1, K] each
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)


def layer_norm(x: Tensor, *affine: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *affine, eps=1e-6)


def rms_norm(x: Tensor, weight: Tensor | None = None) -> Tensor:
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return y if weight is None else y * weight


FOUND: dict[str, tuple[Callable[[Block, Tensor], Tensor], dict[str, int]]] = {
    "norm": (lambda b, x: b.up(layer_norm(x)), {"norm_modulate": 1}),
    "affine": (lambda b, x: b.up(layer_norm(x, b.weight, b.bias)), {"norm_modulate": 1}),
    "rms": (lambda b, x: b.up(rms_norm(x)), {"norm_modulate": 1}),
    "rms-weight": (lambda b, x: b.up(rms_norm(x, b.weight)), {"norm_modulate": 1}),
    "torch-rms": (
        lambda b, x: b.up(F.rms_norm(x, x.shape[-1:], b.weight, 1e-6)),
        {"norm_modulate": 1},
    ),
    "scale": (lambda b, x: b.up(layer_norm(x) * (1 + b.scale)), {"norm_modulate": 1}),
    "scale-shift": (
        lambda b, x: b.up(b.shift + (1 + b.scale) * layer_norm(x)),
        {"norm_modulate": 1},
    ),
    "affine-scale-shift": (
        lambda b, x: b.up(layer_norm(x, b.weight, b.bias) * (b.scale + 1) + b.shift),
        {"norm_modulate": 1},
    ),
    "scale-unsqueezed-after": (
        lambda b, x: b.up(layer_norm(x) * (1 + b.scale[:, 0])[:, None] + b.shift[:, 0][:, None]),
        {"norm_modulate": 1},
    ),
    "gelu": (lambda b, x: b.down(F.gelu(b.up(x), approximate="tanh")), {"gemm_gelu": 1}),
    "gelu-erf": (lambda b, x: b.down(F.gelu(b.up(x))), {"activation": 1}),
    "gelu-read-twice": (
        lambda b, x: b.down(F.gelu(y := b.up(x), approximate="tanh")) * y[..., :WIDTH],
        {"activation": 1},
    ),
    "silu": (lambda b, x: b.down(F.silu(b.up(x))), {"activation": 1}),
    "swiglu": (lambda b, x: b.down(F.silu(b.up(x)) * b.up(x + 1)), {"activation": 1}),
    "geglu": (
        lambda b, x: b.down(b.up(x) * F.gelu(b.up(x + 1), approximate="tanh")),
        {"activation": 1},
    ),
    "two-sources": (lambda b, x: b.down(torch.cat([x, x + 1], dim=-1)), {"concat": 1}),
    "residual": (lambda b, x: x + b.down(b.up(x)), {"gemm_residual": 1}),
    "gated": (lambda b, x: b.down(b.up(x)) * b.scale + x, {"gemm_residual": 1}),
    "gate-unsqueezed": (
        lambda b, x: x + b.scale[:, 0].unsqueeze(1) * b.down(b.up(x)),
        {"gemm_residual": 1},
    ),
    "divided-by-one": (lambda b, x: x + b.down(b.up(x)) / 1.0, {"gemm_residual": 1}),
    "shared": (lambda b, x: b.up(x) * b.up(x), {"shared_input": 1}),
}
LEFT: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "norm-of-tokens": lambda b, x: b.up(F.layer_norm(x.mT, x.shape[1:2]).mT.contiguous()),
    "scale-of-a-token": lambda b, x: b.up(x * (1 + x[..., :1])),
    "root-of-itself": lambda b, x: b.up((x - x.mean(-1, keepdim=True)) * (x.abs() + 1).rsqrt()),
    "gelu-of-another-factor": lambda b, x: b.up(0.5 * x * (1 + torch.tanh(0.7 * x))),
    "three-sources": lambda b, x: b.down(torch.cat([x[..., :64], x, x[..., :64]], dim=-1)),
    "joined-tokens": lambda b, x: b.up(torch.cat([x, x], dim=1)),
    "read-before-the-residual": lambda b, x: x + (y := b.down(b.up(x))) + y.sum(),
    "gate-of-tokens": lambda b, x: x + x[..., :1] * b.down(b.up(x)),
    "residual-of-one-token": lambda b, x: x[:, :1] + b.down(b.up(x)),
    "alpha": lambda b, x: torch.add(x, b.down(b.up(x)), alpha=2),
    "other-input": lambda b, x: b.up(x) * b.up(x + 1),
}


def tokens(count: int = 5) -> Tensor:
    x = torch.randn(3, count, WIDTH)
    x[..., 7] *= 20
    return x


@pytest.mark.parametrize("name", FOUND)
@torch.no_grad()
def test_a_pattern_is_found_and_computes_the_same(name: str):
    formula, expected = FOUND[name]
    block, x = Block(formula), tokens()
    fast, found = passed(block)
    assert sqnr_db(block(x), fast(x)) > 60
    assert found == [expected]


@pytest.mark.parametrize("name", LEFT)
@torch.no_grad()
def test_what_is_not_the_pattern_is_left(name: str):
    block, x = Block(LEFT[name]), tokens()
    fast, found = passed(block)
    # Inductor sums a norm in another order, which can turn a code by one: 65 dB and more.
    assert sqnr_db(block(x), fast(x)) > 50
    assert found == [{}]


@pytest.mark.parametrize("name", ["shared", "two-sources"])
@torch.no_grad()
def test_patterns_that_round_nowhere_change_no_bit(name: str):
    block, x = Block(FOUND[name][0]), tokens().bfloat16()
    assert torch.equal(passed(block)[0](x), block(x))


@pytest.mark.parametrize("name", ["scale-shift", "gelu", "swiglu", "gated", "two-sources"])
@torch.no_grad()
def test_symbolic_sizes(name: str):
    formula, expected = FOUND[name]
    block = Block(formula)
    fast, found = passed(block, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (5, 9):
            x = tokens(count)
            assert sqnr_db(block(x), fast(x)) > 60
    assert found == [expected]


@torch.no_grad()
def test_vectors_of_another_type_are_left_or_taken():
    """Modulation may be in fp32 beside tokens in 16 bits; a gate may not."""
    x = tokens().bfloat16()
    norm = Block(lambda b, x: b.up((layer_norm(x.float()) * (1 + b.scale) + b.shift).bfloat16()))
    fast, found = passed(norm)
    fast(x)
    assert found == [{"norm_modulate": 1}]
    gated = Block(lambda b, x: (x + b.down(b.up(x)) * b.scale).bfloat16())
    fast, found = passed(gated)
    assert torch.equal(fast(x), gated(x))
    assert found == [{}]


# ---- registration -------------------------------------------------------------------------------


def test_enabling_twice_and_beside_another_pass():
    import torch._inductor.config as config

    calls = []
    assert not fusion.is_enabled()
    with config.patch(post_grad_custom_pre_pass=calls.append):
        fusion.enable()
        ours = config.post_grad_custom_pre_pass
        fusion.enable()
        assert fusion.is_enabled() and config.post_grad_custom_pre_pass is ours
        graph = torch.fx.Graph()
        ours(graph)
        assert calls == [graph] and ours.uuid() is None  # the other pass cannot be told apart
        fusion.disable()
        assert config.post_grad_custom_pre_pass == calls.append
    fusion.enable()
    assert isinstance(config.post_grad_custom_pre_pass.uuid(), bytes)


@pytest.mark.slow
@torch.no_grad()
def test_inductor_runs_the_pass_unless_told_not_to(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # the first compilation finds none

    def formula(b: Block, x: Tensor) -> Tensor:
        y = b.up(layer_norm(x) * (1 + b.scale) + b.shift)
        return x + b.scale * b.down(F.gelu(y, approximate="tanh"))

    def as_it_is(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable:
        return module.forward

    block, x = Block(formula), tokens()
    fusion.disable()
    torch.compile(copy.deepcopy(block), backend=as_it_is, fullgraph=True)(x)
    assert not fusion.is_enabled()

    fusion._wanted = True
    torch._dynamo.reset()
    for cached in (False, True):
        fusion.reset_counts()
        hits = counters["inductor"]["fxgraph_cache_hit"]
        fast = torch.compile(copy.deepcopy(block), fullgraph=True)
        # As of whole models: inductor rounds otherwise, and some draws have codes at ties.
        assert sqnr_db(block(x), fast(x)) > 45
        assert fusion.is_enabled()
        assert counters["inductor"]["fxgraph_cache_hit"] - hits == cached
        matched = {name: count for name, count in fusion.counts().items() if count}
        assert matched == {"gemm_gelu": 1, "norm_modulate": 1, "gemm_residual": 1}
        torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "fused"), EXPECTED)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_on_a_gpu(kind: str, fused: bool, mode: str, made):
    model = made(kind, torch.bfloat16).to("cuda")
    if fused:
        fuse_projections(model)
    given = inputs_of(kind, torch.bfloat16, "cuda")
    eager = forward(model, given)
    exact = forward(made(kind, torch.float32).to("cuda"), inputs_of(kind, torch.float32, "cuda"))
    fast = torch.compile(model, fullgraph=True, mode=mode)
    for _ in range(3):
        got = forward(fast, given).clone()
        assert as_near(exact, got, eager)
    assert {n: c for n, c in fusion.counts().items() if c} == EXPECTED[kind, fused]
