"""HTML and inline SVG from nested calls; whatever is not markup already is escaped."""

from __future__ import annotations

from html import escape

_VOID = frozenset({"br", "img", "meta"})


class Markup(str):
    """Text that is HTML as it stands. Only `tag`, `join` and constants of the source make it."""


Content = str | int | None  # a str that is not Markup is escaped


def tag(name: str, /, *content: Content, **attributes: str | float | None) -> Markup:
    """An element. None among content and attributes is left out; a trailing underscore keeps an
    attribute's name off Python's (class_), other underscores become hyphens."""
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            written = _number(value) if isinstance(value, float) else str(value)
            parts.append(f'{key.rstrip("_").replace("_", "-")}="{_escaped(written)}"')
    opened = f"<{' '.join(parts)}>"
    return Markup(opened if name in _VOID else f"{opened}{join(*content)}</{name}>")


def join(*content: Content) -> Markup:
    """Content side by side."""
    return Markup(
        "".join(
            item if isinstance(item, Markup) else _escaped(str(item))
            for item in content
            if item is not None
        )
    )


def _escaped(text: str) -> str:
    # Neither NUL nor a lone surrogate can be in a page; both show as the replacement character.
    text = text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")
    return escape(text, quote=True)


def _number(value: float) -> str:
    """Coordinates to a hundredth of a pixel: what a page of 500 layers is made of."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
