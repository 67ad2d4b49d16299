"""The quality report: what it keeps of a layer, the page it makes, pictures, old reports."""

from __future__ import annotations

import base64
import io
import json
import random
import re
import string
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_pipeline, tiny_pixart

from lrq_kernels import QuantScheme
from lrq_kernels.codebook import TwinLogCodebook
from lrq_quant import (
    ActivationStats,
    QuantRecipe,
    QuantReport,
    SearchOptions,
    quantize_linear,
    quantize_model,
)
from lrq_quant.__main__ import main
from lrq_quant.html_report import html_page, worst_count, worst_first
from lrq_quant.layer_statistics import BINS, RANGE, ChannelSpread, WeightHistogram
from lrq_quant.pipeline_io import (
    REPORT_FILE,
    REPORT_PAGE,
    load_report,
    load_transformer,
    quantize_pipeline,
    save_report,
)
from lrq_quant.recipe import KeptLinear
from lrq_quant.report import ComparedPicture, LinearReport
from lrq_quant.report_pictures import (
    DrawnPictures,
    PictureComparison,
    picture_seed,
    preview,
    psnr_db,
)

HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='alert(1)'>",
    "</title></style></svg><b>&amp;&lt;",
    "' onload=x \\ {} %s \x00 \ud800 ü 図",
)
VOID = {"meta", "img", "br"}
ONE_STEP = {"num_inference_steps": 1}
QUICK = SearchOptions(rotations=("hadamard",), alphas=(0.5,), sample_rows=64, weight_rows=64)


@pytest.fixture
def chance() -> random.Random:
    """Other numbers in every run, those of LRQ_TEST_SEED (conftest)."""
    return random.Random(random.getrandbits(32))


class Page(HTMLParser):
    """Checks that tags nest; keeps elements, their attributes and the text of each table row."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        assert len(attrs) == len(dict(attrs)), (tag, attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def named(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]

    def of_class(self, tag: str, kind: str) -> list[dict]:
        return [a for a in self.named(tag) if kind in (a.get("class") or "").split()]


def random_linear(chance: random.Random, name: str, *, calibrated: bool = True) -> LinearReport:
    bits = chance.choice((2, 3, 4))
    levels = tuple(sorted(chance.sample(range(-128, 128), 1 << bits)))
    counts = tuple(chance.randrange(1000) for _ in range(BINS))
    spread = tuple(sorted(chance.lognormvariate(0, 2) for _ in range(5)))
    rotation = chance.choice(("none", "hadamard512", "permuted128", "dual128"))
    return LinearReport(
        name=name,
        role="attention",
        scheme=QuantScheme(bits, chance.choice((4, 8, 16))),
        shared_input=name,
        out_features=chance.randrange(1, 5000),
        in_features=32 * chance.randrange(1, 200),
        rotation=f"{rotation} alpha=0.5",
        why=f"output NMSE {chance.random():.3g}, the least",
        alpha=0.5,
        j=chance.lognormvariate(0, 2) if calibrated else None,
        peak_ratio=chance.uniform(1, 60) if calibrated else None,
        weight_sqnr_db=chance.uniform(3, 30),
        output_sqnr_db=chance.uniform(-5, 60) if calibrated else None,
        stored_bits=chance.randrange(1, 10**8),
        candidates={"none alpha=none": chance.random()},
        histogram=WeightHistogram(-RANGE, RANGE, counts, levels, levels, levels),
        channels=ChannelSpread(spread, spread) if calibrated else None,
    )


def random_report(chance: random.Random, count: int, *, calibrated: bool = True) -> QuantReport:
    names = [f"blocks.{i // 3}.{random_word(chance)}{i % 3}" for i in range(count)]
    linears = tuple(random_linear(chance, name, calibrated=calibrated) for name in names)
    kept = (KeptLinear(f"stay.{random_word(chance)}", chance.randrange(10**6), "an embedder"),)
    return QuantReport(
        "Tiny", {"mode": "default"}, calibrated, chance.random(), 10**7, linears, kept
    )


def random_word(chance: random.Random) -> str:
    return "".join(chance.choices(string.ascii_lowercase, k=8))


def table(page: Page, head: str) -> list[list[str]]:
    """Rows below the header row that has this column."""
    start = next(i for i, row in enumerate(page.rows) if head in row)
    width = len(page.rows[start])
    rows = []
    for row in page.rows[start + 1 :]:
        if len(row) != width or row[0] == "linear":
            break
        rows.append(row)
    return rows


# ---- statistics of a layer ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", (2, 3, 4))
@pytest.mark.parametrize(
    "shape",
    [
        (37, 96),
        (1, 32),
        (3000, 512),  # more than is counted
    ],
)
def test_histogram_counts_the_weights_against_the_levels_of_the_state(
    chance: random.Random, bits: int, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    weight[0] = 0  # a row without a scale
    state = quantize_linear(weight, None, QuantScheme(bits, 8, rotation="none"), mode="paper")
    found = WeightHistogram.of(weight, state)
    assert found.weights == sum(found.counts) and len(found.counts) == BINS
    assert found.weights <= 1 << 20
    if weight.numel() <= 1 << 20:
        assert found.weights == weight.numel()
        scale = torch.where(state.weight_scale > 0, state.weight_scale, 1)
        expected = np.histogram(
            (weight / scale[:, None]).double().clamp(-RANGE, RANGE * (1 - 1e-9)).numpy(),
            bins=BINS,
            range=(-RANGE, RANGE),
        )[0]
        # Of values that rounding puts on either side of an edge.
        assert np.abs(expected - np.array(found.counts)).sum() <= 2 + weight.numel() // 1000
    else:
        assert found.weights % shape[1] == 0 and found.weights > 1 << 19
    ascending = TwinLogCodebook(state.levels, state.weight_scale).ascending()
    assert len(found.levels) == 1 << bits
    for place in range(1 << bits):
        column = ascending[:, place].tolist()
        low, middle, high = (
            levels[place] for levels in (found.levels_low, found.levels, found.levels_high)
        )
        assert low <= middle <= high and {low, middle, high} <= set(column)
        assert sum(v <= middle for v in column) >= len(column) / 2
        assert sum(v >= middle for v in column) >= len(column) / 2
        assert sum(v < low for v in column) <= len(column) / 4
        assert sum(v > high for v in column) <= len(column) / 4


def test_a_quantized_model_is_reported_with_its_own_weights_and_levels() -> None:
    model = tiny_pixart()
    quantized = quantize_model(model, QuantRecipe.from_name("w3a8"))
    for linear in quantized.report.linears:
        state, found = quantized.states[linear.name], linear.histogram
        weight = state.rotation.apply(model.get_submodule(linear.name).weight.detach().float())
        assert found == WeightHistogram.of(weight, state)
        assert found.weights == linear.weights and linear.channels is None
        # The first levels on either side of zero are those of the first codes.
        half = len(found.levels) // 2
        assert found.levels[half - 1] < 0 <= found.levels[half]
        assert found.levels[half] == sorted(state.levels[:, 0].tolist())[(len(weight) - 1) // 2]


def test_channels_are_those_of_the_statistics(chance: random.Random) -> None:
    width = 4 * chance.randrange(8, 40) + 1  # quartiles fall on channels
    stats = ActivationStats("x", width)
    tokens = torch.randn(50, width) * torch.logspace(-3, 3, width)
    stats.update(tokens)
    spread = ChannelSpread.of(stats)
    quarter = (width - 1) // 4
    for found, channels in (
        (spread.absmax, tokens.abs().amax(0)),
        (spread.rms, tokens.square().mean(0).sqrt()),
    ):
        assert found == pytest.approx(channels.sort().values[::quarter].tolist(), rel=1e-5)
    assert ChannelSpread.from_dict(json.loads(json.dumps(spread.__dict__))) == spread


def test_reports_survive_json_and_older_ones_are_read(chance: random.Random) -> None:
    report = replace(
        random_report(chance, 7),
        pictures=(ComparedPicture("a prompt", 7, 31.5), ComparedPicture("equal", 8, float("inf"))),
    )
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert QuantReport.from_dict(values) == report
    old = json.loads(json.dumps(report.to_dict()))
    del old["pictures"]
    for linear in old["linears"]:
        del linear["histogram"], linear["channels"]
    read = QuantReport.from_dict(old)
    assert read.pictures == () and {x.histogram for x in read.linears} == {None}
    assert read.table() == report.table()
    page = Page(html_page(read))
    assert len(table(page, "output dB")) == 7 and "Weights against" not in page.text
    assert "Activation fluctuation" in page.text  # J and peak ratio were there before


# ---- the page -----------------------------------------------------------------------------------


@pytest.mark.parametrize("calibrated", (True, False))
@pytest.mark.parametrize("count", (0, 1, 2, 40))
def test_page_is_well_formed_and_shows_the_numbers_of_the_report(
    chance: random.Random, calibrated: bool, count: int
) -> None:
    report = random_report(chance, count, calibrated=calibrated)
    page = Page(html_page(report))
    rows = table(page, "output dB")
    expected = sorted(
        report.linears, key=lambda x: x.output_sqnr_db if calibrated else x.weight_sqnr_db
    )
    assert [row[1] for row in rows] == [linear.name for linear in expected]
    for number, (row, linear) in enumerate(zip(rows, expected, strict=True)):
        assert row[0] == str(number + 1) and row[2] == linear.scheme.name
        assert row[3] == f"{linear.out_features} x {linear.in_features}"
        assert row[4] == linear.rotation and row[10] == linear.why
        shown = {5: linear.j, 6: linear.peak_ratio}
        for column, value in shown.items():
            assert (
                row[column] == "-"
                if value is None
                else float(row[column]) == pytest.approx(value, rel=5e-3)
            )
        assert row[7] == f"{linear.weight_sqnr_db:.2f}"
        assert row[8] == (f"{linear.output_sqnr_db:.2f}" if calibrated else "-")
        assert row[9] == f"{linear.weight_bits:.3f}"
    assert len(page.of_class("tr", "worst")) == worst_count(count)
    for text in (f"{report.weight_bits:.3f}", f"{report.coverage:.2%}"):
        assert text in page.text
    assert ("not calibrated" in page.text) != calibrated
    assert report.kept[0].name in page.text and report.kept[0].why in page.text
    # One mark a linear, two where both weight and output were measured, and those of legends.
    drawn = [a for a in page.named("circle") if a["class"] in ("mark output", "mark bad")]
    assert len(drawn) == (count + 2 if count else 0)


def test_page_needs_nothing_from_elsewhere_and_follows_the_colours_of_the_reader(
    chance: random.Random,
) -> None:
    text = html_page(random_report(chance, 9))
    page = Page(text)
    assert {name for name, _ in page.tags}.isdisjoint({"script", "link", "iframe", "object"})
    for _, attributes in page.tags:
        assert not any(key.startswith("on") or key in ("href", "xlink:href") for key in attributes)
    assert "http" not in re.sub("http-equiv", "", text) and "url(" not in text
    assert "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text
    policy = next(a["content"] for a in page.named("meta") if "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_every_string_of_a_report_is_escaped(
    chance: random.Random, hostile: str, tmp_path: Path
) -> None:
    linears = [
        replace(
            random_linear(chance, f"{hostile}.{i}.q"),
            rotation=f"{hostile} alpha=0.5",
            why=hostile,
            candidates={hostile: 0.1},
        )
        for i in range(4)
    ]
    pictures = (ComparedPicture(hostile, 1, 30.0),)
    report = QuantReport(
        hostile,
        {"family": hostile},
        True,
        1.0,
        10,
        tuple(linears),
        (KeptLinear(hostile, 1, hostile),),
    )
    file = preview(np.zeros((4, 4, 3), np.uint8))
    drawn = DrawnPictures(pictures, (file,), (file,), (0.1, 0.2))
    harmless = Page(
        html_page(
            QuantReport.from_dict(
                json.loads(json.dumps(report.to_dict()).replace(json.dumps(hostile)[1:-1], "x"))
            ),
            replace(drawn, compared=(ComparedPicture("x", 1, 30.0),)),
        )
    )
    page = Page(html_page(report, drawn))
    # No element more and no attribute more than with a harmless string, in the same order.
    outline = [(name, sorted(attributes)) for name, attributes in page.tags]
    assert outline == [(name, sorted(attributes)) for name, attributes in harmless.tags]
    shown = hostile.replace("\0", "\ufffd").replace("\ud800", "?")
    assert shown in page.text
    assert page.named("img")[0]["alt"] == f"original: {shown}"
    save_report(report, tmp_path, drawn)  # it has an encoding
    assert shown in Page((tmp_path / REPORT_PAGE).read_text(encoding="utf-8")).text
    Page(html_page(report, None, hostile))


def test_histograms_of_the_worst_and_of_typical_layers_draw_the_levels(
    chance: random.Random,
) -> None:
    report = random_report(chance, 31)
    page = Page(html_page(report))
    ranked = worst_first(report.linears)
    chosen = ranked[:5] + ranked[14:17]
    lines = page.of_class("line", "level")
    assert len(lines) == sum(len(linear.histogram.levels) for linear in chosen)
    assert len(page.of_class("rect", "bar")) == 8 * BINS
    expected = [level for linear in chosen for level in linear.histogram.levels]
    places = [float(line["x1"]) for line in lines]
    # One scale for all of them, known from the two that are farthest apart.
    by_level = sorted(zip(expected, places, strict=True))
    (low, left), (high, right) = by_level[0], by_level[-1]
    for level, place in by_level:
        straight = left + (level - low) / (high - low) * (right - left)
        assert place == pytest.approx(straight, abs=0.02)


def test_charts_survive_extreme_numbers(chance: random.Random) -> None:
    linears = [
        replace(random_linear(chance, "a"), weight_sqnr_db=float("inf"), output_sqnr_db=None),
        replace(random_linear(chance, "b.0"), j=0.0, peak_ratio=0.0),
        replace(random_linear(chance, "b.1"), channels=ChannelSpread((0.0,) * 5, (0.0,) * 5)),
        replace(random_linear(chance, "c"), output_sqnr_db=float("-inf")),
        replace(random_linear(chance, "d"), output_sqnr_db=float("inf")),
        replace(random_linear(chance, "e"), channels=ChannelSpread((1e-30, 1, 1, 1, 1e30), ())),
    ]
    report = QuantReport("Tiny", {}, True, 1.0, 10, tuple(linears), ())
    page = Page(html_page(report))
    assert "nan" not in page.text and "inf" not in page.text
    for _, attributes in page.tags:
        for key in ("cx", "cy", "x1", "x2", "y1", "y2"):
            assert -1 <= float(attributes.get(key, 0)) <= 1100


def test_page_is_written_whole_or_not_at_all(
    chance: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = random_report(chance, 3)
    save_report(report, tmp_path)
    before = (tmp_path / REPORT_PAGE).read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_report(random_report(chance, 4), tmp_path)
    assert (tmp_path / REPORT_PAGE).read_bytes() == before


# ---- pictures -----------------------------------------------------------------------------------


def test_psnr_is_of_eight_bits(chance: random.Random) -> None:
    picture = np.random.default_rng(chance.randrange(1 << 30)).integers(5, 250, (9, 7, 3), np.uint8)
    assert psnr_db(picture, picture) == float("inf")
    assert psnr_db(picture + np.uint8(5), picture) == pytest.approx(20 * np.log10(255 / 5))
    assert psnr_db(np.zeros_like(picture), np.full_like(picture, 255)) == 0


def test_large_pictures_and_videos_are_reduced_for_the_page() -> None:
    video = np.zeros((5, 300, 1100, 3), np.uint8)
    video[2] = 200
    with Image.open(io.BytesIO(preview(video))) as image:
        assert image.size == (512, 140) and image.getpixel((3, 3)) == (200, 200, 200)


def test_pictures_of_a_quantized_pipeline(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    original = pipeline.transformer
    prompts = ["a red circle", "a blue square", "a green cross"]
    stages: list[tuple[str, int, int]] = []
    recipe = QuantRecipe.from_name("w2a4", rounding="nearest", search=QUICK)
    report = quantize_pipeline(
        pipeline,
        recipe,
        prompts,
        tmp_path / "q",
        call_options=ONE_STEP,
        progress=lambda *stage: stages.append(stage),
        pictures=2,
    )
    assert pipeline.transformer is original
    assert [s for s in stages if s[0] == "pictures"] == [("pictures", i, 4) for i in (1, 2, 3, 4)]
    assert load_report(tmp_path / "q").to_dict() == report.to_dict()
    assert [p.prompt for p in report.pictures] == prompts[:2]

    folder = tmp_path / "q" / "transformer"
    page = Page((folder / REPORT_PAGE).read_text(encoding="utf-8"))
    files = [
        base64.b64decode(a["src"].removeprefix("data:image/png;base64,")) for a in page.named("img")
    ]
    assert len(files) == 4 and all(f"{p.psnr_db:.2f} dB" in page.text for p in report.pictures)
    # They are what the original and the saved transformer draw from these seeds.
    shown = []
    for file in files:
        with Image.open(io.BytesIO(file)) as image:
            shown.append(np.asarray(image.convert("RGB")))
    twin = load_transformer(folder, dtype=original.dtype)
    for model, pictures in ((original, shown[::2]), (twin, shown[1::2])):
        pipeline.transformer = model
        for compared, picture in zip(report.pictures, pictures, strict=True):
            generator = torch.Generator().manual_seed(compared.seed)
            options = {**ONE_STEP, "output_type": "np"}
            drawn = pipeline([compared.prompt], generator=[generator], **options).images[0]
            assert np.array_equal((drawn * 255).round().astype(np.uint8), picture)
    for compared, before, after in zip(report.pictures, shown[::2], shown[1::2], strict=True):
        assert compared.seed == picture_seed(compared.prompt)
        assert compared.psnr_db == pytest.approx(psnr_db(after, before)) and compared.psnr_db < 60

    # Pictures change nothing of what is quantized, and are off unless asked for.
    pipeline.transformer = original
    plain = quantize_pipeline(pipeline, recipe, prompts, tmp_path / "plain", call_options=ONE_STEP)
    assert plain == replace(report, pictures=())
    without = Page((tmp_path / "plain" / "transformer" / REPORT_PAGE).read_text(encoding="utf-8"))
    assert not without.named("img")
    stored, other = (
        load_file(tmp_path / name / "transformer" / "diffusion_pytorch_model.safetensors")
        for name in ("q", "plain")
    )
    assert stored.keys() == other.keys() and all(torch.equal(stored[n], other[n]) for n in stored)


class Devices:
    """A pipeline whose transformers say where they are."""

    def __init__(self) -> None:
        self.transformer = self.original = Located("gpu")
        self.drawn: list[str] = []

    def __call__(self, prompt: list[str], **options: object) -> object:
        assert self.transformer.where == "gpu"
        others = [m for m in Located.made if m is not self.transformer]
        assert all(m.where == "cpu" for m in others)
        self.drawn.append(self.transformer.label)
        return type("Drawn", (), {"images": np.full((1, 4, 4, 3), 0.5)})()


class Located(torch.nn.Module):
    made: list[Located] = []

    def __init__(self, where: str, label: str = "original") -> None:
        super().__init__()
        self.where, self.label = where, label
        Located.made.append(self)

    def parameters(self, recurse: bool = True):
        return iter([type("P", (), {"device": self.where})()])

    def to(self, where: str) -> Located:
        self.where = where
        busy = [m for m in Located.made if m.where == "gpu"]
        assert len(busy) <= 1
        return self


@pytest.mark.parametrize("fails", (False, True))
def test_the_two_transformers_are_never_on_one_device(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Located, "made", [])
    pipeline = Devices()
    comparison = PictureComparison(pipeline, ["transformer"], ["a", "b"])
    comparison.draw_before()

    def load(name: str, original: Located) -> Located:
        if fails:
            pipeline.__class__ = type("Broken", (Devices,), {"__call__": None})
        return Located("cpu", "quantized")

    drawn = comparison.draw_after(load)
    assert pipeline.transformer is pipeline.original and pipeline.original.where == "gpu"
    if fails:
        assert drawn is None and "TypeError" in comparison.note
    else:
        assert pipeline.drawn == ["original"] * 2 + ["quantized"] * 2
        assert [c.psnr_db for c in drawn.compared] == [float("inf")] * 2


def test_pictures_that_fail_cost_nothing_but_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr("lrq_quant.pipeline_io.load_transformer", fail)
    pipeline = tiny_pipeline()
    recipe = QuantRecipe.from_name("w4a8", rounding="nearest", search=QUICK)
    arguments = (pipeline, recipe, ["a red circle"], tmp_path / "q")
    report = quantize_pipeline(*arguments, call_options=ONE_STEP, pictures=1)
    assert report.pictures == () and "out of <memory>" in caplog.text
    page = Page((tmp_path / "q" / "transformer" / REPORT_PAGE).read_text(encoding="utf-8"))
    assert "No pictures were compared: RuntimeError: out of <memory>" in page.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q"]
    with pytest.raises(ValueError, match="pictures must not be negative, got -1"):
        quantize_pipeline(*arguments[:3], tmp_path / "r", pictures=-1)


def test_an_offloaded_pipeline_is_left_alone(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    pipeline.transformer._hf_hook = object()
    comparison = PictureComparison(pipeline, ["transformer"], ["a red circle"])
    comparison.draw_before()
    assert "offloaded" in comparison.note
    assert comparison.draw_after(lambda name, model: pytest.fail("loaded")) is None


# ---- the command line ---------------------------------------------------------------------------


def test_command_line_writes_and_names_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green cross\n")
    model, prompts = str(tmp_path / "model"), str(tmp_path / "prompts.txt")
    common = ["--prompts", prompts, "--steps", "1", "--device", "cpu", "--mode", "paper"]
    # model_index.json names the class of this package alone, as that of the bundled model does.
    for pictures, images in (([], 4), (["--pictures", "0"], 0)):
        out = tmp_path / f"q{images}"
        assert main(["quantize", model, str(out), *common, *pictures]) == 0
        file = out / "transformer" / REPORT_PAGE
        assert str(file) in capsys.readouterr().out
        assert len(Page(file.read_text(encoding="utf-8")).named("img")) == images
    again = tmp_path / "again.html"
    assert main(["inspect", str(tmp_path / "q0"), "--html", str(again)]) == 0
    assert again.read_bytes() == file.read_bytes()
    report = json.loads((tmp_path / "q4" / "transformer" / REPORT_FILE).read_text())
    assert len(report["pictures"]) == 2
