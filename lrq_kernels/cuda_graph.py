"""graph(model): the whole forward of a denoiser as one CUDA graph for each kind of input.

A step of FLUX is several hundred launches, which a slow host cannot issue as fast as the GPU runs
them. Captured, they are issued by one call.

    transformer = lrq_kernels.graph(transformer)    # the same model; pipelines need not know
    ungraph(transformer)

What a graph holds is what Python did while it was captured. Shapes, dtypes, other arguments,
activation bits, adapters and their strength, and the addresses of parameters and buffers are looked
at in every call: where something is new, another graph is captured. What else Python decides by
(the attention backend, a hook) is not: call model.forward.reset() after changing it.

Of a model whose tokens several processes share (diffusers' enable_parallelism) all of them call it
alike, and capture in the same calls: after weights were replaced each calls model.forward.reset(),
since a new tensor may be where the old one was in some processes alone. diffusers' exchange of
heads (Ulysses) is refused: on two H100 a forward of FLUX captured with it did not come back, as
others found too (sgl-project/sglang, pull request 31852: both ranks hang in the replay). That of
fused blocks did, and so did diffusers' rings.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from .input_quantizer import InputQuantizer, PreparedInput
from .linear import exchanges_tokens, has_hooks


def graph(
    model: nn.Module, *, warmup: int = 3, max_graphs: int = 8, copy_outputs: bool = True
) -> nn.Module:
    """Give `model` a forward that replays CUDA graphs; returns the model.

    warmup: calls before a capture, for kernels that are compiled or chosen when first run;
    max_graphs: kept, the one not used for longest goes first; copy_outputs: False returns the
    graph's own output, which the next call overwrites.

    Raises ValueError for a model with tensors off the GPU or moved by hooks, in the call for tensor
    arguments off the GPU and heads that diffusers exchanges among processes, and RuntimeError from
    the call where gradients are asked for.
    """
    if warmup < 1 or max_graphs < 1:
        raise ValueError(
            f"graph: warmup and max_graphs must be positive, got {warmup} and {max_graphs}"
        )
    for name, module in model.named_modules():
        if has_hooks(module):
            raise ValueError(f"graph: {name or 'the model'} is moved or cast by hooks")
    device = None
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        device = device or tensor.device
        if tensor.device.type != "cuda" or tensor.device != device:
            raise ValueError(
                f"graph: {type(model).__name__} must be on one CUDA device, {name} is on "
                f"{tensor.device}"
            )
    ungraph(model)
    device = device or torch.device("cuda", torch.cuda.current_device())
    options = Options(warmup, max_graphs, copy_outputs, device)
    model.forward = GraphedForward(model, _capture, options)
    return model


def ungraph(model: nn.Module) -> nn.Module:
    """Undo graph(); returns the model."""
    forward = model.__dict__.get("forward")
    if isinstance(forward, GraphedForward):
        forward.restore()
    return model


class Options(NamedTuple):
    warmup: int = 3
    max_graphs: int = 8
    copy_outputs: bool = True
    device: torch.device = torch.device("cuda")  # of the model and its inputs


class _RefuseAllToAll(TorchDispatchMode):
    """Raises before the exchange whose replays do not come back."""

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True  # compiled blocks run compiled under it

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops._c10d_functional.all_to_all_single.default:
            raise ValueError(
                "graph: heads must be exchanged by fused blocks (lrq_quant.fuse_blocks, not "
                f"compiled, equal parts), got {func}, whose replays hang"
            )
        return func(*args, **(kwargs or {}))


class Captured(NamedTuple):
    """inputs: the tensors that a replay reads, outputs: what it writes (any pytree); pool: of the
    memory between them."""

    inputs: list[Tensor]
    replay: Callable[[], None]
    outputs: Any
    pool: Any


def _capture(
    call: Callable[[list[Tensor]], Any], inputs: list[Tensor], warmup: int, pool: Any
) -> Captured:
    """A CUDA graph of call(inputs) on the current GPU, in the pool of another graph or None. Graphs
    of a model can share one: they run one at a time, and what they return is copied."""
    # torch's own stream for captures is of the GPU that captured first.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            call(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded, pool=pool, stream=stream):
        outputs = call(inputs)
    return Captured(inputs, recorded.replay, outputs, recorded.pool())


class GraphedForward:
    """The forward of a model; capture(call, inputs, warmup, pool) makes one to replay."""

    def __init__(
        self,
        model: nn.Module,
        capture: Callable[..., Captured],
        options: Options,
    ) -> None:
        self.model = model
        self._own = model.__dict__.get("forward")  # of an instance, as fuse_blocks makes it
        self._capture = capture
        self._options = options
        self.reset()

    def reset(self) -> None:
        """Drop every graph."""
        self._graphs: OrderedDict[Hashable, Captured] = OrderedDict()
        self._addresses: list[tuple[dict[str, Any], str, int]] = []
        self._modules: list[tuple[dict[str, Any], str, nn.Module | None]] = []
        self._inputs: list[PreparedInput] = []
        self._adapters: list[Any] = []

    def restore(self) -> None:
        """Give the model the forward that it had."""
        self.reset()
        if self._own is None:
            del self.model.forward
        else:
            self.model.forward = self._own

    def __deepcopy__(self, memo: dict[int, Any]) -> GraphedForward:
        """A copied model captures its own graphs."""
        twin = GraphedForward.__new__(GraphedForward)
        memo[id(self)] = twin
        twin.model = copy.deepcopy(self.model, memo)
        twin._own = copy.deepcopy(self._own, memo)
        twin._capture, twin._options = self._capture, self._options
        twin.reset()
        return twin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("graph: run the model under torch.no_grad() or inference_mode()")
        leaves, structure = tree_flatten((args, kwargs))
        signature = [self._signature(leaf) for leaf in leaves]
        if not self._addresses or not self._is_unchanged():
            self.reset()
            self._remember()
        key = (structure, *signature, *self._numbers())
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        captured = self._graphs.get(key)
        if captured is None:
            captured = self._new(key, leaves, structure, tensors)
        self._graphs.move_to_end(key)
        if tensors:
            torch._foreach_copy_(captured.inputs, tensors)
        captured.replay()
        if not self._options.copy_outputs:
            return captured.outputs
        outputs, shape = tree_flatten(captured.outputs)
        copies = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in outputs]
        return tree_unflatten(copies, shape)

    def _new(self, key: Hashable, leaves: list, structure: Any, tensors: list[Tensor]) -> Captured:
        exchanges = any(map(exchanges_tokens, self.model.modules()))

        def call(inputs: list[Tensor]) -> Any:
            given = iter(inputs)
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = tree_unflatten(filled, structure)
            run = type(self.model).forward.__get__(self.model) if self._own is None else self._own
            with _RefuseAllToAll() if exchanges else nullcontext():
                return run(*args, **kwargs)

        while len(self._graphs) >= self._options.max_graphs:
            self._graphs.popitem(last=False)
        # A pool lives as long as a graph in it.
        pool = next((captured.pool for captured in self._graphs.values()), None)
        with torch.inference_mode(False):  # a later call outside of it writes to them as well
            inputs = [tensor.clone() for tensor in tensors]
        device = self._options.device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            new = self._graphs[key] = self._capture(call, inputs, self._options.warmup, pool)
        return new

    # -- what a graph has built in

    def _signature(self, leaf: Any) -> Hashable:
        expected = self._options.device
        if not isinstance(leaf, Tensor):
            if isinstance(leaf, Hashable):
                return (type(leaf), leaf)
            raise TypeError(
                f"graph: arguments must be tensors or hashable, got a {type(leaf).__name__}"
            )
        if leaf.device != expected:
            raise ValueError(
                f"graph: tensor arguments must be on {expected}, as the model is, got {leaf.dtype} "
                f"{list(leaf.shape)} on {leaf.device}"
            )
        return (tuple(leaf.shape), leaf.dtype, leaf.device)

    def _numbers(self) -> list[Hashable]:
        """What Python computes with: activation bits, active adapters and their strength."""
        found: list[Hashable] = [shared.act_bits for shared in self._inputs]
        for module in self._adapters:
            found += map(str, (module.active_adapters, module.disable_adapters, module.merged))
            found += module.scaling.items()
        return found

    def _remember(self) -> None:
        """Addresses of all tensors, identities of all modules, and where the numbers are."""
        shared = {}
        for module in self.model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None:
                        self._addresses.append((tensors, name, tensor.data_ptr()))
            for name, child in module._modules.items():
                self._modules.append((module._modules, name, child))
            if isinstance(module, InputQuantizer):
                shared[id(module.shared)] = module.shared
            if isinstance(getattr(module, "scaling", None), dict):  # a layer of PEFT
                self._adapters.append(module)
        self._inputs = list(shared.values())

    def _is_unchanged(self) -> bool:
        for tensors, name, address in self._addresses:
            tensor = tensors.get(name)
            if tensor is None or tensor.data_ptr() != address:
                return False
        return all(modules.get(name) is child for modules, name, child in self._modules)
