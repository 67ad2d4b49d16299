"""Permutations of inputs folded into the rows of the linears that make them, and back.

An input whose rotation starts with a permutation is gathered at run time, which keeps it from the
quickest kernels. fold_permutations(model) reorders the rows of what makes such an input instead
(codes, levels, scales and biases; lrq_kernels.row_order), wherever the model allows; input_makers
says where that is. The model computes the same, bit for bit, and is saved as it was loaded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from lrq_kernels import InputQuantizer, LRQLinear
from lrq_kernels.linear import has_hooks
from lrq_kernels.row_order import fold_permutation, order_rows, restore_order

from . import fused_flux
from .adapters import no_longer, undo_before_adapters
from .input_makers import (
    MOVES_HEADS,
    Makers,
    class_name,
    first_made,
    makers_in,
    order_of_rows,
    why_gathered,
)


class PermutedInput(NamedTuple):
    """into: the linears whose rows make the permutation, none where it is gathered; why: it is
    gathered, or what would see the channels of a folded one in an order that it does not expect."""

    into: tuple[str, ...]
    why: str | None


def fold_permutations(model: nn.Module) -> nn.Module:
    """Fold every permutation of an input that the rows of other linears can take; returns the
    model. folded_permutations() lists them, and why the rest is gathered.

    Hooks on what stands between, and hooks of offloading anywhere in the model, keep it from being
    folded: what wraps the model comes after this. Undone before an adapter is loaded."""
    places = _Places(model)
    folded_any = False
    for _, linear in places.permuted():
        site = places.site_of(linear)
        if not _is_folded(linear) and site is not None and places.obstacle(site) is None:
            for maker in site.makers:
                order_rows(maker, _row_order(site, maker))
            fold_permutation(linear.input_quantizer)
            folded_any = True
    if folded_any:
        undo_before_adapters(model, unfold_permutations)
    return model


def unfold_permutations(model: nn.Module) -> nn.Module:
    """Undo fold_permutations: every linear is again what it was, bit for bit. Raises RuntimeError,
    and changes nothing, where weights are away, moved by hooks."""
    restore_order(model)
    no_longer(model, unfold_permutations)
    return model


def folded_permutations(model: nn.Module) -> dict[str, PermutedInput]:
    """Name of each linear, the first of those that share an input, whose input is permuted in front
    of its rotation -> where that is folded, or why it is not. ("dual" permutes between its two
    factors: that is part of the rotation.)"""
    places = _Places(model)
    return {name: places.state(name, linear) for name, linear in places.permuted()}


@dataclass(frozen=True)
class _Site:
    """A module of a class that input_makers knows, and what is in it under the names there."""

    name: str
    module: nn.Module
    known: Makers
    reader: Any
    makers: tuple[Any, ...]
    between: tuple[Any, ...]

    def inside(self) -> Iterator[tuple[str, nn.Module]]:
        """All modules that the input passes, by name, from the makers to the reader."""
        names = (*self.known.makers, *self.known.between, self.known.reader)
        for name, part in zip(names, (*self.makers, *self.between, self.reader), strict=True):
            for below, module in part.named_modules():
                yield f"{name}.{below}" if below else name, module


class _Places:
    """Where in a model what input_makers describes is found."""

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self._uses = Counter(map(id, modules.values()))
        self._is_hooked = any(map(has_hooks, modules.values()))
        self._linears = {n: m for n, m in modules.items() if isinstance(m, LRQLinear)}
        self._sites: dict[int, _Site] = {}
        for name, module in modules.items():
            known = makers_in(module)
            site = None if known is None else _site(name, module, known)
            if site is not None:
                self._sites[id(_without_adapter(site.reader))] = site

    def permuted(self) -> Iterator[tuple[str, LRQLinear]]:
        """The first linear of every input with a permutation in front of its rotation."""
        seen: set[int] = set()
        for name, linear in self._linears.items():
            quantizer = linear.input_quantizer
            if _permutation(quantizer) is None or id(quantizer.shared) in seen:
                continue
            seen.add(id(quantizer.shared))
            yield name, linear

    def site_of(self, linear: LRQLinear) -> _Site | None:
        return self._sites.get(id(linear))

    def state(self, name: str, linear: LRQLinear) -> PermutedInput:
        site = self.site_of(linear)
        if not _is_folded(linear):
            why = why_gathered(name) if site is None else self.obstacle(site)
            return PermutedInput((), why or "fold_permutations was not called")
        names = tuple(
            other
            for other, maker in self._linears.items()
            if site is not None and any(_without_adapter(m) is maker for m in site.makers)
        )
        why = "it is not where it was folded" if site is None else _seen(site)
        return PermutedInput(names, why)

    def obstacle(self, site: _Site) -> str | None:
        """Why the permutation of the reader's input cannot be folded, None where it can."""
        reader, known = site.reader, site.known
        for path, linear in zip((known.reader, *known.makers), (reader, *site.makers), strict=True):
            if type(linear) is not LRQLinear:
                return f"{path} is a {type(linear).__name__}"
            if len(linear.parts) != 1 or linear.row_order is not None:
                return f"{path} is fused with others or reordered already"
            if linear.packed_weight.is_meta:
                return f"{path} has no values"
        if self._is_hooked:
            return "hooks of offloading, casting or caching are on the model"
        if known.activations and class_name(site.between[0]) not in known.activations:
            return f"its activation is a {type(site.between[0]).__name__}"
        if len(reader.input_quantizer.shared.readers) != 1:
            return "other linears read the input"
        if any(self._uses[id(linear)] != 1 for linear in (reader, *site.makers)):
            return "a linear is used in several places"
        if (seen := _replaced_forward(site) or _seen(site)) is not None:
            return seen
        rows = [maker.out_features for maker in site.makers]
        if first_made(rows, reader.in_features) is None:
            return f"its {reader.in_features} channels are not those of {', '.join(known.makers)}"
        if any(_row_order(site, maker) is None for maker in site.makers):
            return MOVES_HEADS
        return None


def _site(name: str, module: nn.Module, known: Makers) -> _Site | None:
    paths = (known.reader, *known.makers, *known.between)
    try:
        reader, *rest = (module.get_submodule(path) for path in paths)
    except AttributeError:
        return None
    makers, between = rest[: len(known.makers)], rest[len(known.makers) :]
    return _Site(name, module, known, reader, tuple(makers), tuple(between))


def _seen(site: _Site) -> str | None:
    """What sees the channels of the input on their way besides the model itself."""
    for name, module in site.inside():
        if hasattr(module, "base_layer"):
            return f"an adapter is on {name}"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has a forward hook"
    return None


def _replaced_forward(site: _Site) -> str | None:
    """What has another forward than its class; that of fuse_blocks does the same."""
    for name, module in site.inside():
        if "forward" in module.__dict__:
            return f"{name} has a forward of its own"
    forward = site.module.__dict__.get("forward")
    if forward is None or getattr(forward, "func", None) is fused_flux.single_block:
        return None
    return f"{site.name} has a forward of its own"


def _row_order(site: _Site, maker: LRQLinear) -> Tensor | None:
    permutation = _permutation(site.reader.input_quantizer)
    first = first_made([maker.out_features for maker in site.makers], site.reader.in_features)
    if permutation is None or first is None:
        return None
    return order_of_rows(permutation, first, maker.out_features)


def _permutation(quantizer: InputQuantizer) -> Tensor | None:
    """In front of the rotation."""
    return quantizer.rotation_order() if quantizer.scheme.rotation == "hadamard" else None


def _is_folded(linear: LRQLinear) -> bool:
    return linear.input_quantizer.folded_permutation is not None


def _without_adapter(module: Any) -> Any:
    return getattr(module, "base_layer", module)
