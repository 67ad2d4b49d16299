"""Reads shapes, colours, sizes and the relation back from a picture, without a network.

    pixel    -> how much of which palette colour it holds above the background
    region   -> connected pixels of one colour
    shape    -> the best overlap (soft IoU) with the renderer's own shapes at both sizes

A prompt is right when exactly the things of the caption are found (colour, shape, and size where
named), and its relations hold. A region more, an unclear shape or a patch of a colour outside the
palette makes it wrong. `world` is the one whose pictures are read, by default that of the demo.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lrq_quant.demo.scenes import (
    DEMO,
    Caption,
    Thing,
    World,
    parse_caption,
    shape_coverage,
)

COVERAGE_THRESHOLD = 0.5  # a pixel belongs to a thing from half coverage up
COLOUR_TOLERANCE = 0.22  # largest RGB distance to a mixture of background and one palette colour
MIN_REGION = 6  # pixels; smaller regions are specks (the smallest shape covers 32)
_TEMPLATE_MARGIN = 3  # pixels around the largest shape, half-pixel offsets included
MIN_OVERLAP = 0.70  # soft IoU; a shape half-way between the two sizes overlaps by 0.69
MIN_DISTANCE = 6.0  # pixels between two centres along the relation

_OFFSETS = (-1.0, -0.5, 0.0, 0.5, 1.0)


@dataclass(frozen=True)
class Found:
    """A thing in a picture: its centre in pixels, its pixel count, its overlap with `shape`.

    colour "unknown": outside the palette. shape and size "unknown": nothing overlaps enough.
    """

    colour: str
    shape: str
    size: str
    column: float
    row: float
    pixels: int
    overlap: float


@dataclass(frozen=True)
class Verdict:
    """Whether a picture shows its caption, why not, and all that was found in it."""

    right: bool
    reason: str
    found: tuple[Found, ...]


def find_things(
    pictures: np.ndarray | torch.Tensor | Sequence, world: World = DEMO
) -> list[list[Found]]:
    """Everything in every picture, large to small.

    pictures: uint8 or float (0..1) array [B, H, W, 3], float tensor [B, 3, H, W], or a list of PIL
    images, as large as the world's.
    """
    pixels = _to_array(pictures, world.picture_size)
    coverage, labels = _classify(pixels, world)
    regions = _connected_regions(labels)
    results: list[list[Found]] = []
    for picture_regions, picture_labels, picture_coverage in zip(
        regions, labels, coverage, strict=True
    ):
        found = []
        for region in np.unique(picture_regions[picture_regions > 0]):
            inside = picture_regions == region
            count = int(inside.sum())
            if count >= MIN_REGION:
                label = int(picture_labels[inside][0])
                found.append(_match_shape(inside, label, count, picture_coverage, world))
        results.append(sorted(found, key=lambda thing: -thing.pixels))
    return results


def check_batch(
    pictures: np.ndarray | torch.Tensor | Sequence, captions: Sequence[str], world: World = DEMO
) -> list[Verdict]:
    """A verdict for every picture and its caption."""
    found = find_things(pictures, world)
    if len(found) != len(captions):
        raise ValueError(
            f"check_batch: captions must be one a picture ({len(found)}), got {len(captions)}"
        )
    return [
        _judge(things, parse_caption(text, world))
        for things, text in zip(found, captions, strict=True)
    ]


def check(picture: np.ndarray | torch.Tensor, caption: str, world: World = DEMO) -> Verdict:
    """The verdict on one picture: [H, W, 3] array, [3, H, W] tensor or PIL image."""
    batch = picture[None] if isinstance(picture, (np.ndarray, torch.Tensor)) else [picture]
    return check_batch(batch, [caption], world)[0]


def prompt_accuracy(
    pictures: np.ndarray | torch.Tensor | Sequence, captions: Sequence[str], world: World = DEMO
) -> float:
    """Share of pictures that show their caption."""
    verdicts = check_batch(pictures, captions, world)
    return sum(verdict.right for verdict in verdicts) / max(len(verdicts), 1)


def _to_array(pictures: np.ndarray | torch.Tensor | Sequence, side: int) -> np.ndarray:
    """fp32 [B, side, side, 3] in 0..1."""
    if isinstance(pictures, torch.Tensor):
        array = pictures.detach().float().cpu().permute(0, 2, 3, 1).numpy()
    else:
        array = np.stack([np.asarray(picture) for picture in pictures])
        scale = 255.0 if array.dtype == np.uint8 else 1.0
        array = array.astype(np.float32) / scale
    if array.ndim != 4 or array.shape[1:] != (side, side, 3):
        raise ValueError(
            f"find_things: pictures must be [B, {side}, {side}, 3], got {list(array.shape)}"
        )
    return array


def _classify(pixels: np.ndarray, world: World) -> tuple[np.ndarray, np.ndarray]:
    """Coverage by every colour, fp32 [B, H, W, colours], and the label of every pixel.

    Labels int [B, H, W]: -1 background, an index into the colours, or one past them for an unknown
    colour. An anti-aliased pixel is background + coverage * (colour - background); the colour whose
    line passes closest wins.
    """
    background = np.asarray(world.background, np.float32)
    contrast = np.asarray(list(world.colours.values()), np.float32) - background  # [colours, 3]
    above = pixels - background
    coverage = (above @ contrast.T) / (contrast**2).sum(axis=1)
    coverage = coverage.clip(0, 1.0)
    distance = np.linalg.norm(above[..., None, :] - coverage[..., None] * contrast, axis=-1)
    best = distance.argmin(axis=-1)
    nearest = np.take_along_axis(distance, best[..., None], -1)[..., 0]
    covered = np.take_along_axis(coverage, best[..., None], -1)[..., 0]
    labels = np.where(covered > COVERAGE_THRESHOLD, best, -1)
    return coverage, np.where(nearest > COLOUR_TOLERANCE, len(contrast), labels)


def _connected_regions(labels: np.ndarray) -> np.ndarray:
    """Region ids int [B, H, W], 0 for background: pixels of one label that touch, corners too.

    Every pixel starts with its own id and takes the largest of its region until nothing changes.
    """
    batch, height, width = labels.shape
    ids = np.where(labels >= 0, 1 + np.arange(height * width).reshape(height, width), 0)
    padded_labels = np.pad(labels, ((0, 0), (1, 1), (1, 1)), constant_values=-1)
    shifts = [(dy, dx) for dy in (0, 1, 2) for dx in (0, 1, 2) if (dy, dx) != (1, 1)]
    touching = [
        (padded_labels[:, dy : dy + height, dx : dx + width] == labels) & (labels >= 0)
        for dy, dx in shifts
    ]
    while True:
        padded = np.pad(ids, ((0, 0), (1, 1), (1, 1)))
        grown = ids
        for (dy, dx), same in zip(shifts, touching, strict=True):
            grown = np.maximum(grown, padded[:, dy : dy + height, dx : dx + width] * same)
        if np.array_equal(grown, ids):
            return ids
        ids = grown


@functools.cache
def _templates(world: World) -> tuple[np.ndarray, list[tuple[str, str, float, float]], int]:
    """Shapes in a window, fp32 [T, W*W], the (shape, size, column, row) of each, and W."""
    keys = [
        (shape, size, dx, dy)
        for shape in world.shapes
        for size in world.sizes
        for dx in _OFFSETS
        for dy in _OFFSETS
    ]
    window = 2 * int(max(world.sizes.values()) + _TEMPLATE_MARGIN)
    middle = window / 2
    planes = [
        shape_coverage(shape, world.sizes[size], middle + dx, middle + dy, window).flatten()
        for shape, size, dx, dy in keys
    ]
    return torch.stack(planes).numpy(), keys, window


def _match_shape(
    inside: np.ndarray, label: int, count: int, coverage: np.ndarray, world: World
) -> Found:
    """Names the shape of a region: bool [H, W], its label and count; coverage [H, W, colours]."""
    templates, keys, side = _templates(world)
    rows, columns = np.nonzero(inside)
    top = round((rows.min() + rows.max() + 1) / 2) - side // 2
    left = round((columns.min() + columns.max() + 1) / 2) - side // 2
    if label == len(world.colours):
        middle = side / 2
        return Found("unknown", "unknown", "unknown", left + middle, top + middle, count, 0.0)

    around = np.pad(inside, 1)  # the rim of half-covered pixels belongs to the region
    near = np.zeros_like(inside)
    for dy in (0, 1, 2):
        for dx in (0, 1, 2):
            near |= around[dy : dy + world.picture_size, dx : dx + world.picture_size]
    soft = np.pad(coverage[..., label] * near, side)
    window = soft[top + side : top + 2 * side, left + side : left + 2 * side].ravel()

    # sum min / sum max, over the whole region: what falls outside the window counts against it
    shared = np.minimum(templates, window).sum(axis=1)
    overlap = shared / (templates.sum(axis=1) + soft.sum() - shared)
    best = int(overlap.argmax())
    shape, size, column, row = keys[best]
    if overlap[best] < MIN_OVERLAP:
        shape = size = "unknown"
    colour = list(world.colours)[label]
    return Found(colour, shape, size, left + column, top + row, count, float(overlap[best]))


def _judge(found: list[Found], caption: Caption) -> Verdict:
    expected = caption.things
    if len(found) != len(expected):
        return Verdict(False, f"found {len(found)} things, expected {len(expected)}", tuple(found))
    for order in itertools.permutations(found):
        if not all(_is(thing, named) for thing, named in zip(order, expected, strict=True)):
            continue
        for place, relation in enumerate(caption.relations):
            if not _holds(order[place], relation, order[place + 1]):
                return Verdict(False, f"thing {place + 1} is not {relation} the next", tuple(found))
        return Verdict(True, "", tuple(found))
    seen = " and ".join(f"{thing.size} {thing.colour} {thing.shape}" for thing in found)
    wanted = " and ".join(thing.text for thing in expected)
    return Verdict(False, f"found {seen}, expected {wanted}", tuple(found))


def _is(found: Found, thing: Thing) -> bool:
    named = (thing.colour, thing.shape, thing.size or found.size)
    return (found.colour, found.shape, found.size) == named


def _holds(first: Found, relation: str, second: Found) -> bool:
    """The relation's direction must be the main one, and clear."""
    right, down = second.column - first.column, second.row - first.row
    if relation in ("right of", "below"):
        right, down = -right, -down
    along, across = (right, down) if relation in ("left of", "right of") else (down, right)
    return along >= MIN_DISTANCE and along > abs(across)
