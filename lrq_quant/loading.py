"""What the backends of diffusers and transformers put into a model while they load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from lrq_kernels import InputQuantizer, LRQLinear
from lrq_kernels.checkpoint import FIELDS, CheckpointError, Header, LinearState
from lrq_kernels.loader import build_linears

from .calibration import name_seed
from .low_rank import low_rank_branch
from .pipeline import quantize_linear
from .recipe import InputGroup, LinearPlan, QuantPlan, QuantRecipe
from .rotation_search import RotationChoice, data_free_rotation


class PendingLinear(nn.Module):
    """Stands where a quantized linear goes until its tensors are read: their names and shapes, on
    the meta device, so that a loader looks them up in the checkpoint."""

    def __init__(self, name: str, header: Header) -> None:
        super().__init__()
        sizes = header.facts(name).sizes
        for field in header.fields(name):
            spec = FIELDS[field]
            empty = torch.empty(spec.shape(sizes), dtype=spec.dtype, device="meta")
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

    Data-free: the rotation of a group follows from its name, so its members need not meet. For a
    low-rank branch, which is of all their weights, they wait for the last of them.

    Raises ValueError where QuantPlan.check_weights_only does.
    """

    def __init__(self, plan: QuantPlan, recipe: QuantRecipe) -> None:
        plan.check_weights_only()
        self.linears: dict[str, tuple[InputGroup, LinearPlan]] = {
            linear.name: (group, linear) for group in plan.groups for linear in group.linears
        }
        self._recipe = recipe
        self._inputs: dict[str, tuple[RotationChoice, InputQuantizer]] = {}

    def together(self, name: str) -> list[LinearPlan]:
        """The linears that are finished with linear `name`, itself included."""
        group, linear = self.linears[name]
        return list(group.linears) if self._recipe.low_rank_of(group) else [linear]

    def finish(
        self,
        model: nn.Module,
        name: str,
        arrived: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Replace linear `name`, and those that are finished with it, once the weights of all, and
        their biases where they have one, are in `arrived`."""
        members, group = self.together(name), self.linears[name][0]
        names = {member.name: _tensor_names(model, member.name) for member in members}
        if not all(n in arrived for of_member in names.values() for n in of_member):
            return
        work = working_device(device)
        weights, biases = [], []
        for member in members:
            weight, *bias = (arrived.pop(n).to(work) for n in names[member.name])
            if tuple(weight.shape) != (member.out_features, member.in_features):
                raise CheckpointError(
                    f"{member.name}.weight must be {[member.out_features, member.in_features]} as "
                    f"in the model, the checkpoint has {list(weight.shape)}"
                )
            weights.append(weight)
            biases.append(bias[0] if bias else None)
        branch, rests = None, weights
        if rank := self._recipe.low_rank_of(group):
            seed = name_seed(group.name, self._recipe.search.seed)
            try:
                branch = low_rank_branch(weights, rank, seed=seed)
            except ValueError as error:
                raise ValueError(f"{', '.join(names)}: {error}") from error
            rests = branch.rest(weights)
        choice, shared = self._input(group, device, None if branch is None else branch.down)
        choice = choice.to(work)
        for i, member in enumerate(members):
            try:
                state = quantize_linear(
                    rests[i],
                    biases[i],
                    choice.scheme(member.scheme),
                    rotation=choice.rotation,
                    shared_tables=self._recipe.shared_tables_of(member),
                )
            except ValueError as error:
                raise ValueError(f"{member.name}: {error}") from error
            if branch is not None:
                state = replace(state, low_rank_down=branch.down, low_rank_up=branch.ups[i])
            linear = LRQLinear.from_state(state, shared, member.name, dtype)
            model.set_submodule(member.name, linear.to(device))

    def _input(
        self, group: InputGroup, device: torch.device, down: Tensor | None
    ) -> tuple[RotationChoice, InputQuantizer]:
        if group.name not in self._inputs:
            first, seed = group.linears[0], self._recipe.search.seed
            choice = data_free_rotation(first.name, first.in_features, first.scheme, seed)
            scheme = choice.scheme(first.scheme)
            shared = InputQuantizer(first.in_features, scheme, None, choice.rotation, down)
            self._inputs[group.name] = (choice, shared.to(device))
        return self._inputs[group.name]


def _tensor_names(model: nn.Module, name: str) -> list[str]:
    has_bias = model.get_submodule(name).bias is not None
    return [f"{name}.weight", f"{name}.bias"] if has_bias else [f"{name}.weight"]
