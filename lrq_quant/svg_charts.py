"""The charts of a quality report as inline SVG: points along the layers, spans, histograms.

Colours are classes of the page's style sheet, so that light and dark follow the reader; every mark
carries its layer and numbers as a <title>, which browsers show under the pointer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .layer_statistics import WeightHistogram
from .markup import Markup, tag

WIDTH, HEIGHT = 1080.0, 260.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 52.0, 12.0, 14.0, 40.0
_CHARACTER = 6.2  # pixels of a letter of an axis label
_SMALL_WIDTH, _SMALL_HEIGHT = 340.0, 150.0


@dataclass(frozen=True)
class Point:
    """y at the place of a layer; kind: the style sheet's class of the mark; shape: circle, square,
    diamond or triangle; mark: a number written beside it."""

    place: int
    y: float
    kind: str
    title: str
    shape: str = "circle"
    mark: str = ""


@dataclass(frozen=True)
class Span:
    """Least, first quartile, median, third quartile and greatest of a layer, and one value more
    (dot), drawn over its place."""

    place: int
    values: tuple[float, ...]
    dot: float | None
    kind: str
    title: str
    shape: str = "circle"


@dataclass(frozen=True)
class Axis:
    """Values of y from low to high onto pixels, logarithmic or not, with ticks."""

    low: float
    high: float
    log: bool
    unit: str

    @staticmethod
    def over(
        values: Sequence[float], unit: str, *, log: bool = False, most: float = math.inf
    ) -> Axis:
        """One that all values up to `most` fit on: finite ones, of a logarithmic axis positive."""
        fit = [min(v, most) for v in values if math.isfinite(v) and (v > 0 or not log)]
        low, high = (min(fit), max(fit)) if fit else (1.0, 10.0)
        if log:
            # Six decades: one dead channel must not press all others together.
            low = max(low, high * 1e-6)
            return Axis(low / 1.3, high * 1.3, True, unit)
        margin = max(0.5, 0.08 * (high - low))
        return Axis(low - margin, high + margin, False, unit)

    def pixel(self, value: float) -> float:
        """Vertical place; what lies beyond the axis is drawn at its end."""
        value = min(max(value, self.low), self.high)
        scale: Callable[[float], float] = math.log if self.log else float
        share = (scale(value) - scale(self.low)) / (scale(self.high) - scale(self.low))
        return HEIGHT - _BOTTOM - share * (HEIGHT - _TOP - _BOTTOM)

    def ticks(self) -> list[float]:
        if not self.log:
            return _round_steps(self.low, self.high, 5)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if len(decades) <= 4 else (1,)
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        return [tick for tick in ticks if self.low <= tick <= self.high]


def points_chart(names: Sequence[str], points: Sequence[Point], axis: Axis) -> Markup:
    """Marks over the layers in the model's order; names: one a place, for the blocks below."""
    marks, size = [], _mark_size(len(names))
    for point in points:
        x, y = _place(point.place, len(names)), axis.pixel(point.y)
        marks.append(_mark(x, y, point.shape, f"mark {point.kind}", point.title, size))
        if point.mark:
            marks.append(tag("text", point.mark, class_="rank", x=x + 6, y=y + 4))
    return _frame(names, axis, marks)


def spans_chart(names: Sequence[str], spans: Sequence[Span], axis: Axis) -> Markup:
    """A line from least to greatest, a thick one between the quartiles, a stroke at the median and
    a mark at dot, over each layer."""
    marks, size = [], _mark_size(len(names))
    for span in spans:
        x = _place(span.place, len(names))
        ys = [axis.pixel(value) for value in span.values]
        parts: list[Markup | None] = [
            tag("title", span.title),
            tag("line", x1=x, x2=x, y1=ys[0], y2=ys[4], class_="whisker"),
            tag("line", x1=x, x2=x, y1=ys[1], y2=ys[3], stroke_width=4 * size),
            tag("line", x1=x - 4 * size, x2=x + 4 * size, y1=ys[2], y2=ys[2], class_="whisker"),
        ]
        if span.dot is not None:
            parts.append(_mark(x, axis.pixel(span.dot), span.shape, "mark", "", size))
        marks.append(tag("g", *parts, class_=f"span {span.kind}"))
    return _frame(names, axis, marks)


def histogram_chart(histogram: WeightHistogram) -> Markup:
    """Bars of the share of weights in each bin; the median level of each code as a line and, where
    rows differ, the range between its quartiles behind it."""
    width, floor = _SMALL_WIDTH, _SMALL_HEIGHT - 20
    bins, most = len(histogram.counts), max(1, *histogram.counts)

    def x_of(value: float) -> float:
        return (value - histogram.low) / (histogram.high - histogram.low) * width

    parts: list[Markup] = []
    for low, high in zip(histogram.levels_low, histogram.levels_high, strict=True):
        if high > low:
            at, wide = x_of(low), x_of(high) - x_of(low)
            parts.append(tag("rect", class_="level-range", x=at, y=6, width=wide, height=floor - 6))
    step = width / bins
    for index, count in enumerate(histogram.counts):
        height = count / most * (floor - 10)
        edge = histogram.low + index * (histogram.high - histogram.low) / bins
        title = tag("title", f"from {edge:g}: {count} of {histogram.weights} weights")
        place = {"x": index * step, "y": floor - height, "width": step - 0.6, "height": height}
        parts.append(tag("rect", title, class_="bar", **place))
    for level in histogram.levels:
        title, x = tag("title", f"level {level}"), x_of(level)
        parts.append(tag("line", title, class_="level", x1=x, x2=x, y1=6, y2=floor))
    parts.append(tag("line", class_="axis", x1=0, x2=width, y1=floor, y2=floor))
    for value in (-128, -64, 0, 64, 127):
        parts.append(_label(str(value), x_of(value), _SMALL_HEIGHT - 5, "middle"))
    return _svg(width, _SMALL_HEIGHT, parts)


def legend(entries: Sequence[tuple[str, str, str]]) -> Markup:
    """A line of (class of the mark, shape, words)."""
    items = []
    for kind, shape, words in entries:
        mark = _mark(7, 7, shape, f"mark {kind}", "")
        items.append(
            tag("span", tag("svg", mark, width=14, height=14, class_="inline"), f" {words}")
        )
    return tag("p", *items, class_="legend")


# ---- parts --------------------------------------------------------------------------------------


def _place(index: int, count: int) -> float:
    return _LEFT + (index + 0.5) / max(1, count) * (WIDTH - _LEFT - _RIGHT)


def _svg(width: float, height: float, parts: Sequence[Markup]) -> Markup:
    return tag("svg", *parts, viewBox=f"0 0 {width:g} {height:g}", class_="chart", role="img")


def _frame(names: Sequence[str], axis: Axis, marks: Sequence[Markup]) -> Markup:
    """Grid, tick labels, blocks of the model and the marks."""
    right, floor = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    parts = []
    for tick in axis.ticks():
        y = axis.pixel(tick)
        parts.append(tag("line", class_="grid", x1=_LEFT, x2=right, y1=y, y2=y))
        parts.append(_label(f"{tick:g}", _LEFT - 6, y + 4, "end"))
    parts.append(_label(axis.unit, 4.0, _TOP - 4))
    parts.append(tag("line", class_="axis", x1=_LEFT, x2=right, y1=floor, y2=floor))
    parts += _blocks(names)
    return _svg(WIDTH, HEIGHT, [*parts, *marks])


def _blocks(names: Sequence[str]) -> list[Markup]:
    """A line where a block of the model begins, and its number where there is room; the name of a
    list of blocks once, in a row of its own."""
    parts, floor = [], HEIGHT - _BOTTOM
    previous, free, free_name = ("", ""), -math.inf, -math.inf
    step = (WIDTH - _LEFT - _RIGHT) / max(1, len(names))
    for index, name in enumerate(names):
        block = _block_of(name)
        if block == previous:
            continue
        x = _place(index, len(names)) - step / 2
        if index:
            parts.append(tag("line", class_="grid", x1=x, x2=x, y1=_TOP, y2=floor))
        if block[1] and x >= free:
            parts.append(_label(block[1], x + 2, floor + 14))
            free = x + _CHARACTER * (len(block[1]) + 2)
        if block[0] != previous[0] and x >= free_name:
            # The last list of a model may be short.
            wide = x + _CHARACTER * len(block[0]) > WIDTH
            at, anchor = (WIDTH - 2, "end") if wide else (x + 2, None)
            parts.append(_label(block[0], at, floor + 30, anchor))
            free_name = x + _CHARACTER * (len(block[0]) + 2)
        previous = block
    return parts


def _label(text: str, x: float, y: float, anchor: str | None = None) -> Markup:
    return tag("text", text, class_="label", x=x, y=y, text_anchor=anchor)


def _block_of(name: str) -> tuple[str, str]:
    """(list, index) of the block that a layer is in: the name up to its first number."""
    parts = name.split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[:position]), part
    return parts[0], ""


def _mark_size(places: int) -> float:
    """Of marks over so many layers, 1 where there is room: those of 500 would hide each other."""
    return min(1.0, max(0.45, (WIDTH - _LEFT - _RIGHT) / max(1, places) / 8))


def _mark(x: float, y: float, shape: str, kind: str, title: str, size: float = 1.0) -> Markup:
    inside = tag("title", title) if title else None
    if shape == "circle":
        return tag("circle", inside, class_=kind, cx=x, cy=y, r=3.6 * size)
    corners = {
        "square": ((-3.4, -3.4), (3.4, -3.4), (3.4, 3.4), (-3.4, 3.4)),
        "diamond": ((0.0, -4.8), (4.8, 0.0), (0.0, 4.8), (-4.8, 0.0)),
        "triangle": ((0.0, -4.6), (4.4, 3.6), (-4.4, 3.6)),
    }[shape]
    points = " ".join(f"{x + size * dx:.2f},{y + size * dy:.2f}" for dx, dy in corners)
    return tag("polygon", inside, class_=kind, points=points)


def _round_steps(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between low and high, about `count`."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [index * step for index in range(first, last + 1)]
