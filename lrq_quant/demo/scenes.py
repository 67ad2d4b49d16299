"""Captioned pictures of coloured shapes: grammar, held-out split, renderer.

    caption  = thing relation thing [relation thing],   thing = "a" [size] colour shape
    picture  = square RGB: two or three shapes, anti-aliased, on one dark background

A World says which colours, shapes, sizes and places there are: DEMO is that of the bundled model,
two things in 32x32; SCENES64 is richer, up to three things in 64x64.

Decisions that keep the picture a stable function of the noise (so that a quantized model draws
the same picture): centres lie on a lattice, the offset across a relation is at most one lattice
step, sizes are two, the background is one colour. No two things of a caption share both colour and
shape, so a relation is always checkable. A named size is the size drawn; without a size word
either is drawn.

A composition is a link of two things: (colour, shape, relation, colour, shape). About 15 % of them
are held out of training by a hash. "A left of B" and "B right of A" are one picture, so they fall
on the same side of the split. A third thing hangs on the second by another link: training scenes
consist of training links, held-out captions begin with a held-out one.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

RELATIONS = ("left of", "right of", "above", "below")
HELD_OUT_PERCENT = 15


@dataclass(frozen=True)
class World:
    """What there is to draw.  Lengths are in pixels.

    palette: (name, RGB); extents: (name, half the extent of a shape of this size); lattice: centres
    along a relation, cross_lattice across it, at most cross_offset apart; min_gap between shapes;
    most_things in a picture, 2 or 3.
    """

    name: str
    picture_size: int
    palette: tuple[tuple[str, tuple[float, float, float]], ...]
    shapes: tuple[str, ...]
    extents: tuple[tuple[str, float], ...]
    lattice: tuple[int, ...]
    cross_lattice: tuple[int, ...]
    cross_offset: int
    min_gap: int = 2
    most_things: int = 2
    background: tuple[float, float, float] = (0.12, 0.12, 0.12)

    @functools.cached_property
    def colours(self) -> dict[str, tuple[float, float, float]]:
        return dict(self.palette)

    @functools.cached_property
    def sizes(self) -> dict[str, float]:
        return dict(self.extents)


_PALETTE = (
    ("red", (0.90, 0.14, 0.14)),
    ("green", (0.14, 0.78, 0.22)),
    ("blue", (0.14, 0.30, 0.94)),
    ("yellow", (0.96, 0.86, 0.14)),
    ("purple", (0.74, 0.18, 0.86)),
    ("cyan", (0.14, 0.84, 0.90)),
)
DEMO = World(
    name="demo",
    picture_size=32,
    palette=_PALETTE,
    shapes=("circle", "square", "triangle", "cross"),
    extents=(("small", 4.0), ("large", 6.0)),
    lattice=(8, 12, 16, 20, 24),
    cross_lattice=(12, 16, 20),
    cross_offset=4,
)
SCENES64 = World(
    name="scenes64",
    picture_size=64,
    palette=(*_PALETTE, ("orange", (0.98, 0.50, 0.10)), ("white", (0.95, 0.95, 0.95))),
    shapes=("circle", "square", "triangle", "cross", "diamond", "ring"),
    extents=(("small", 5.0), ("large", 7.0)),
    lattice=(12, 20, 28, 36, 44, 52),
    cross_lattice=(12, 20, 28, 36, 44, 52),
    cross_offset=8,
    most_things=3,
)
WORLDS = {world.name: world for world in (DEMO, SCENES64)}

_SUPERSAMPLES = 8
_CROSS_ARM = 1 / 3  # half-width of an arm of the cross, as a share of its half-extent
_RING_HOLE = 0.55  # radius of the hole of a ring


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
    """Thing i stands in relation i to thing i + 1; one relation less than things."""

    things: tuple[Thing, ...]
    relations: tuple[str, ...]

    @property
    def text(self) -> str:
        words = [self.things[0].text]
        for relation, thing in zip(self.relations, self.things[1:], strict=True):
            words += [relation, thing.text]
        return " ".join(words)


class Composition(NamedTuple):
    """A link of two things: indices into colours, shapes and RELATIONS."""

    colour1: int
    shape1: int
    relation: int
    colour2: int
    shape2: int


def caption_of(
    links: Sequence[Composition], sizes: Sequence[str | None], world: World = DEMO
) -> Caption:
    """The caption of one link, or of two of which the second begins where the first ends; sizes of
    the things, None where unnamed."""
    colours = tuple(world.colours)
    kinds = [links[0][:2], *(link[3:] for link in links)]
    things = tuple(
        Thing(colours[colour], world.shapes[shape], size)
        for (colour, shape), size in zip(kinds, sizes, strict=True)
    )
    return Caption(things, tuple(RELATIONS[link.relation] for link in links))


def parse_caption(text: str, world: World = DEMO) -> Caption:
    """The caption that `text` spells. Raises ValueError when the grammar does not produce it."""
    parts, relations, rest = [], [], text
    while True:
        cuts = [(rest.find(f" {r} "), r) for r in RELATIONS if f" {r} " in rest]
        if not cuts:
            break
        at, relation = min(cuts)
        parts.append(rest[:at])
        relations.append(relation)
        rest = rest[at + len(relation) + 2 :]
    parts.append(rest)
    if not 1 <= len(relations) < world.most_things:
        raise ValueError(
            f"parse_caption: text must hold 1 to {world.most_things - 1} of {RELATIONS}, "
            f"got {text!r}"
        )
    things = tuple(_parse_thing(part, text, world) for part in parts)
    if len({(thing.colour, thing.shape) for thing in things}) < len(things):
        raise ValueError(f"parse_caption: text must name different things, got {text!r}")
    return Caption(things, tuple(relations))


def _parse_thing(words: str, text: str, world: World) -> Thing:
    article, *rest = words.split() or [""]
    size = rest.pop(0) if rest and rest[0] in world.sizes else None
    known = len(rest) == 2 and rest[0] in world.colours and rest[1] in world.shapes
    if article != "a" or not known:
        raise ValueError(
            f"parse_caption: expected 'a [{'|'.join(world.sizes)}] {'|'.join(world.colours)} "
            f"{'|'.join(world.shapes)}', got {words!r} in {text!r}"
        )
    return Thing(rest[0], rest[1], size)


@functools.cache
def all_compositions(world: World = DEMO) -> tuple[Composition, ...]:
    """Every composition of two things that differ in colour or shape."""
    colours, shapes = range(len(world.colours)), range(len(world.shapes))
    product = itertools.product(colours, shapes, range(len(RELATIONS)), colours, shapes)
    return tuple(c for c in map(Composition._make, product) if c[:2] != c[3:])


def is_held_out(composition: Composition, world: World = DEMO) -> bool:
    """Whether training never shows this composition. Fixed by a hash: no seed, no state."""
    caption = caption_of([composition], (None, None), world)
    (first, second), (relation,) = caption.things, caption.relations
    if relation in ("right of", "below"):  # the same picture, told from the other end
        first, second = second, first
        relation = {"right of": "left of", "below": "above"}[relation]
    key = f"{first.text}|{relation}|{second.text}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % 100 < (
        HELD_OUT_PERCENT
    )


@functools.cache
def split_compositions(held_out: bool, world: World = DEMO) -> tuple[Composition, ...]:
    """The held-out compositions, or those of training."""
    return tuple(c for c in all_compositions(world) if is_held_out(c, world) == held_out)


def heldout_captions(n: int, seed: int = 0, world: World = DEMO) -> list[str]:
    """`n` different captions of compositions that training never showed."""
    return _draw_captions(split_compositions(True, world), n, seed, world)


def training_captions(n: int, seed: int = 0, world: World = DEMO) -> list[str]:
    """`n` different captions of training compositions, for calibration."""
    return _draw_captions(split_compositions(False, world), n, seed, world)


def _draw_captions(
    compositions: tuple[Composition, ...], n: int, seed: int, world: World
) -> list[str]:
    words = (None, None, *world.sizes)  # a size is named half of the time
    limit = len(compositions) * (len(world.sizes) + 1) ** 2
    if not 0 <= n <= limit:
        raise ValueError(f"captions: n must be in 0..{limit}, got {n}")
    rng = random.Random(seed)
    texts: dict[str, None] = {}
    while len(texts) < n:
        for composition in rng.sample(compositions, len(compositions)):
            links = [composition]
            if world.most_things > 2 and rng.random() < 0.5:
                links += _second_link(composition, rng, world)
            sizes = [rng.choice(words) for _ in range(len(links) + 1)]
            texts[caption_of(links, sizes, world).text] = None
            if len(texts) == n:
                break
    return list(texts)


def _second_link(first: Composition, rng: random.Random, world: World) -> list[Composition]:
    """A training link from the second thing of `first` to a third one; none after long search."""
    for _ in range(100):
        kind = rng.randrange(len(world.colours)), rng.randrange(len(world.shapes))
        link = Composition(*first[3:], rng.randrange(len(RELATIONS)), *kind)
        if kind not in (first[:2], first[3:]) and not is_held_out(link, world):
            return [link]
    return []


def shape_coverage(
    shape: str, half_extent: float, column: float, row: float, side: int
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
    elif shape == "diamond":
        inside = x.abs() + y.abs() <= 1
    elif shape == "ring":
        radius = x * x + y * y
        inside = (radius <= 1) & (radius >= _RING_HOLE**2)
    else:
        raise ValueError(f"shape_coverage: unknown shape {shape!r}")
    tiles = inside.float().view(side, _SUPERSAMPLES, side, _SUPERSAMPLES)
    return tiles.mean(dim=(1, 3))


@functools.cache
def coverage_table(world: World = DEMO) -> torch.Tensor:
    """Coverage of every shape at every size and place: fp32 [shape, size, row, column, H, W]."""
    side = world.picture_size
    planes = [
        shape_coverage(shape, half_extent, column, row, side)
        for shape in world.shapes
        for half_extent in world.sizes.values()
        for row in world.lattice
        for column in world.lattice
    ]
    n = len(world.lattice)
    return torch.stack(planes).view(len(world.shapes), len(world.sizes), n, n, side, side)


def layouts(
    relation: int, size1: int, size2: int, world: World = DEMO
) -> list[tuple[int, int, int, int]]:
    """Allowed (row1, column1, row2, column2), indices into the lattice, of a relation and two
    sizes."""
    lattice = world.lattice
    reach = _reach(size1, size2, world)
    along = [
        (lattice.index(a), lattice.index(b)) for a in lattice for b in lattice if b - a >= reach
    ]
    across = [
        (lattice.index(a), lattice.index(b))
        for a in world.cross_lattice
        for b in world.cross_lattice
        if abs(a - b) <= world.cross_offset
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


def chain_layouts(
    relations: tuple[int, int], sizes: tuple[int, int, int], world: World
) -> list[tuple[int, int, int, int, int, int]]:
    """Allowed (row, column) of three things in a chain of two relations, indices into the lattice:
    both links as in `layouts`, and the first and the third thing apart as well."""
    followers: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for row2, column2, row3, column3 in layouts(relations[1], sizes[1], sizes[2], world):
        followers.setdefault((row2, column2), []).append((row3, column3))
    reach, lattice = _reach(sizes[0], sizes[2], world), world.lattice
    return [
        (row1, column1, row2, column2, row3, column3)
        for row1, column1, row2, column2 in layouts(relations[0], sizes[0], sizes[1], world)
        for row3, column3 in followers.get((row2, column2), ())
        if max(
            abs(lattice[row1] - lattice[row3]), abs(lattice[column1] - lattice[column3])
        ) >= reach
    ]  # fmt: skip


def _reach(size1: int, size2: int, world: World) -> float:
    """Least distance of two centres along one of the axes."""
    half_extents = tuple(world.sizes.values())
    return half_extents[size1] + half_extents[size2] + world.min_gap


@dataclass(frozen=True)
class SceneBatch:
    """Drawn pictures and what their captions say.

    pictures fp32 [B, 3, H, W] in 0..1; things int64 [B, T] = colour * shapes + shape, -1 for none;
    relations int64 [B, T - 1], -1 for none; size_words int64 [B, T]: 0 unnamed, else 1 + index of
    the size.
    """

    pictures: torch.Tensor
    things: torch.Tensor
    relations: torch.Tensor
    size_words: torch.Tensor


class SceneSampler:
    """Draws captioned pictures on a device, whole batches at a time, from tables made once."""

    def __init__(
        self,
        device: str | torch.device = "cpu",
        compositions: tuple[Composition, ...] | None = None,
        world: World = DEMO,
    ) -> None:
        """`compositions`: links that may be drawn; those of training by default."""
        self.device, self.world = torch.device(device), world
        if compositions is None:
            compositions = split_compositions(False, world)
        links = torch.tensor(compositions)  # [C, 5]
        shapes = len(world.shapes)
        self._links = torch.stack(
            [links[:, 0] * shapes + links[:, 1], links[:, 2], links[:, 3] * shapes + links[:, 4]], 1
        ).to(self.device)  # [C, 3] first thing, relation, second thing
        self._palette = torch.tensor(tuple(world.colours.values()), device=self.device)
        self._background = torch.tensor(world.background, device=self.device)
        coverage = coverage_table(world).to(self.device).flatten(0, 3).flatten(1)
        # A plane of nothing at the end, for things that are not there.
        self._coverage = torch.cat([coverage, coverage.new_zeros(1, coverage.shape[1])])
        relations, sizes = range(len(RELATIONS)), range(len(world.sizes))
        self._pairs = self._padded(
            [layouts(*key, world) for key in itertools.product(relations, sizes, sizes)]
        )
        if world.most_things > 2:
            self._chains = self._padded(
                [
                    chain_layouts(key[:2], key[2:], world)
                    for key in itertools.product(relations, relations, sizes, sizes, sizes)
                ]
            )
            self._followers, self._follower_counts = self._follower_table(shapes)

    def _padded(self, choices: list[list]) -> tuple[torch.Tensor, torch.Tensor]:
        """[keys, longest, numbers] and how many of each key count."""
        longest = max(map(len, choices))
        rows = [list(c) + [c[0]] * (longest - len(c)) for c in choices]
        counts = torch.tensor([len(c) for c in choices], device=self.device)
        return torch.tensor(rows, device=self.device), counts

    def _follower_table(self, shapes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Links that begin with each thing, int64 [things, most], and how many."""
        things = len(self.world.colours) * shapes
        order = self._links[:, 0].argsort(stable=True)
        counts = torch.bincount(self._links[:, 0], minlength=things)
        start = counts.cumsum(0) - counts
        most = max(1, int(counts.max()))
        index = (start[:, None] + torch.arange(most, device=self.device)).clamp_max(len(order) - 1)
        return order[index], counts

    def sample(self, batch: int, generator: torch.Generator) -> SceneBatch:
        """`batch` scenes, uniform over links, sizes and layouts; with three things in half of them
        where the world has three."""

        def integers(high: int, *shape: int) -> torch.Tensor:
            return torch.randint(high, shape, generator=generator, device=self.device)

        def pick(table: tuple[torch.Tensor, torch.Tensor], key: torch.Tensor) -> torch.Tensor:
            rows, counts = table[0], table[1][key]
            draw = torch.rand(batch, generator=generator, device=self.device)
            return rows[key, torch.minimum((draw * counts).long(), counts - 1)]

        world, sizes = self.world, len(self.world.sizes)
        most = world.most_things
        link = self._links[integers(len(self._links), batch)]
        size, named = integers(sizes, batch, most), integers(2, batch, most)
        things, relations = link[:, 0::2], link[:, 1:2]
        pair_key = (relations[:, 0] * sizes + size[:, 0]) * sizes + size[:, 1]
        places = pick(self._pairs, pair_key)
        if most > 2:
            counts = self._follower_counts[things[:, 1]]
            draw = torch.rand(batch, generator=generator, device=self.device)
            column = torch.minimum((draw * counts).long(), (counts - 1).clamp_min(0))
            second = self._links[self._followers[things[:, 1], column]]
            chained = (integers(2, batch) == 1) & (counts > 0) & (second[:, 2] != things[:, 0])
            key = relations[:, 0] * len(RELATIONS) + second[:, 1]
            for position in range(3):
                key = key * sizes + size[:, position]
            absent = torch.full_like(things[:, :1], -1)
            chain_places = pick(self._chains, key)
            alone = torch.cat([places, absent, absent], dim=1)
            places = torch.where(chained[:, None], chain_places, alone)
            third = torch.where(chained[:, None], second[:, 1:], absent)
            relations = torch.cat([relations, third[:, :1]], dim=1)
            things = torch.cat([things, third[:, 1:]], dim=1)
        pictures = self.render(things, size, places)
        return SceneBatch(pictures, things, relations, named * (size + 1) * (things >= 0))

    def render(
        self, things: torch.Tensor, size: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor:
        """Pictures fp32 [B, 3, H, W] of things [B, T], size [B, T] and places [B, 2 T]."""
        shapes, sizes, n = (
            len(self.world.shapes), len(self.world.sizes), len(self.world.lattice),
        )  # fmt: skip
        present = things >= 0
        kind = things.clamp_min(0)
        colour = self._palette[kind // shapes]  # [B, T, 3]
        row, column = places[:, 0::2], places[:, 1::2]
        plane = ((kind % shapes * sizes + size) * n + row) * n + column
        plane = torch.where(present, plane, len(self._coverage) - 1)
        coverage = self._coverage[plane]  # [B, T, HW]
        contrast = colour - self._background  # [B, T, 3]
        # A sum and not a matmul, which may round to TF32.
        pictures = self._background[:, None] + (contrast[..., None] * coverage[:, :, None]).sum(1)
        return pictures.unflatten(2, (self.world.picture_size, self.world.picture_size))

    def captions(self, scenes: SceneBatch) -> list[str]:
        """The caption text of every scene."""
        world = self.world
        words = (None, *world.sizes)
        colours, shapes = tuple(world.colours), world.shapes
        texts = []
        for things, relations, sizes in zip(
            scenes.things.tolist(), scenes.relations.tolist(), scenes.size_words.tolist(),
            strict=True,
        ):  # fmt: skip
            named = tuple(
                Thing(colours[t // len(shapes)], shapes[t % len(shapes)], words[s])
                for t, s in zip(things, sizes, strict=True)
                if t >= 0
            )
            texts.append(Caption(named, tuple(RELATIONS[r] for r in relations if r >= 0)).text)
        return texts
