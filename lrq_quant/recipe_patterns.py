"""Patterns on module names, as LRQConfig takes them, resolved to linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from lrq_kernels import QuantScheme


def matching(pattern: str, linears: Sequence[str], argument: str) -> list[str]:
    """The linears that `pattern` matches by their own name or by that of a module around them:
    "transformer_blocks.0" is all of that block. Raises ValueError when there is none."""
    found = [name for name in linears if matches(pattern, name)]
    if not found:
        raise ValueError(f"LRQConfig: {argument}: {pattern!r} matches no linear of the model")
    return found


def schemes_by_name(
    overrides: Mapping[str, QuantScheme | None], linears: Sequence[str]
) -> tuple[tuple[str, QuantScheme | None], ...]:
    """(name, scheme) of every linear that an override names; the first pattern wins."""
    by_name: dict[str, QuantScheme | None] = {}
    for pattern, scheme in overrides.items():
        for name in matching(pattern, linears, "overrides"):
            by_name.setdefault(name, scheme)
    return tuple(by_name.items())


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches `name` or the name of a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))
