"""Before an adapter is loaded, linears that were renamed get their names back.

Loading an adapter looks for linears by name (to_q, norm1.linear) and passes over those it does not
find. What merges linears of a model registers how to undo it here.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn

logger = logging.getLogger(__name__)

_METHODS = ("load_lora_adapter", "add_adapter")
_UNDO = "_lrq_undo_before_adapters"


def undo_before_adapters(model: nn.Module, undo: Callable[[Any], Any]) -> None:
    """Have `undo(model)` called before the model loads an adapter. undo must call no_longer."""
    known = model.__dict__.setdefault(_UNDO, [])
    if undo not in known:
        known.append(undo)
    for name in _METHODS:
        if hasattr(type(model), name):
            setattr(model, name, MethodType(_UNDO_FIRST[name], model))


def no_longer(model: nn.Module, undo: Callable[[Any], Any]) -> None:
    """The opposite; nothing where it was not registered."""
    known = model.__dict__.get(_UNDO, [])
    if undo in known:
        known.remove(undo)
    if known:
        return
    for name in (*_METHODS, _UNDO):
        model.__dict__.pop(name, None)


def _undo_first(method: str) -> Any:
    """`method` of the model's class, on a model whose linears have their own names again."""

    def undo_then_call(self: Any, *args: Any, **kwargs: Any) -> Any:
        logger.warning(
            "lrq: what was fused is separate linears again, since %s addresses them by name; call "
            "lrq_quant.fuse_projections(model) or fuse_blocks(model) once the adapter is unloaded",
            method,
        )
        for undo in list(self.__dict__[_UNDO]):
            undo(self)
        return getattr(type(self), method)(self, *args, **kwargs)

    undo_then_call.__name__ = method
    return undo_then_call


_UNDO_FIRST = {name: _undo_first(name) for name in _METHODS}
