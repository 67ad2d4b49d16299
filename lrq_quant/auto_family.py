"""auto_family: the recipe of a diffusion transformer that lrq_quant.families does not know.

One forward is watched.  It shows which modules are blocks (they return a tensor of the shape of the
token stream that they are given), which linears read one and the same tensor, and which linears
read the conditioning alone: those are the modulation.  For the last, every torch function is
followed from its arguments to its result, as sets of what the result was computed from.

family_by_names is what can be said without a forward, while a checkpoint loads: the same blocks,
nothing shared, modulation by its usual names.
"""

from __future__ import annotations

import dataclasses
import logging
import re
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from .families import ATTENTION, FEED_FORWARD, MODULATION, Family, SharedInput, find_family
from .recipe import QuantRecipe, family_groups

logger = logging.getLogger(__name__)

_ATTENTION_NAMES = re.compile(r"attn|attention|(^|\.)to_(q|k|v|out)(\.|$)", re.IGNORECASE)
_MODULATION_NAMES = re.compile(r"norm|modulation|adaln|ada_ln|(^|[._])mod([._]|$)", re.IGNORECASE)
_OUTSIDE = "outside the blocks"
_UNREACHED = "not reached by the forward that was watched"


class _Seen(Exception):
    """Ends the run once the model's first forward is over."""


def auto_family(model: nn.Module, run: Callable[[], object]) -> Family:
    """The family of `model`, from its first forward while run() runs; run is stopped after it.

    run: anything that calls the model, such as lambda: pipeline("a prompt").  The model is not
    changed.  Linears of a block that the forward does not reach stay, unless a block of the same
    structure reaches them.  Raises ValueError when run() never calls the model, and when it has no
    blocks, which QuantRecipe(family=...) can still describe by hand.
    """
    blocks = find_blocks(model)
    watch = _Watch(model, blocks)
    try:
        with watch, torch.no_grad():
            run()
    except _Seen:
        pass
    finally:
        watch.remove_hooks()
    if not watch.done:
        raise ValueError(f"auto_family: run() never called the {type(model).__name__}")
    return _family(model, watch)


def with_family(recipe: QuantRecipe, model: nn.Module, run: Callable[[], object]) -> QuantRecipe:
    """The recipe, with the automatic family in it where neither it nor the registry has one."""
    if recipe.family is not None or find_family(model) is not None:
        return recipe
    family = auto_family(model, run)
    logger.info("watched %s: %d rules", family.model_class, len(family.inputs))
    return dataclasses.replace(recipe, family=family)


def find_blocks(model: nn.Module) -> tuple[str, ...]:
    """Names of the outermost modules that stand in a list and hold at least two linears."""
    blocks: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            continue
        if any(name.startswith(block + ".") for block in blocks):
            continue
        for child_name, child in module.named_children():
            if sum(isinstance(m, nn.Linear) for m in child.modules()) >= 2:
                blocks.append(f"{name}.{child_name}" if name else child_name)
    if not blocks:
        raise ValueError(
            f"auto_family: {type(model).__name__} has no list of blocks; describe it by "
            "QuantRecipe(family=Family(...))"
        )
    return tuple(blocks)


def family_by_names(model: nn.Module) -> Family:
    """Every linear of every block on its own input; modulation by its usual names.  Blocks are of
    the classes in the model's _repeated_blocks, else of those that occur more than once."""
    classes = {name: type(model.get_submodule(name)).__name__ for name in find_blocks(model)}
    repeated = set(getattr(model, "_repeated_blocks", None) or ())
    counts = Counter(classes.values())
    blocks = [n for n, c in classes.items() if (c in repeated if repeated else counts[c] > 1)]
    if not blocks:
        raise ValueError(f"auto_family: {type(model).__name__} has no repeated blocks")
    found: dict[tuple[str, ...], str] = {}
    for name, module in model.named_modules():
        block = _block_of(name, blocks)
        if isinstance(module, nn.Linear) and block is not None:
            inside = name.removeprefix(block + ".")
            modulates = _MODULATION_NAMES.search(inside) and not _ATTENTION_NAMES.search(inside)
            found[(name,)] = MODULATION if modulates else _token_role(name)
    return _described(model, found, blocks)


# ---- what one forward shows ---------------------------------------------------------------------


@dataclass
class _Read:
    """One call of a linear.  tensor: which one it read, in which version; arguments: bits of the
    block's arguments that this was computed from; conditioning: whether it was computed from
    conditioning alone."""

    tensor: tuple[int, int]
    arguments: int
    conditioning: bool


@dataclass(frozen=True)
class _Origin:
    """What a tensor was computed from.  sequence: an argument of the model that has a token axis;
    linears: bits of the linears on the way; arguments: bits of the arguments of the block
    that is running."""

    sequence: bool = False
    linears: int = 0
    arguments: int = 0

    def __or__(self, other: _Origin) -> _Origin:
        return _Origin(
            self.sequence or other.sequence,
            self.linears | other.linears,
            self.arguments | other.arguments,
        )


@dataclass
class _Table:
    """Something about tensors by identity, which does not keep them."""

    _entries: dict[int, tuple[weakref.ref, Any]] = field(default_factory=dict)

    def get(self, tensor: Tensor) -> Any:
        entry = self._entries.get(id(tensor))
        return entry[1] if entry is not None and entry[0]() is tensor else None

    def put(self, tensor: Tensor, value: Any) -> None:
        self._entries[id(tensor)] = (weakref.ref(tensor), value)


class _Watch(TorchFunctionMode):
    """Hooks on blocks and linears, and the origin of every tensor between them."""

    def __init__(self, model: nn.Module, blocks: tuple[str, ...]) -> None:
        super().__init__()
        self.done = False
        self.reads: dict[str, list[_Read]] = {}
        # Block -> for each argument of the shape of a result, whether it came from a sequence.
        self.streams: dict[str, list[bool]] = {}
        self.widths: set[int] = set()
        self.feeding = 0  # bits of the linears that arguments of blocks came from
        self._origins, self._serials, self._count = _Table(), _Table(), 0
        self._active = False
        self._block: str | None = None
        self._block_reads: list[_Read] = []
        self._arguments: list[tuple[torch.Size, bool]] = []
        linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.bits = {name: 1 << i for i, name in enumerate(linears)}
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(self._enter_model, with_kwargs=True),
            model.register_forward_hook(self._leave_model),
        ]
        for name in blocks:
            block = model.get_submodule(name)
            self._handles += [
                block.register_forward_pre_hook(self._enter_block(name), with_kwargs=True),
                block.register_forward_hook(self._leave_block(name)),
            ]
        for name, linear in linears.items():
            self._handles += [
                linear.register_forward_pre_hook(self._enter_linear(name), with_kwargs=True),
                linear.register_forward_hook(self._leave_linear(name)),
            ]

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()

    # -- from arguments to results

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._active:
            given = _tensors((args, kwargs))
            origin = _Origin()
            for tensor in given:
                origin = origin | self._origin(tensor)
            made = _tensors(result)
            name = getattr(func, "__name__", "")
            if given and (name == "__setitem__" or (name.endswith("_") and name[:2] != "__")):
                made.append(given[0])  # changed in place
            for tensor in made:
                self._origins.put(tensor, origin)
        return result

    def _origin(self, tensor: Tensor) -> _Origin:
        return self._origins.get(tensor) or _Origin()

    # -- the model

    def _enter_model(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._active = not self.done
        if not self._active:
            return
        axes = {}
        for value in (*args, *kwargs.values()):
            # Of a list, every member is a sequence: it has no batch axis.
            extra = 1 if isinstance(value, list | tuple) else 0
            axes.update({tensor: tensor.dim() + extra for tensor in _floating(value)})
        if all(count < 3 for count in axes.values()):  # tokens without a batch axis
            most = max((tensor.shape[0] for tensor in axes), default=0)
            axes = {tensor: 3 if tensor.shape[0] == most else 2 for tensor in axes}
        for tensor, count in axes.items():
            self._origins.put(tensor, _Origin(sequence=count > 2))

    def _leave_model(self, module: nn.Module, args: tuple, result: Any) -> None:
        if self._active:
            self._active, self.done = False, True
            raise _Seen

    # -- blocks

    def _enter_block(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self._active:
                return
            self._block, self._block_reads, self._arguments = name, [], []
            for tensor in _floating((args, kwargs)):
                origin = self._origin(tensor)
                self.feeding |= origin.linears
                bit = 1 << len(self._arguments)
                self._arguments.append((tensor.shape, origin.sequence))
                self._origins.put(tensor, _Origin(origin.sequence, origin.linears, bit))

        return hook

    def _leave_block(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, result: Any) -> None:
            if not self._active:
                return
            self._block = None
            made = [tensor.shape for tensor in _floating(result)]
            conditioning = 0  # bits of arguments
            for i, (shape, sequence) in enumerate(self._arguments):
                if shape in made:
                    self.streams.setdefault(name, []).append(sequence)
                    self.widths |= {shape[-1]} if sequence else set()
                elif _one_row(shape) or not sequence:
                    conditioning |= 1 << i
            for read in self._block_reads:
                read.conditioning = 0 < read.arguments == read.arguments & conditioning
            for tensor in _tensors(result):  # outside, arguments of the block mean nothing
                origin = self._origin(tensor)
                self._origins.put(tensor, _Origin(origin.sequence, origin.linears))

        return hook

    # -- linears

    def _enter_linear(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if not self._active:
                return
            x = args[0] if args else kwargs["input"]
            serial = self._serials.get(x)
            if serial is None:
                serial = self._count = self._count + 1
                self._serials.put(x, serial)
            version = 0 if x.is_inference() else x._version
            origin = self._origin(x)
            alone = _one_row(x.shape) or not origin.sequence  # of those in a block see _leave_block
            read = _Read((serial, version), origin.arguments, alone)
            self.reads.setdefault(name, []).append(read)
            if self._block is not None:
                self._block_reads.append(read)

        return hook

    def _leave_linear(self, name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, result: Tensor) -> None:
            if self._active:
                origin = self._origin(result)
                self._origins.put(result, origin | _Origin(linears=self.bits[name]))

        return hook


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _floating(tree: Any) -> list[Tensor]:
    return [tensor for tensor in _tensors(tree) if tensor.is_floating_point() and tensor.dim() > 1]


def _one_row(shape: torch.Size) -> bool:
    """[B, C], or with axes of size 1 in between."""
    return len(shape) < 2 or shape[:-1].numel() == shape[0]


# ---- what follows from it -----------------------------------------------------------------------


def _family(model: nn.Module, watch: _Watch) -> Family:
    blocks = [name for name in find_blocks(model) if name in watch.streams]
    if not blocks:
        raise ValueError(
            f"auto_family: no module of a list in {type(model).__name__} returns a tensor of the "
            "shape that it is given"
        )
    found: dict[tuple[str, ...], str] = {}
    for names in _one_tensor(model, watch, blocks):
        block = _block_of(names[0], blocks)
        alone = all(read.conditioning for read in watch.reads[names[0]])
        if block is None:
            found |= {(name,): MODULATION for name in names if _modulates(model, watch, name)}
        elif alone or not any(watch.streams[block]):  # a network over the conditioning
            found |= {(name,): MODULATION for name in names}
        else:
            roles = {_token_role(name) for name in names}
            found[names] = ATTENTION if ATTENTION in roles else FEED_FORWARD
    return _described(model, found, blocks)


def _one_tensor(model: nn.Module, watch: _Watch, blocks: list[str]) -> Iterator[tuple[str, ...]]:
    """Linears of one block that read the same tensor in every call, in the model's order."""
    groups: dict[Any, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name in watch.reads:
            tensors = tuple(read.tensor for read in watch.reads[name])
            # Linears outside of blocks, and of different blocks, stay apart: they run far apart.
            where = _block_of(name, blocks) or name
            groups.setdefault((where, tensors, module.in_features), []).append(name)
    return (tuple(names) for names in groups.values())


def _modulates(model: nn.Module, watch: _Watch, name: str) -> bool:
    """Whether a linear outside of the blocks makes shift and scale for them: it reads conditioning,
    arguments of blocks come from it, and it makes two or more vectors of the tokens' width."""
    alone = all(read.conditioning for read in watch.reads[name])
    made, width = model.get_submodule(name).out_features, max(watch.widths, default=0)
    vectors = width > 0 and made % width == 0 and made >= 2 * width
    return alone and bool(watch.feeding & watch.bits[name]) and vectors


def _token_role(name: str) -> str:
    return ATTENTION if _ATTENTION_NAMES.search(name) else FEED_FORWARD


def _block_of(name: str, blocks: tuple[str, ...] | list[str]) -> str | None:
    return next((block for block in blocks if name.startswith(block + ".")), None)


# ---- as rules -----------------------------------------------------------------------------------


def _described(model: nn.Module, found: Mapping[tuple[str, ...], str], blocks: list[str]) -> Family:
    """Rules for the groups in `found`: one for all blocks where that says the same, else one for
    each group."""
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    rules: dict[SharedInput, None] = {}
    for names, role in found.items():
        parent, members = _split(names)
        rules.setdefault(SharedInput(_any_index(parent), members, role))
    family = Family(type(model).__name__, tuple(rules), _stays(linears, blocks))
    if _says_the_same(family, linears, found):
        return family
    exact = tuple(SharedInput(*_split(names), role) for names, role in found.items())
    return Family(type(model).__name__, exact, family.stays)


def _split(names: tuple[str, ...]) -> tuple[str, tuple[str, ...]]:
    """The innermost module that holds all, and their names relative to it."""
    parts = [name.split(".") for name in names]
    depth = 0
    while len({tuple(p[: depth + 1]) for p in parts}) == 1 and depth + 1 < len(parts[0]):
        depth += 1
    return ".".join(parts[0][:depth]), tuple(".".join(p[depth:]) for p in parts)


def _any_index(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _says_the_same(
    family: Family, linears: list[str], found: Mapping[tuple[str, ...], str]
) -> bool:
    """Whether the rules give the groups that were found, and besides them only linears that
    another block has under the same name."""
    known = {name: role for names, role in found.items() for name in names}
    kinds = {_any_index(name): role for name, role in known.items()}
    groups: set[frozenset[str]] = set()
    try:
        for role, names in family_groups(family, linears):
            if any(kinds.get(_any_index(name)) != role for name in names):
                return False
            groups.add(frozenset(name for name in names if name in known))
    except ValueError:  # a linear in two of them
        return False
    return groups - {frozenset()} == {frozenset(names) for names in found}


def _stays(linears: list[str], blocks: list[str]) -> tuple[tuple[str, str], ...]:
    inside = dict.fromkeys(_any_index(block) for block in blocks)
    return (*((f"{block}.*", _UNREACHED) for block in inside), ("*", _OUTSIDE))
