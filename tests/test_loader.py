"""load_quantized and model_states: a model in, the same model out, or the model untouched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrq_kernels import (
    CheckpointError,
    LinearState,
    LRQLinear,
    QuantScheme,
    fuse_linears,
    load,
    load_quantized,
    loader,
    model_states,
    save,
)
from lrq_kernels.testing import make_state, relative_error

WIDTH = 128
W4A8 = QuantScheme(4, 8)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH)
        self.to_k = nn.Linear(WIDTH, WIDTH)
        self.to_v = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return self.to_out[0](F.scaled_dot_product_attention(q, k, v))


class Toy(nn.Module):
    """A transformer in small: linears to quantize, dense ones, buffers of both kinds."""

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, WIDTH)
        self.blocks = nn.ModuleList([Attention(), Attention()])
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("steps", torch.arange(5))
        # Not linspace: after transformers has loaded a model, torch.device does not reach it.
        self.register_buffer("positions", torch.arange(WIDTH) / WIDTH, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.positions.to(x.dtype)
        for block in self.blocks:
            x = x + block(self.norm(x))
        return x


class Other(Toy):
    pass


def quantized_states() -> dict[str, LinearState]:
    """Every linear of the blocks; q, k and v share their input; block 1 is weight-only."""
    states = {}
    for block, scheme in (("blocks.0", W4A8), ("blocks.1", QuantScheme(3, 16))):
        q = make_state(WIDTH, WIDTH, scheme, permuted=True)
        owner = (f"{block}.to_q", q)
        states[owner[0]] = q
        states[f"{block}.to_k"] = make_state(WIDTH, WIDTH, scheme, shared_with=owner)
        states[f"{block}.to_v"] = make_state(WIDTH, WIDTH, scheme, bias=False, shared_with=owner)
        states[f"{block}.to_out.0"] = make_state(WIDTH, WIDTH, QuantScheme(2, 8, "none"))
    return states


def dense_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if not n.startswith("blocks.")}


@pytest.fixture
def source() -> Toy:
    """Holds the dense parameters of the checkpoint."""
    return Toy().eval().requires_grad_(False)


@pytest.fixture
def states() -> dict[str, LinearState]:
    return quantized_states()


@pytest.fixture
def file(source: Toy, states: dict[str, LinearState], tmp_path: Path) -> Path:
    return save(tmp_path / "model.safetensors", states, dense_of(source), "Toy")


def by_hand(source: Toy, states: dict[str, LinearState]) -> Toy:
    """The quantized model without the loader: every linear with an input of its own."""
    for name, state in states.items():
        own = dataclasses.replace(state, shared_input=None)
        source.set_submodule(name, LRQLinear.from_state(own, name=name))
    return source


def quantized_linears(model: nn.Module) -> dict[str, LRQLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, LRQLinear)}


# ---- the way in ---------------------------------------------------------------------------------


def test_loaded_model_computes_what_the_states_say(
    file: Path, source: Toy, states: dict[str, LinearState]
):
    model = Toy()
    assert load_quantized(model, file) is model
    assert not model.training
    assert set(quantized_linears(model)) == set(states)
    x = torch.randn(2, 7, 16)
    assert torch.equal(model(x), by_hand(source, states)(x))
    # And not because the blocks are without effect.
    plain = Toy().eval().requires_grad_(False)
    plain.load_state_dict(dense_of(source), strict=False)
    assert relative_error(model(x), plain(x)) > 0.01


def test_two_loads_are_bit_identical(file: Path):
    x = torch.randn(2, 7, 16).bfloat16()
    first, second = (load_quantized(Toy(), file, dtype=torch.bfloat16) for _ in range(2))
    assert torch.equal(first(x), second(x))


def test_sharers_get_one_input_quantizer(file: Path):
    linears = quantized_linears(load_quantized(Toy(), file))
    for block in ("blocks.0", "blocks.1"):
        shared = {
            id(linears[f"{block}.{name}"].input_quantizer.shared) for name in ("to_q", "to_k")
        }
        assert len(shared) == 1
        assert len(linears[f"{block}.to_q"].input_quantizer.shared.readers) == 3
        assert len(linears[f"{block}.to_out.0"].input_quantizer.shared.readers) == 1


def test_model_on_the_meta_device_is_filled(file: Path, source: Toy, states: dict):
    with torch.device("meta"):
        model = Toy()
    model.positions = torch.arange(WIDTH) / WIDTH  # not persistent: in no checkpoint
    load_quantized(model, file)
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    x = torch.randn(2, 7, 16)
    assert torch.equal(model(x), by_hand(source, states)(x))


def test_dtype_casts_floating_dense_tensors_alone(file: Path):
    model = load_quantized(Toy(), file, dtype=torch.float16)
    assert model.embed.weight.dtype == model.norm.bias.dtype == torch.float16
    assert model.steps.dtype == torch.int64
    reference = load_quantized(Toy(), file)
    assert reference.embed.weight.dtype == torch.float32
    for name, linear in quantized_linears(model).items():
        expected = list(reference.get_submodule(name).buffers())
        assert all(map(torch.equal, linear.buffers(), expected))


def test_nothing_of_the_loaded_model_wants_gradients(file: Path):
    assert not any(p.requires_grad for p in load_quantized(Toy(), file).parameters())


# ---- the way out --------------------------------------------------------------------------------


def test_model_states_save_and_load_is_bit_identical(file: Path, tmp_path: Path):
    model = load_quantized(Toy(), file)
    states, dense = model_states(model)
    original = load(file)
    assert states.keys() == original.states.keys()
    assert {n: s.shared_input for n, s in states.items()} == {
        n: s.shared_input for n, s in original.states.items()
    }
    again = load_quantized(Toy(), save(tmp_path / "again", states, dense, "Toy"))
    x = torch.randn(2, 7, 16)
    assert torch.equal(again(x), model(x))
    assert all(torch.equal(dense[n], original.dense[n]) for n in original.dense)


def test_model_states_splits_fused_linears_under_their_own_names(file: Path, tmp_path: Path):
    model = load_quantized(Toy(), file)
    attention = model.blocks[0]
    expected = model_states(model)[0]
    attention.to_qk = fuse_linears([attention.to_q, attention.to_k])
    del attention.to_q, attention.to_k
    states, dense = model_states(model)
    assert states.keys() == expected.keys()
    assert not any("to_qk" in name for name in dense)
    for name in ("blocks.0.to_q", "blocks.0.to_k"):
        assert torch.equal(states[name].codes, expected[name].codes)
        assert torch.equal(states[name].bias, expected[name].bias)
    # to_v comes before the fused one among the modules, so it owns the input now.
    save(tmp_path / "again", states, dense, "Toy")
    again = load(tmp_path / "again").states
    for name, state in expected.items():
        for stored, original in (
            (again[name].smooth_scale, state.smooth_scale),
            (again[name].rotation.signs, state.rotation.signs),
            (again[name].rotation.permutation, state.rotation.permutation),
        ):
            assert (stored is None) == (original is None)
            assert stored is None or torch.equal(stored, original)


# ---- what does not fit --------------------------------------------------------------------------


def snapshot(model: nn.Module) -> tuple[dict[str, int], dict[str, Tensor], bool]:
    modules = {name: id(module) for name, module in model.named_modules()}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return modules, {name: tensor.detach().clone() for name, tensor in tensors.items()}, True


def assert_untouched(model: nn.Module, before: tuple) -> None:
    modules, tensors, _ = snapshot(model)
    assert modules == before[0] and tensors.keys() == before[1].keys()
    for name, tensor in tensors.items():
        assert tensor.is_meta or torch.equal(tensor, before[1][name]), name


def without_block() -> nn.Module:
    model = Toy()
    del model.blocks[1]
    return model


def with_module(name: str, module: nn.Module) -> nn.Module:
    model = Toy()
    model.set_submodule(name, module)
    return model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return Toy()


def with_more_steps() -> nn.Module:
    model = Toy()
    model.register_buffer("steps", torch.arange(9))
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (Other, "checkpoint is of a Toy, the model is a Other"),
        (without_block, r"blocks.1.to_q must be a Linear in the model, got nothing"),
        (
            lambda: with_module("blocks.0.to_k", nn.Identity()),
            "blocks.0.to_k must be a Linear in the model, got Identity",
        ),
        (
            lambda: with_module("blocks.0.to_k", nn.Linear(WIDTH, 64)),
            r"blocks.0.to_k: .*must be \(64, 128, True\) .* has \(128, 128, True\)",
        ),
        (
            lambda: with_module("blocks.0.to_k", nn.Linear(WIDTH, WIDTH, bias=False)),
            r"blocks.0.to_k: .*must be \(128, 128, False\)",
        ),
        (lambda: with_module("norm", nn.Identity()), r"extra .'norm.bias', 'norm.weight'"),
        (lambda: with_module("embed.extra", nn.Linear(2, 2)), r"missing .'embed.extra.bias'"),
        (with_more_steps, r"steps must be \[9\] as in the model, the checkpoint has \[5\]"),
        (on_meta, "buffer positions of the model is on the meta device"),
    ],
)
def test_another_model_is_refused_and_left_as_it_was(
    file: Path, build: Callable[[], nn.Module], message: str
):
    model = build()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=message):
        load_quantized(model, file)
    assert_untouched(model, before)


def test_a_damaged_file_leaves_the_model_as_it_was(file: Path):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    model = Toy()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match="was altered"):
        load_quantized(model, file)
    assert_untouched(model, before)


def test_running_out_of_memory_leaves_the_model_as_it_was(
    file: Path, monkeypatch: pytest.MonkeyPatch
):
    real, built = LRQLinear.from_state.__func__, []

    def fails_at_last(cls: type, state: LinearState, *rest: object) -> LRQLinear:
        built.append(state)
        if len(built) == 8:
            raise torch.OutOfMemoryError("no memory for the last linear")
        return real(cls, state, *rest)

    monkeypatch.setattr(loader.LRQLinear, "from_state", classmethod(fails_at_last))
    model = Toy()
    before = snapshot(model)
    with pytest.raises(torch.OutOfMemoryError):
        load_quantized(model, file)
    assert len(built) == 8
    assert_untouched(model, before)


# ---- GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_load_to_the_gpu(file: Path):
    on_cpu = load_quantized(Toy(), file)
    on_gpu = load_quantized(Toy().cuda(), file, device="cuda")
    assert all(t.is_cuda for t in [*on_gpu.parameters(), *on_gpu.buffers()])
    moved = on_cpu.cuda()
    for name, linear in quantized_linears(on_gpu).items():
        assert all(map(torch.equal, linear.buffers(), moved.get_submodule(name).buffers())), name
    x = torch.randn(2, 7, 16, device="cuda")
    # A code at a tie may differ between devices, not between two linears on one.
    assert torch.equal(on_gpu.blocks[0].to_q(on_gpu.embed(x)), moved.blocks[0].to_q(moved.embed(x)))
