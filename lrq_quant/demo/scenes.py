"""Captioned pictures of coloured shapes: grammar, held-out split, renderer.

    caption  = "a" [size] colour shape relation "a" [size] colour shape
    picture  = 32x32 RGB: two shapes, anti-aliased, on one dark background

Decisions that keep the picture a stable function of the noise (so that a quantized model draws
the same picture): centres lie on a lattice of 4 pixels, the offset across the relation is at most
one lattice step, sizes are two, the background is one colour. The two things of a caption may
share colour or shape but never both, so the relation is always checkable. A named size is the
size drawn; without a size word either is drawn.

A composition is (colour, shape, relation, colour, shape). About 15 % of them are held out of
training by a hash. "A left of B" and "B right of A" are one picture, so they fall on the same
side of the split.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from dataclasses import dataclass
from typing import NamedTuple

import torch

PICTURE_SIZE = 32
BACKGROUND = (0.12, 0.12, 0.12)
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.90, 0.14, 0.14),
    "green": (0.14, 0.78, 0.22),
    "blue": (0.14, 0.30, 0.94),
    "yellow": (0.96, 0.86, 0.14),
    "purple": (0.74, 0.18, 0.86),
    "cyan": (0.14, 0.84, 0.90),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES: dict[str, float] = {"small": 4.0, "large": 6.0}  # half the extent, in pixels
RELATIONS = ("left of", "right of", "above", "below")
HELD_OUT_PERCENT = 15

LATTICE = (8, 12, 16, 20, 24)  # centres along the relation, in pixels
CROSS_LATTICE = (12, 16, 20)  # centres across it
CROSS_OFFSET = 4  # largest difference of the two centres across the relation
MIN_GAP = 2  # pixels between the two shapes

_COLOUR_NAMES = tuple(COLOURS)
_SIZE_NAMES = tuple(SIZES)
_SUPERSAMPLES = 8
_CROSS_ARM = 1 / 3  # half-width of an arm of the cross, as a share of its half-extent


@dataclass(frozen=True)
class Thing:
    """One shape of a caption; size None means that the caption does not name it."""

    colour: str
    shape: str
    size: str | None = None

    @property
    def text(self) -> str:
        return " ".join(word for word in ("a", self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Caption:
    """`first` stands in `relation` to `second`."""

    first: Thing
    relation: str
    second: Thing

    @property
    def text(self) -> str:
        return f"{self.first.text} {self.relation} {self.second.text}"


class Composition(NamedTuple):
    """Indices into COLOURS, SHAPES and RELATIONS."""

    colour1: int
    shape1: int
    relation: int
    colour2: int
    shape2: int

    def caption(self, size1: str | None = None, size2: str | None = None) -> Caption:
        return Caption(
            Thing(_COLOUR_NAMES[self.colour1], SHAPES[self.shape1], size1),
            RELATIONS[self.relation],
            Thing(_COLOUR_NAMES[self.colour2], SHAPES[self.shape2], size2),
        )


def parse_caption(text: str) -> Caption:
    """The caption that `text` spells. Raises ValueError when the grammar does not produce it."""
    for relation in RELATIONS:
        before, found, after = text.partition(f" {relation} ")
        if found:
            caption = Caption(_parse_thing(before, text), relation, _parse_thing(after, text))
            first, second = caption.first, caption.second
            if (first.colour, first.shape) == (second.colour, second.shape):
                raise ValueError(
                    f"parse_caption: text must name two different things, got {text!r}"
                )
            return caption
    raise ValueError(f"parse_caption: text must hold one of {RELATIONS}, got {text!r}")


def _parse_thing(words: str, text: str) -> Thing:
    article, *rest = words.split() or [""]
    size = rest.pop(0) if rest and rest[0] in SIZES else None
    if article != "a" or len(rest) != 2 or rest[0] not in COLOURS or rest[1] not in SHAPES:
        raise ValueError(
            f"parse_caption: expected 'a [{'|'.join(SIZES)}] {'|'.join(COLOURS)} "
            f"{'|'.join(SHAPES)}', got {words!r} in {text!r}"
        )
    return Thing(rest[0], rest[1], size)


@functools.cache
def all_compositions() -> tuple[Composition, ...]:
    """Every composition of two things that differ in colour or shape."""
    colours, shapes = range(len(COLOURS)), range(len(SHAPES))
    product = itertools.product(colours, shapes, range(len(RELATIONS)), colours, shapes)
    return tuple(c for c in map(Composition._make, product) if c[:2] != c[3:])


def is_held_out(composition: Composition) -> bool:
    """Whether training never shows this composition. Fixed by a hash: no seed, no state."""
    caption = composition.caption()
    first, second, relation = caption.first, caption.second, caption.relation
    if relation in ("right of", "below"):  # the same picture, told from the other end
        first, second = second, first
        relation = {"right of": "left of", "below": "above"}[relation]
    key = f"{first.text}|{relation}|{second.text}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % 100 < (
        HELD_OUT_PERCENT
    )


@functools.cache
def split_compositions(held_out: bool) -> tuple[Composition, ...]:
    """The held-out compositions, or those of training."""
    return tuple(c for c in all_compositions() if is_held_out(c) == held_out)


def heldout_captions(n: int, seed: int = 0) -> list[str]:
    """`n` different captions of compositions that training never showed."""
    return _draw_captions(split_compositions(True), n, seed)


def training_captions(n: int, seed: int = 0) -> list[str]:
    """`n` different captions of training compositions, for calibration."""
    return _draw_captions(split_compositions(False), n, seed)


def _draw_captions(compositions: tuple[Composition, ...], n: int, seed: int) -> list[str]:
    words = (None, None, *_SIZE_NAMES)  # a size is named half of the time
    limit = len(compositions) * (len(_SIZE_NAMES) + 1) ** 2
    if not 0 <= n <= limit:
        raise ValueError(f"captions: n must be in 0..{limit}, got {n}")
    rng = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < n:
        for composition in rng.sample(compositions, len(compositions)):
            texts[composition.caption(rng.choice(words), rng.choice(words)).text] = None
            if len(texts) == n:
                break
    return list(texts)


def shape_coverage(
    shape: str, half_extent: float, column: float, row: float, side: int = PICTURE_SIZE
) -> torch.Tensor:
    """Share of every pixel that the shape covers, fp32 [side, side]; centre in pixels."""
    offsets = (torch.arange(side * _SUPERSAMPLES) + 0.5) / _SUPERSAMPLES
    x = ((offsets - column) / half_extent)[None, :]
    y = ((offsets - row) / half_extent)[:, None]
    box = (x.abs() <= 1) & (y.abs() <= 1)
    if shape == "circle":
        inside = x * x + y * y <= 1
    elif shape == "square":
        inside = box
    elif shape == "triangle":  # apex on top, base as wide as the box
        inside = box & (2 * x.abs() <= y + 1)
    elif shape == "cross":
        inside = box & ((x.abs() <= _CROSS_ARM) | (y.abs() <= _CROSS_ARM))
    else:
        raise ValueError(f"shape_coverage: shape must be one of {SHAPES}, got {shape!r}")
    tiles = inside.float().view(side, _SUPERSAMPLES, side, _SUPERSAMPLES)
    return tiles.mean(dim=(1, 3))


@functools.cache
def coverage_table() -> torch.Tensor:
    """Coverage of every shape at every size and place: fp32 [shape, size, row, column, H, W]."""
    planes = [
        shape_coverage(shape, half_extent, column, row)
        for shape in SHAPES
        for half_extent in SIZES.values()
        for row in LATTICE
        for column in LATTICE
    ]
    places = (len(LATTICE), len(LATTICE))
    return torch.stack(planes).view(len(SHAPES), len(SIZES), *places, PICTURE_SIZE, PICTURE_SIZE)


def layouts(relation: int, size1: int, size2: int) -> list[tuple[int, int, int, int]]:
    """Allowed (row1, column1, row2, column2), indices into LATTICE, of a relation and two sizes."""
    half_extents = tuple(SIZES.values())
    reach = half_extents[size1] + half_extents[size2] + MIN_GAP
    along = [
        (LATTICE.index(a), LATTICE.index(b)) for a in LATTICE for b in LATTICE if b - a >= reach
    ]
    across = [
        (LATTICE.index(a), LATTICE.index(b))
        for a in CROSS_LATTICE
        for b in CROSS_LATTICE
        if abs(a - b) <= CROSS_OFFSET
    ]
    name = RELATIONS[relation]
    places = []
    for (near, far), (cross1, cross2) in itertools.product(along, across):
        first, second = (near, far) if name in ("left of", "above") else (far, near)
        if name in ("left of", "right of"):
            places.append((cross1, first, cross2, second))
        else:
            places.append((first, cross1, second, cross2))
    return places


@dataclass(frozen=True)
class SceneBatch:
    """Drawn pictures and what their captions say.

    pictures fp32 [B, 3, 32, 32] in 0..1; composition int64 [B], an index into
    SceneSampler.compositions; size_words int64 [B, 2]: 0 unnamed, else 1 + index into SIZES.
    """

    pictures: torch.Tensor
    composition: torch.Tensor
    size_words: torch.Tensor


class SceneSampler:
    """Draws captioned pictures on a device, whole batches at a time, from tables made once."""

    def __init__(
        self,
        device: str | torch.device = "cpu",
        compositions: tuple[Composition, ...] | None = None,
    ) -> None:
        """`compositions`: what may be drawn; those of training by default."""
        self.device = torch.device(device)
        self.compositions = split_compositions(False) if compositions is None else compositions
        self._attributes = torch.tensor(self.compositions, device=self.device)  # [C, 5]
        self._palette = torch.tensor(tuple(COLOURS.values()), device=self.device)  # [colours, 3]
        self._background = torch.tensor(BACKGROUND, device=self.device)
        self._coverage = coverage_table().to(self.device).flatten(0, 3).flatten(1)  # [places, HW]
        sizes = range(len(SIZES))
        choices = [layouts(*key) for key in itertools.product(range(len(RELATIONS)), sizes, sizes)]
        longest = max(map(len, choices))
        padded = [rows + [rows[0]] * (longest - len(rows)) for rows in choices]
        self._layouts = torch.tensor(padded, device=self.device)  # [relation*size1*size2, n, 4]
        self._layout_counts = torch.tensor([len(rows) for rows in choices], device=self.device)

    def sample(self, batch: int, generator: torch.Generator) -> SceneBatch:
        """`batch` scenes, uniform over compositions, sizes and layouts."""

        def integers(high: int, *shape: int) -> torch.Tensor:
            return torch.randint(high, shape, generator=generator, device=self.device)

        composition = integers(len(self.compositions), batch)
        size = integers(len(SIZES), batch, 2)
        named = integers(2, batch, 2)
        relation = self._attributes[composition, 2]
        key = (relation * len(SIZES) + size[:, 0]) * len(SIZES) + size[:, 1]
        counts = self._layout_counts[key]
        draw = torch.rand(batch, generator=generator, device=self.device)
        layout = torch.minimum((draw * counts).long(), counts - 1)
        pictures = self.render(composition, size, self._layouts[key, layout])
        return SceneBatch(pictures, composition, named * (size + 1))

    def render(
        self, composition: torch.Tensor, size: torch.Tensor, layout: torch.Tensor
    ) -> torch.Tensor:
        """Pictures fp32 [B, 3, 32, 32] of composition [B], size [B, 2] and layout [B, 4]."""
        attributes = self._attributes[composition]
        colour = self._palette[attributes[:, 0::3]]  # [B, 2, 3]
        shape = attributes[:, 1::3]
        row, column = layout[:, 0::2], layout[:, 1::2]
        n = len(LATTICE)
        plane = ((shape * len(SIZES) + size) * n + row) * n + column
        coverage = self._coverage[plane]  # [B, 2, HW]
        contrast = colour - self._background  # [B, 2, 3]
        # A sum and not a matmul, which may round to TF32.
        pictures = self._background[:, None] + (contrast[..., None] * coverage[:, :, None]).sum(1)
        return pictures.unflatten(2, (PICTURE_SIZE, PICTURE_SIZE))

    def captions(self, scenes: SceneBatch) -> list[str]:
        """The caption text of every scene."""
        words = (None, *_SIZE_NAMES)
        rows = zip(scenes.composition.tolist(), scenes.size_words.tolist(), strict=True)
        return [self.compositions[c].caption(words[a], words[b]).text for c, (a, b) in rows]
