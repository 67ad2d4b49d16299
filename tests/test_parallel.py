"""Attention backends and parallelism on quantized models: what is quantized does not notice.

Activations are quantized token by token, so a sequence may be split anywhere.
"""

from __future__ import annotations

import os
import socket
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from diffusers import ContextParallelConfig, TensorParallelConfig
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from packaging.version import Version
from tiny_families import forward
from tiny_models import linears, load, quantized_folder
from torch import distributed, multiprocessing, nn
from two_devices import cpu_and_two_gpus
from ulysses_process import check_processes

from lrq_kernels import QuantScheme, cuda_graph, graph, ungraph
from lrq_kernels.linear import LRQLinear, exchanges_tokens, has_hooks
from lrq_kernels.testing import make_state, relative_error
from lrq_quant import fuse_blocks, fuse_projections, fused_blocks, ulysses, unfuse_blocks

F32 = torch.float32


def inputs(device: str = "cpu", dtype: torch.dtype = F32) -> dict[str, Any]:
    """16 picture and 8 text tokens, which two processes share evenly."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": dtype, "device": device}
    return {
        "hidden_states": torch.randn(1, 16, 16).to(**options),
        "encoder_hidden_states": torch.randn(1, 8, 64).to(**options),
        "pooled_projections": torch.randn(1, 32).to(**options),
        "timestep": torch.tensor([0.5], **options),
        "guidance": torch.tensor([3.5], **options),
        "img_ids": torch.randint(0, 3, (16, 3)).to(**options),
        "txt_ids": torch.zeros(8, 3, **options),
    }


# ---- attention backends -------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backends(
    backend: str, fused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    # set_attention_backend sets the default of all models as well.
    active = _AttentionBackendRegistry._active_backend
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", active)
    model = load("flux", quantized_folder("flux", tmp_path, F32), torch_dtype=F32)
    expected = forward(model, inputs())
    if fused:
        fuse_projections(model)
    model.set_attention_backend(backend)
    used = {m.processor._attention_backend for m in model.modules() if hasattr(m, "processor")}
    assert {getattr(b, "value", b) for b in used} == {backend}
    # Sums of attention are in another order, which turns a few codes by one.
    assert relative_error(forward(model, inputs()), expected) < 1e-2


# ---- parallelism --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", [QuantScheme(4, 8), QuantScheme(3, 4), QuantScheme(2, 8, "dual")]
)
def test_rows_do_not_depend_on_the_rows_beside_them(scheme: QuantScheme):
    linear = LRQLinear.from_state(make_state(48, 128, scheme))
    x = torch.randn(1, 37, 128, dtype=torch.bfloat16)
    whole = linear(x)
    for cut in (1, 8, 20):
        assert torch.equal(torch.cat([linear(x[:, :cut]), linear(x[:, cut:])], dim=1), whole)


def test_tensor_parallelism_is_refused(tmp_path: Path):
    """diffusers cuts weights, and says that it does not cut quantized ones."""
    model = load("flux", quantized_folder("flux", tmp_path, F32), torch_dtype=F32)
    with pytest.raises(ValueError, match="quantiz"):
        model.enable_parallelism(config=TensorParallelConfig(tp_degree=2))
    assert linears(model)


def _work(rank: int, folder: Path, port: int, device: str, fused: bool) -> None:
    """One of two processes; raises where its output is not that of a single one."""
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ["RANK"] = str(rank)
    torch.set_num_threads(1)
    distributed.init_process_group("gloo" if device == "cpu" else "nccl")
    if device == "cpu":
        torch.accelerator.device_count = lambda: 1  # diffusers divides by the number of GPUs
    else:
        device = f"cuda:{rank}"
        torch.cuda.set_device(device)
    dtype = F32 if device == "cpu" else torch.bfloat16
    model = load("flux", folder, torch_dtype=dtype).to(device)
    given = inputs(device, dtype)
    expected = forward(model, given)
    if fused:
        fuse_projections(model)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    tokens: list[int] = []
    linear: nn.Module = model.transformer_blocks[0].ff.net[2]
    hook = linear.register_forward_pre_hook(lambda _, args: tokens.append(args[0].shape[1]))
    error = relative_error(forward(model, given), expected)
    assert tokens == [8] and error < 1e-2, (tokens, error)
    hook.remove()
    fuse_blocks(model)
    assert set(fused_blocks(model).values()) == {None}
    with patch.object(
        distributed, "all_to_all_single", wraps=distributed.all_to_all_single
    ) as sent:
        for batch in (3, 1):
            outputs = forward(model, {n: repeated(n, x, batch) for n, x in given.items()})
            error = relative_error(outputs, expected.expand_as(outputs))
            assert error < 1e-2, (batch, error)
    in_each = 2 * 2 * 4  # there and back, in each of four blocks, for both batches
    if device == "cpu":
        assert sent.call_count == in_each
    else:
        assert sent.call_count == 0
        _check_memory_and_graph(model, given, outputs)
    if device == "cpu":
        # Before torch 2.12 dynamo leaves the gather of diffusers' hooks out of the graph.
        fullgraph = Version(torch.__version__) >= Version("2.12")
        fast = torch.compile(model, fullgraph=fullgraph, backend="aot_eager")
        assert torch.equal(forward(fast, given), outputs)
    unfuse_blocks(model)
    capture = cuda_graph._capture if device != "cpu" else lambda call, inputs, *_: call(inputs)
    options = cuda_graph.Options(device=torch.device(device))
    captured = cuda_graph.GraphedForward(model, capture, options)
    with torch.no_grad(), pytest.raises(ValueError, match="exchanged by fused blocks"):
        captured(**given)
    distributed.barrier()
    distributed.destroy_process_group()


def _check_memory_and_graph(model: Any, given: dict[str, Any], outputs: torch.Tensor) -> None:
    """What went through memory of the other GPU is bit for bit what NCCL brings, in a graph too."""
    from lrq_kernels import peer_memory

    other = {n: x.roll(1, 1) if n == "hidden_states" else x for n, x in given.items()}
    (peers,) = peer_memory._peers.values()
    with patch.object(peers, "obstacle", "for comparison"):
        assert torch.equal(forward(model, given), outputs)
        expected = forward(model, other)
    graph(model)
    for _ in range(3):
        assert torch.equal(forward(model, given), outputs)
        assert torch.equal(forward(model, other), expected)
    ungraph(model)


def repeated(name: str, x: Any, batch: int) -> Any:
    """An argument of a FLUX transformer for as many samples; ids have none."""
    return x if name.endswith("ids") else x.expand(batch, *x.shape[1:])


@pytest.mark.slow
def test_what_processes_exchange(tmp_path: Path):
    processes = 3
    file = tmp_path / str(torch.randint(1 << 30, (1,)).item())
    get_context("forkserver").set_forkserver_preload(["lrq_quant", "torch.distributed"])
    options = {"nprocs": processes, "start_method": "forkserver"}
    multiprocessing.start_processes(check_processes, (file, processes), **options)


def test_who_exchanges_heads():
    """Ours where all parts are equal, else diffusers' own."""

    def config(**options: Any) -> SimpleNamespace:
        given = {"ulysses_degree": 2, "ring_degree": 1, "ulysses_anything": False, **options}
        mesh = SimpleNamespace(get_group=lambda: "group")
        return SimpleNamespace(context_parallel_config=SimpleNamespace(**given, _ulysses_mesh=mesh))

    assert ulysses.group_of(config(), 24) == "group"
    assert ulysses.group_of(None, 24) is None
    assert ulysses.group_of(SimpleNamespace(context_parallel_config=None), 24) is None
    assert ulysses.group_of(config(), 3) is None
    for others in ({"ulysses_degree": 1}, {"ring_degree": 2}, {"ulysses_anything": True}):
        assert ulysses.group_of(config(**others), 24) is None


def test_hooks_that_exchange_do_not_move():
    class ContextParallelSplitHook: ...

    class LayerwiseCastingHook: ...

    linear = nn.Linear(2, 2)
    assert not has_hooks(linear) and not exchanges_tokens(linear)
    linear._diffusers_hook = SimpleNamespace(hooks={"cp_input---": ContextParallelSplitHook()})
    assert not has_hooks(linear) and exchanges_tokens(linear)
    linear._diffusers_hook.hooks["cast"] = LayerwiseCastingHook()
    assert has_hooks(linear) and exchanges_tokens(linear)


@pytest.mark.slow
@cpu_and_two_gpus
def test_context_parallelism(device: str, tmp_path: Path):
    """Two processes, each with half of the tokens, give what one gives."""
    folder = quantized_folder("flux", tmp_path, F32)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    method = "spawn"  # diffusers asks for the GPUs as it is imported: its forks could not use them
    if device == "cpu":  # imports once for both; "lrq_quant" imports diffusers and torch
        get_context("forkserver").set_forkserver_preload(["lrq_quant", "torch.distributed"])
        method = "forkserver"
    options = {"nprocs": 2, "start_method": method}
    multiprocessing.start_processes(_work, (folder, port, device, True), **options)


@pytest.mark.slow
def test_hooks_are_seen_in_a_compiled_graph():
    class GroupOffloadingHook: ...

    linear = LRQLinear.from_state(make_state(48, 128, QuantScheme(4, 8)))
    x = torch.randn(3, 128)
    expected = linear(x)
    linear._diffusers_hook = SimpleNamespace(hooks={"offload": GroupOffloadingHook()})
    torch._dynamo.reset()
    fast = torch.compile(linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(fast(x), expected)
