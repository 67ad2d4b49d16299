"""What the backends of diffusers and transformers put into a model while they load it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lrq_kernels import InputQuantizer, LRQLinear
from lrq_kernels.checkpoint import FIELDS, CheckpointError, Header, LinearState
from lrq_kernels.loader import build_linears

from .pipeline import quantize_linear
from .recipe import InputGroup, LinearPlan, QuantPlan
from .rotation_search import RotationChoice, data_free_rotation


class PendingLinear(nn.Module):
    """Stands where a quantized linear goes until its tensors are read: their names and shapes, on
    the meta device, so that a loader looks them up in the checkpoint."""

    def __init__(self, name: str, header: Header) -> None:
        super().__init__()
        facts = header.layers[name]
        keys = ("out_features", "in_features", "weight_bits")
        sizes = (*(facts[key] for key in keys), facts.get("low_rank", 0))
        for field in header.fields(name):
            spec = FIELDS[field]
            empty = torch.empty(spec.shape(*sizes), dtype=spec.dtype, device="meta")
            self.register_buffer(field, empty)


def build_linears_on(
    states: Mapping[str, LinearState], dtype: torch.dtype, device: torch.device
) -> dict[str, LRQLinear]:
    """build_linears for a model that lives on `device`."""
    work = working_device(device)
    linears = build_linears({name: state.to(work) for name, state in states.items()}, dtype)
    return {name: linear.to(device) for name, linear in linears.items()}


def working_device(device: torch.device) -> torch.device:
    """Where to fit and to pack what is to live on `device`: a GPU is a hundred times faster, also
    when the model waits in host memory to be offloaded."""
    if device.type != "cuda" and torch.cuda.is_available():
        return torch.device("cuda")
    return device


def dense_linear(linear: LRQLinear) -> nn.Linear:
    """The linear that `linear` stands for, in the dtype of the model around it."""
    with torch.device("meta"):
        dense = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    dense.weight = nn.Parameter(linear.dense_weight(), requires_grad=False)
    if linear.bias is not None:
        dense.bias = nn.Parameter(linear.bias.to(linear.dtype), requires_grad=False)
    return dense


class DenseLoader:
    """Quantizes the linears of a plan one by one as their tensors are read.

    Data-free: the rotation of a group follows from its name, so its members need not meet.
    """

    def __init__(self, plan: QuantPlan, seed: int) -> None:
        self.linears: dict[str, tuple[InputGroup, LinearPlan]] = {
            linear.name: (group, linear) for group in plan.groups for linear in group.linears
        }
        self._seed = seed
        self._inputs: dict[str, tuple[RotationChoice, InputQuantizer]] = {}

    def finish(
        self,
        model: nn.Module,
        name: str,
        arrived: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Replace linear `name` once its weight, and its bias if it has one, are in `arrived`."""
        has_bias = model.get_submodule(name).bias is not None
        names = [f"{name}.weight", f"{name}.bias"] if has_bias else [f"{name}.weight"]
        if not all(n in arrived for n in names):
            return
        weight, bias = arrived.pop(names[0]), arrived.pop(names[1]) if has_bias else None
        group, linear = self.linears[name]
        if tuple(weight.shape) != (linear.out_features, linear.in_features):
            raise CheckpointError(
                f"{name}.weight must be {[linear.out_features, linear.in_features]} as in the "
                f"model, the checkpoint has {list(weight.shape)}"
            )
        work = working_device(device)
        choice, shared = self._input(group, device)
        choice = choice.to(work)
        try:
            state = quantize_linear(
                weight.to(work),
                None if bias is None else bias.to(work),
                choice.scheme(linear.scheme),
                rotation=choice.rotation,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        model.set_submodule(name, LRQLinear.from_state(state, shared, name, dtype).to(device))

    def _input(
        self, group: InputGroup, device: torch.device
    ) -> tuple[RotationChoice, InputQuantizer]:
        if group.name not in self._inputs:
            first = group.linears[0]
            choice = data_free_rotation(first.name, first.in_features, first.scheme, self._seed)
            scheme = choice.scheme(first.scheme)
            shared = InputQuantizer(first.in_features, scheme, None, choice.rotation).to(device)
            self._inputs[group.name] = (choice, shared)
        return self._inputs[group.name]
