"""graph(model): one graph for each kind of call, none for a model that is not the same any more."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_lora import lora_of
from tiny_families import forward
from tiny_models import TINY, load, quantized_folder
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from two_devices import two_gpus

import lrq_kernels
from lrq_kernels import LRQLinear, QuantScheme, set_act_bits
from lrq_kernels.cuda_graph import (
    Captured,
    GraphedForward,
    Options,
    _RefuseAllToAll,
    graph,
    ungraph,
)
from lrq_kernels.testing import make_state
from lrq_quant import fuse_blocks
from lrq_quant.model_shapes import named_inputs

CPU = torch.device("cpu")


class Recorder:
    """Captures on a CPU: a replay computes again what the capture computed, on the same inputs."""

    def __init__(self) -> None:
        self.captures = 0
        self.pools: list[Any] = []

    def __call__(self, call: Callable, inputs: list[Tensor], warmup: int, pool: Any) -> Captured:
        self.captures += 1
        outputs = call(inputs)

        @torch.inference_mode()
        def replay() -> None:
            for old, new in zip(tree_leaves(outputs), tree_leaves(call(inputs)), strict=True):
                if isinstance(old, Tensor):
                    old.copy_(new)

        self.pools.append(pool)
        return Captured(inputs, replay, outputs, self.captures)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = LRQLinear.from_state(make_state(64, 128, QuantScheme(4, 8)))
        self.plain = nn.Linear(64, 64)

    def forward(self, x: Tensor, options: dict[str, Any] | None = None, twice: bool = False) -> Any:
        y = self.plain(self.linear(x))
        if options is not None:
            y = y + options["shift"]
        return {"y": y * 2 if twice else y, "note": "n", "none": None}


def recorded(model: nn.Module, **options: Any) -> tuple[nn.Module, Recorder]:
    recorder = Recorder()
    model.forward = GraphedForward(model, recorder, Options(device=CPU, **options))
    return model, recorder


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def test_one_capture_for_each_kind_of_call():
    plain = Toy()
    model, recorder = recorded(copy.deepcopy(plain))
    calls = [
        ((3,), {}),
        ((3,), {"twice": True}),
        ((4,), {}),
        ((3,), {"options": {"shift": torch.randn(64)}}),
        ((3,), {"options": {"shift": torch.randn(1)}}),
        ((3,), {"options": {"shift": 2.0}}),
        ((3,), {"options": {"shift": 3.0}}),
    ]
    for _ in range(2):
        for shape, kwargs in calls:
            x = torch.randn(*shape, 128)
            got, expected = model(x, **kwargs), plain(x, **kwargs)
            assert torch.equal(got["y"], expected["y"])
            assert (got["note"], got["none"]) == ("n", None)
    assert recorder.captures == len(calls)
    assert torch.equal(
        model(x.bfloat16().float(), **kwargs)["y"], plain(x.bfloat16().float(), **kwargs)["y"]
    )
    assert recorder.captures == len(calls)


def test_a_capture_in_inference_mode_serves_calls_outside_of_it():
    plain = Toy()
    model, recorder = recorded(copy.deepcopy(plain))
    x = torch.randn(2, 3, 128)
    with torch.inference_mode():
        model(x[0])
    assert torch.equal(model(x[1])["y"], plain(x[1])["y"])
    assert recorder.captures == 1


def test_outputs_are_copies_unless_asked_otherwise():
    model, _ = recorded(Toy())
    x = torch.randn(3, 128)
    first = model(x)["y"]
    kept = first.clone()
    model(x + 1)
    assert torch.equal(first, kept)
    model, _ = recorded(Toy(), copy_outputs=False)
    first = model(x)["y"]
    assert model(x + 1)["y"] is first


def test_the_least_recently_used_graph_is_dropped():
    model, recorder = recorded(Toy(), max_graphs=2)
    for rows in (1, 2, 1, 3, 1, 2):  # 3 drops 2, and 2 then 3
        model(torch.randn(rows, 128))
    assert recorder.captures == 4
    model.forward.reset()
    model(torch.randn(1, 128))
    assert recorder.pools == [None, 1, 1, 1, None]  # of a graph that is alive


CHANGES: dict[str, Callable[[Toy], object]] = {
    "parameter": lambda m: setattr(m.plain, "weight", nn.Parameter(torch.randn(64, 64))),
    "data": lambda m: setattr(m.plain.weight, "data", torch.randn(64, 64)),
    "buffer": lambda m: setattr(m.linear, "levels", m.linear.levels.clone()),
    "module": lambda m: setattr(m, "plain", nn.Linear(64, 64)),
    "moved": lambda m: m.to(torch.float64).to(torch.float32),  # what it leaves is kept, see below
    "bits": lambda m: set_act_bits(m, 16),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_captured_again(change: str):
    model, recorder = recorded(Toy())
    x = torch.randn(3, 128)
    model(x)
    # Alive, so that nothing new gets the address of what it replaces: a graph would then be right.
    kept = [tensor.data for tensor in (*model.parameters(), *model.buffers())]
    CHANGES[change](model)
    got = model(x)["y"]
    assert recorder.captures == 2
    assert torch.equal(got, Toy.forward(model, x)["y"])
    model(x)
    assert recorder.captures == 2
    del kept


def test_values_written_in_place_need_no_capture():
    model, recorder = recorded(Toy())
    x = torch.randn(3, 128)
    model(x)
    model.load_state_dict(Toy().state_dict())
    assert torch.equal(model(x)["y"], Toy.forward(model, x)["y"])
    assert recorder.captures == 1


def test_adapters_and_their_strength(tmp_path):
    model = load(
        "flux", quantized_folder("flux", tmp_path, torch.float32), torch_dtype=torch.float32
    )
    given = TINY["flux"][1](torch.float32)
    plain = forward(model, given)
    model, recorder = recorded(model)
    assert torch.equal(forward(model, given), plain)
    model.load_lora_adapter(lora_of(model), prefix=None, adapter_name="style")
    seen = [plain]
    for strength in (1.0, 0.3):
        model.set_adapters(["style"], [strength])
        for _ in range(2):
            got = forward(model, given)
        assert all(not torch.equal(got, other) for other in seen)
        seen.append(got)
    assert recorder.captures == 3
    model.disable_lora()
    assert torch.equal(forward(model, given), plain)


def test_copies_and_the_way_back():
    model, recorder = recorded(Toy())
    x = torch.randn(3, 128)
    expected = model(x)["y"]
    twin = copy.deepcopy(model)
    twin.plain.weight.zero_()
    assert torch.equal(model(x)["y"], expected) and recorder.captures == 1
    assert torch.equal(twin(x)["y"], twin.plain.bias.expand(3, 64)) and recorder.captures == 2
    assert ungraph(model) is model and "forward" not in model.__dict__
    assert torch.equal(model(x)["y"], expected)
    ungraph(model)


def test_the_forward_of_an_instance_is_kept():
    model = Toy()
    model.forward = own = lambda x: {"y": x + 1}
    recorded(model)
    x = torch.randn(3, 128)
    assert torch.equal(model(x)["y"], x + 1)
    ungraph(model)
    assert model.forward is own


def test_refusals():
    model = Toy()
    with pytest.raises(ValueError, match="Toy must be on one CUDA device, plain.weight is on cpu"):
        graph(model)
    with pytest.raises(ValueError, match="must be positive, got 0 and 8"):
        graph(model, warmup=0)
    model, _ = recorded(model)
    with pytest.raises(TypeError, match="tensors or hashable, got a slice|got a bytearray"):
        model(torch.randn(3, 128), options={"shift": bytearray(b"")})
    model.forward._options = Options()
    with pytest.raises(
        ValueError, match=r"must be on cuda, as the model is, got torch.float32 \[3, 128\]"
    ):
        model(torch.randn(3, 128))
    with torch.enable_grad(), pytest.raises(RuntimeError, match="under torch.no_grad"):
        model(torch.randn(3, 128))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["flux", "pixart"])
@pytest.mark.parametrize("fused", [False, True])
def test_replays_are_what_the_model_computes(kind: str, fused: bool, tmp_path):
    model = load(kind, quantized_folder(kind, tmp_path)).to("cuda")
    if fused:
        fuse_blocks(model)
    draws = []
    for _ in range(3):
        given = TINY[kind][1](torch.bfloat16)
        draws.append({n: x.cuda() if isinstance(x, Tensor) else x for n, x in given.items()})
    expected = [forward(model, given) for given in draws]
    assert lrq_kernels.graph(model) is model
    for _ in range(2):
        assert all(torch.equal(forward(model, g), e) for g, e in zip(draws, expected, strict=True))
    assert len(model.forward._graphs) == 1
    twice = {
        n: torch.cat([x, x]) if isinstance(x, Tensor) and not n.endswith("_ids") else x
        for n, x in draws[0].items()
    }
    again = forward(model, twice)
    assert torch.equal(again, forward(ungraph(model), twice))


@pytest.mark.gpu
@two_gpus
def test_another_gpu_than_the_current_one():
    for device in ("cuda:0", "cuda:1"):
        plain = Toy().to(device)
        model = lrq_kernels.graph(copy.deepcopy(plain))
        for _ in range(2):
            x = torch.randn(3, 128, device=device)
            assert torch.equal(model(x)["y"], plain(x)["y"])
    plain.plain.to("cuda:0")
    with pytest.raises(ValueError, match="Toy must be on one CUDA device"):
        lrq_kernels.graph(plain)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["flux", "pixart"])
def test_resolutions_and_other_weights(kind: str, tmp_path):
    """A graph for each resolution; weights loaded in place and weights replaced are both seen."""
    folder = quantized_folder(kind, tmp_path / "one")
    model, plain = (load(kind, folder).to("cuda") for _ in range(2))
    other = load(kind, quantized_folder(kind, tmp_path / "other")).to(
        "cuda"
    )  # other random weights
    draws = [named_inputs(f"tiny-{kind}", size=size) for size in (128, 256)]
    lrq_kernels.graph(model)

    def assert_equal(expected: nn.Module) -> None:
        for given in (*draws, *draws):
            assert torch.equal(forward(model, given), forward(expected, given))

    assert_equal(plain)
    assert len(model.forward._graphs) == 2
    model.load_state_dict(other.state_dict())
    assert_equal(other)
    for name, part in (*plain.named_children(), *plain.named_parameters(recurse=False)):
        setattr(model, name, part)
    assert_equal(plain)
    assert len(model.forward._graphs) == 2


def test_compiled_blocks_stay_compiled_where_exchanges_are_refused():
    """dynamo leaves what runs under a dispatch mode of its user alone, then and later."""

    class Block(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x + 1

    block = Block()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block.compile(fullgraph=True, backend="eager")
    x = torch.randn(2, 4)
    with _RefuseAllToAll(), torch.no_grad():
        got = block(x)
    assert torch.equal(got, 2 * x + 1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
