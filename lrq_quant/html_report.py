"""The quality report of a quantized model as one page: no script, no network, light and dark.

html_page draws what a QuantReport holds, so that a page can be made again from lrq_report.json, all
but the pictures.
"""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Sequence
from statistics import median

from .layer_statistics import ChannelSpread
from .markup import Content, Markup, tag
from .report import ComparedPicture, LinearReport, QuantReport
from .report_pictures import DrawnPictures
from .svg_charts import (
    Axis,
    Point,
    Span,
    histogram_chart,
    legend,
    points_chart,
    spans_chart,
)

WORST, TYPICAL = 5, 3  # layers that are marked, and layers around the median, shown in detail
# dB: one nearly exact layer must not press all others together.
_ABOVE_MEDIAN = 25.0
_SHAPES = {"none": "circle", "hadamard": "square", "permuted": "diamond", "dual": "triangle"}
_ROTATIONS = {
    "none": "no rotation",
    "hadamard": "signs and block Hadamard",
    "permuted": "signs and block Hadamard behind a permutation",
    "dual": "dense pair with a permutation between",
}

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1c1f23; --soft: #5d6670; --line: #dde1e6;
  --panel: #f5f6f8; --bad: #c62828; --bad-row: #fdecea; --bar: #9db4cc; --level: #b3261e;
  --none: #5d6670; --hadamard: #1565c0; --permuted: #b26a00; --dual: #7b1fa2; --range: #f3c6c1; }
@media (prefers-color-scheme: dark) { :root { --page: #15181c; --text: #e4e7eb; --soft: #9aa4af;
  --line: #333a42; --panel: #1e2328; --bad: #ff8a80; --bad-row: #3a2022; --bar: #4d6a88;
  --level: #ff8a80; --none: #aab4be; --hadamard: #64b5f6; --permuted: #ffb74d; --dual: #ce93d8;
  --range: #5a2f2e; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 24px 20px 60px; background: var(--page);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 36px 0 6px; }
h3 { font-size: 13px; margin: 0 0 4px; font-weight: 600; overflow-wrap: anywhere; }
p { margin: 4px 0 10px; max-width: 90ch; }
h3.above { margin-top: 16px; }
.note { color: var(--soft); font-size: 13px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); gap: 10px;
  margin: 16px 0; }
.cards div { background: var(--panel); border-radius: 6px; padding: 10px 12px; }
.cards b { display: block; font-size: 19px; overflow-wrap: anywhere; }
.cards span { color: var(--soft); font-size: 12.5px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; width: 100%; }
th, td { padding: 4px 8px; text-align: left; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.name { min-width: 276px; font: 12px/1.6 ui-monospace, monospace; overflow-wrap: anywhere; }
td.why { color: var(--soft); font-size: 12px; min-width: 220px; }
tr.worst { background: var(--bad-row); }
tr.worst td.db { color: var(--bad); font-weight: 600; }
.details { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr)); gap: 16px; }
.layer { background: var(--panel); border-radius: 6px; padding: 10px 12px; }
.pictures { display: grid; grid-template-columns: repeat(auto-fill, minmax(320px, 1fr));
  gap: 16px; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; }
.pair img { width: 100%; border-radius: 4px; display: block; }
.pixelated img { image-rendering: pixelated; }
.pair span, .layer p { color: var(--soft); font-size: 12px; margin: 2px 0; }
svg.chart { display: block; width: 100%; height: auto; }
svg.inline { vertical-align: -2px; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
svg text.rank { fill: var(--bad); font-weight: 700; }
svg .grid { stroke: var(--line); } svg .axis { stroke: var(--soft); }
svg .bar { fill: var(--bar); } svg .level { stroke: var(--level); stroke-width: 1.2; }
svg .level-range { fill: var(--range); opacity: 0.55; }
svg .mark { fill: currentColor; } svg .mark.weight { fill: none; stroke: var(--soft); }
svg .output { color: var(--hadamard); } svg .bad { color: var(--bad); }
svg .none { color: var(--none); } svg .hadamard { color: var(--hadamard); }
svg .permuted { color: var(--permuted); } svg .dual { color: var(--dual); }
svg .span line { stroke: currentColor; opacity: 0.7; }
.legend { font-size: 13px; } .legend span { margin-right: 16px; white-space: nowrap; }
pre { background: var(--panel); padding: 12px; border-radius: 6px; font-size: 12px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
"""
# Nothing is fetched or run even if a name in a report were to break out of its element.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def html_page(report: QuantReport, drawn: DrawnPictures | None = None, note: str = "") -> str:
    """The whole page. drawn: the pictures of report.pictures; note: why there are none."""
    ranked = worst_first(report.linears)
    title = f"Quality report: {report.model_class}"
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Markup(_STYLE)),
    )
    body = tag(
        "body",
        tag("h1", title),
        _summary(report),
        _pictures(report, drawn, note),
        _sqnr(report, ranked),
        _fluctuation(report),
        _histograms(ranked),
        _table(ranked),
        _kept(report),
        _recipe(report),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def worst_first(linears: Sequence[LinearReport]) -> list[LinearReport]:
    """By output SQNR, or by weight SQNR where the output was not measured; lowest first."""
    return sorted(linears, key=lambda linear: linear.sqnr_db)


def worst_count(linears: int) -> int:
    """How many of so many linears are marked as the worst."""
    return min(WORST, linears // 2)


# ---- sections -----------------------------------------------------------------------------------


def _section(title: str, note: str, *content: Content) -> Markup:
    return tag(
        "section", tag("h2", title), tag("p", note, class_="note") if note else None, *content
    )


def _summary(report: QuantReport) -> Markup:
    schemes = Counter(linear.scheme.name.upper() for linear in report.linears)
    kept = sum(linear.weights for linear in report.kept)
    mode = f"{report.recipe.get('mode', '?')}, rounding {report.recipe.get('rounding', '?')}"
    cards = [
        (", ".join(schemes) or "-", ", ".join(f"{n} x {s}" for s, n in schemes.items())),
        (f"{report.weight_bits:.3f}", f"bits per weight, {report.bits_include}"),
        (
            f"{report.coverage:.2%}",
            f"of linear weights quantized: {_count(report.weights)} in {len(report.linears)} "
            f"linears; {_count(kept)} in {len(report.kept)} stay",
        ),
        (_count(report.parameters), "parameters of the whole model"),
        ("calibrated" if report.calibrated else "not calibrated", f"mode {mode}"),
    ]
    if report.linears:
        levels = [linear.sqnr_db for linear in report.linears]
        what = "output" if report.calibrated else "weight"
        cards.append(
            (f"{_db(median(levels))} dB", f"median {what} SQNR; the least is {_db(min(levels))} dB")
        )
    if report.pictures:
        psnr = [picture.psnr_db for picture in report.pictures]
        cards.append((f"{_db(median(psnr))} dB", f"median PSNR of {len(psnr)} pictures"))
    filled = [tag("div", tag("b", value), tag("span", words)) for value, words in cards]
    return tag("div", *filled, class_="cards")


def _pictures(report: QuantReport, drawn: DrawnPictures | None, note: str) -> Markup | None:
    if drawn is None:
        if not report.pictures and not note:
            return None
        lines = [tag("p", f"{p.prompt}: {_db(p.psnr_db)} dB") for p in report.pictures]
        return _section("Pictures", note or "Their PSNR; this page was made without them.", *lines)
    before, after = drawn.seconds
    words = (
        "Left the original, right the quantized model, from the same noise, for prompts that "
        "calibration saw too. PSNR is of the whole picture, 8 bits a channel; low PSNR may be "
        f"another picture that is as good. A picture took {before:.1f} s before and {after:.1f} s "
        "after quantization, the latter by whatever kernels run here."
    )
    pairs = [
        _pair(compared, images)
        for compared, *images in zip(drawn.compared, drawn.before, drawn.after, strict=True)
    ]
    return _section("Pictures", words, tag("div", *pairs, class_="pictures"))


def _pair(compared: ComparedPicture, files: Sequence[bytes]) -> Markup:
    # Width is bytes 16 to 20 of a PNG: a picture of few pixels is better not smoothed.
    small = int.from_bytes(files[0][16:20], "big") < 128
    halves = []
    for name, file in zip(("original", "quantized"), files, strict=True):
        source = f"data:image/png;base64,{base64.b64encode(file).decode()}"
        picture = tag("img", src=source, alt=f"{name}: {compared.prompt}")
        halves.append(tag("div", picture, tag("span", name)))
    words = f"{_db(compared.psnr_db)} dB, seed {compared.seed}"
    return tag(
        "div",
        tag("div", *halves, class_="pair pixelated" if small else "pair"),
        tag("h3", compared.prompt),
        tag("p", words, class_="note"),
        class_="layer",
    )


def _sqnr(report: QuantReport, ranked: Sequence[LinearReport]) -> Markup | None:
    linears = report.linears
    if not linears:
        return None
    rank = {linear.name: i + 1 for i, linear in enumerate(ranked[: worst_count(len(ranked))])}
    points = []
    for place, linear in enumerate(linears):
        title = f"{linear.name}: {_sqnr_words(linear)}"
        bad = linear.name in rank
        mark = str(rank.get(linear.name, ""))
        if linear.output_sqnr_db is None:
            kind = "bad" if bad else "output"
            points.append(Point(place, linear.weight_sqnr_db, kind, title, mark=mark))
            continue
        points.append(Point(place, linear.weight_sqnr_db, "weight", title))
        kind = "bad" if bad else "output"
        points.append(Point(place, linear.output_sqnr_db, kind, title, mark=mark))
    entries = [("bad", "circle", "the worst, by rank")]
    if any(linear.output_sqnr_db is not None for linear in linears):
        entries = [("output", "circle", "output"), ("weight", "circle", "weight"), *entries]
    else:
        entries = [("output", "circle", "weight"), *entries]
    most = median(linear.sqnr_db for linear in linears) + _ABOVE_MEDIAN
    axis = Axis.over([point.y for point in points], "dB", most=most)
    note = "Signal to quantization noise of every quantized linear in the model's order. "
    if report.calibrated:
        note += (
            "Of the output: on tokens sampled in calibration, with quantized activations. Of the "
            "weight: smoothed and rotated; error feedback gives some of it up for the output. "
        )
    else:
        note += "Of the weight, rotated; without calibration nothing is known of the output. "
    note += f"What lies more than {_ABOVE_MEDIAN:g} dB above the median is drawn at the upper edge."
    chart = points_chart([linear.name for linear in linears], points, axis)
    return _section("SQNR along the model", note, legend(entries), chart)


def _fluctuation(report: QuantReport) -> Markup | None:
    """Of every shared input, at the linear that owns it."""
    owners = [linear for linear in report.linears if linear.name == linear.shared_input]
    owners = [linear for linear in owners if linear.peak_ratio is not None]
    if not owners:
        return None
    names = [linear.name for linear in owners]
    found = {linear.rotation_kind for linear in owners}
    kinds = [*(k for k in _ROTATIONS if k in found), *sorted(found - _ROTATIONS.keys())]
    entries = [(k, _SHAPES.get(k, "circle"), f"{k}: {_ROTATIONS.get(k, k)}") for k in kinds]
    points = [
        Point(place, x.peak_ratio or 0.0, x.rotation_kind, _input_title(x), _shape(x))
        for place, x in enumerate(owners)
    ]
    peaks = [
        tag("h3", "Peak ratio: max |x| over RMS of a token, mean over tokens"),
        points_chart(names, points, Axis.over([p.y for p in points], "ratio", log=True)),
    ]
    spans = [
        Span(place, x.channels.absmax, x.j, x.rotation_kind, _input_title(x), _shape(x))
        for place, x in enumerate(owners)
        if x.channels is not None
    ]
    if spans:
        values = [v for s in spans for v in (*s.values, *([] if s.dot is None else [s.dot]))]
        words = "Max |x| of the channels: least, quartiles and greatest; the mark is J, the RMS"
        chart = spans_chart(names, spans, Axis.over(values, "|x|", log=True))
        peaks += [tag("h3", words), chart]
    note = (
        "Of the raw input that linears share, before smoothing and rotation, at its first linear; "
        "coloured by the rotation that was chosen for it."
    )
    return _section("Activation fluctuation", note, legend(entries), *peaks)


def _shape(linear: LinearReport) -> str:
    return _SHAPES.get(linear.rotation_kind, "circle")


def _input_title(linear: LinearReport) -> str:
    spread = linear.channels
    words = f"{linear.name}: {linear.rotation}; J {_figure(linear.j)}, "
    words += f"peak ratio {_figure(linear.peak_ratio)}"
    return words if spread is None else f"{words}, {_spread_words(spread)}"


def _spread_words(spread: ChannelSpread) -> str:
    low, _, middle, _, high = (_figure(value) for value in spread.absmax)
    return f"max |x| of a channel {low} to {high}, median {middle}"


def _histograms(ranked: Sequence[LinearReport]) -> Markup | None:
    worst = worst_count(len(ranked))
    first = max(worst, (len(ranked) - TYPICAL) // 2)
    parts: list[Markup] = []
    for title, chosen in (
        ("The worst", ranked[:worst]),
        ("Around the median", ranked[first : first + TYPICAL]),
    ):
        cells = [_histogram(linear) for linear in chosen if linear.histogram is not None]
        if cells:
            parts += [tag("h3", title, class_="above"), tag("div", *cells, class_="details")]
    if not parts:
        return None
    note = (
        "Smoothed and rotated weights over the scale of their row, with the twin-log levels that "
        "their codes select: a line at the median over rows, behind it the range between the "
        "quartiles of the rows. The outermost bins hold what lies beyond."
    )
    return _section("Weights against their levels", note, *parts)


def _histogram(linear: LinearReport) -> Markup | None:
    if linear.histogram is None:
        return None
    words = (
        f"{linear.scheme.name}, {linear.rotation}; {_sqnr_words(linear)}; "
        f"{linear.histogram.weights} of {linear.weights} weights"
    )
    chart = histogram_chart(linear.histogram)
    return tag("div", tag("h3", linear.name), tag("p", words), chart, class_="layer")


_COLUMNS = {
    "": "number",
    "linear": None,
    "scheme": None,
    "N x K": "number",
    "rotation": None,
    "J": "number",
    "peak ratio": "number",
    "weight dB": "number",
    "output dB": "number",
    "bits": "number",
    "why this rotation": None,
}


def _table(ranked: Sequence[LinearReport]) -> Markup:
    head = tag("tr", *(tag("th", words, class_=kind) for words, kind in _COLUMNS.items()))
    worst = worst_count(len(ranked))
    rows = [_row(index + 1, linear, index < worst) for index, linear in enumerate(ranked)]
    note = (
        "Lowest output SQNR first, weight SQNR where the output was not measured; J and peak ratio "
        "are of the raw input; bits per weight with codebook and scales, and at the first linear "
        "of an input with its smoothing and rotation."
    )
    table = tag("table", tag("thead", head), tag("tbody", *rows))
    return _section("All layers, worst first", note, tag("div", table, class_="scroll"))


def _row(rank: int, linear: LinearReport, worst: bool) -> Markup:
    errors = [f"{label}: {_figure(error)}" for label, error in linear.candidates.items()]
    tried = f"output NMSE of what was tried: {'; '.join(errors)}" if errors else None

    def number(text: str, more: str = "") -> Markup:
        return tag("td", text, class_=f"number{more}")

    measured = linear.output_sqnr_db is not None
    return tag(
        "tr",
        number(str(rank)),
        tag("td", linear.name, class_="name"),
        tag("td", linear.scheme.name),
        number(f"{linear.out_features} x {linear.in_features}"),
        tag(
            "td",
            linear.rotation,
            title=f"output NMSE of what was tried: {tried}" if tried else None,
        ),
        number(_figure(linear.j)),
        number(_figure(linear.peak_ratio)),
        number(_db(linear.weight_sqnr_db), "" if measured else " db"),
        number(_db(linear.output_sqnr_db), " db" if measured else ""),
        number(f"{linear.weight_bits:.3f}"),
        tag("td", linear.why, class_="why"),
        class_="worst" if worst else None,
    )


def _kept(report: QuantReport) -> Markup:
    if not report.kept:
        return _section("Kept dense", "No linear was.")
    columns = [tag("th", "linear"), tag("th", "weights", class_="number"), tag("th", "why")]
    rows = [
        tag(
            "tr",
            tag("td", linear.name, class_="name"),
            tag("td", f"{linear.weights}", class_="number"),
            tag("td", linear.why),
        )
        for linear in report.kept
    ]
    table = tag("table", tag("thead", tag("tr", *columns)), tag("tbody", *rows))
    return _section("Kept dense", "", tag("div", table, class_="scroll"))


def _recipe(report: QuantReport) -> Markup:
    text = json.dumps(report.recipe, indent=1, ensure_ascii=False, default=str)
    shown = tag("details", tag("summary", "as JSON"), tag("pre", text))
    return _section("Recipe", "", shown)


# ---- numbers ------------------------------------------------------------------------------------


def _db(value: float | None) -> str:
    if value is None:
        return "-"
    # Of no noise at all, and of no signal.
    return f"{value:.2f}" if math.isfinite(value) else "exact" if value > 0 else "none"


def _sqnr_words(linear: LinearReport) -> str:
    words = f"weight {_db(linear.weight_sqnr_db)} dB"
    measured = linear.output_sqnr_db is not None
    return f"{words}, output {_db(linear.output_sqnr_db)} dB" if measured else words


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:#.3g}"


def _count(value: int) -> str:
    return f"{value / 1e9:.2f} billion" if value >= 1e9 else f"{value / 1e6:.2f} M"
