"""Patterns on module names, of recipes, of LRQConfig and of the command line: one rule for all.

An fnmatch pattern stands for the linears that it names and for all within a module that it names:
"transformer_blocks.0" is all of that block, "*.ff" every feed-forward, "*.to_q" every to_q.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches `name` or the name of a module around it."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def check_patterns(patterns: Iterable[str], linears: Iterable[str], argument: str) -> None:
    """Raises ValueError for a pattern that matches no linear; argument: whose patterns they are."""
    names = list(linears)
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise ValueError(f"{argument}: pattern {pattern!r} matches no linear of the model")
