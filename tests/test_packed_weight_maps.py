"""The device layout of packed weights, proved without a GPU.

The index maps of csrc/layout/packed_weight.h come from `_planner`. A second packing is written here
in numpy from the layout's definition, and the decoder of csrc/device/twin_log.cuh is emulated
instruction by instruction, so a wrong map, a wrong table or a wrong selector shows up as a level in
the wrong place of the mma operand.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

planner = pytest.importorskip("lrq_kernels._planner")

BITS = (4, 3, 2)


def device_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Canonical codes s<<(b-1) | m -> device codes, from their definition."""
    half = 1 << (bits - 1)
    order = np.where(codes < half, half + codes, half - 1 - (codes - half))
    return (order & 1) << 3 | order >> 1 if bits == 4 else order


def prepack(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [N, K] canonical codes -> uint32 [N/128, K/128, 2, 256*bits], padded with code 0."""
    n, k = codes.shape
    n_tiles, k_tiles = -(-n // 128), -(-k // 128)
    padded = np.zeros((n_tiles * 128, k_tiles * 128), np.uint32)
    padded[:n, :k] = device_codes(codes.astype(np.int64), bits)
    lane = np.arange(128)[:, None]
    packed = np.zeros((n_tiles, k_tiles, 2, 256 * bits), np.uint32)
    for nt, kt, half in itertools.product(range(n_tiles), range(k_tiles), range(2)):
        tile = padded[nt * 128 + half * 64 :, kt * 128 :]

        def code(h: int, r: int, tile: np.ndarray = tile) -> np.ndarray:
            p = np.arange(8)
            row = 16 * (lane // 32) + lane % 32 // 4 + 8 * r
            return tile[row, 32 * h + 16 * (p // 4) + 4 * (lane % 4) + p % 4]  # [128, 8]

        def word(nibbles: np.ndarray) -> np.ndarray:
            return np.bitwise_or.reduce(nibbles << np.uint32(4) * np.arange(8, dtype=np.uint32), 1)

        words = np.zeros((128, 2 * bits), np.uint32)
        for r in range(2):
            if bits == 4:
                for h in range(4):
                    words[:, 2 * h + r] = word(code(h, r))
            elif bits == 3:
                for i in range(3):
                    top = code(3, r) >> np.uint32(i) & np.uint32(1)
                    words[:, 3 * r + i] = word(code(i, r) | top << np.uint32(3))
            else:
                for i in range(2):
                    words[:, 2 * i + r] = word(code(2 * i, r) | code(2 * i + 1, r) << np.uint32(2))
        packed[nt, kt, half] = np.concatenate([words[:, :4].ravel(), words[:, 4:].ravel()])
    return packed


def prmt(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """The PTX instruction in its default mode, on uint32 arrays."""
    source = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    result = np.zeros(np.broadcast(source, selector).shape, np.uint64)
    for i in range(4):
        nibble = selector.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = source >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        sign = np.where(byte >> np.uint64(7) == 1, np.uint64(0xFF), np.uint64(0))
        picked = np.where(nibble >= np.uint64(8), sign, byte)
        result |= picked << np.uint64(8 * i)
    return result.astype(np.uint32)


def u32(value: int) -> np.ndarray:
    return np.array([value], np.uint32)


def level_tables(levels: np.ndarray, bits: int) -> list[np.ndarray]:
    """load_level_table: int8 [N, 2^b] -> words of the lookup table, each uint32 [N]."""
    w = [
        np.ascontiguousarray(levels[:, i : i + 4]).view("<u4")[:, 0] for i in range(0, 1 << bits, 4)
    ]

    def reverse(x: np.ndarray) -> np.ndarray:
        return prmt(x, u32(0), u32(0x0123))

    def fold(x: np.ndarray) -> np.ndarray:
        return x ^ prmt(x, x, u32(0xBA98))

    if bits == 4:
        v = [reverse(w[3]), reverse(w[2]), w[0], w[1]]
        even, odd = u32(0x6420), u32(0x7531)
        return [
            prmt(v[0], v[1], even),
            prmt(v[2], v[3], even),
            fold(prmt(v[0], v[1], odd)),
            fold(prmt(v[2], v[3], odd)),
        ]
    if bits == 3:
        return [reverse(w[1]), w[0]]
    return [prmt(w[0], u32(0), u32(0x1023))]


def lookup(table: list[np.ndarray], nibbles: np.ndarray, bits: int) -> np.ndarray:
    if bits == 4:
        flipped = nibbles ^ np.uint32(0x8888)
        return prmt(table[0], table[1], nibbles) ^ prmt(table[2], table[3], flipped)
    return prmt(table[0], table[-1], nibbles)


def slice_nibbles(words: np.ndarray, bits: int, h: int, r: int) -> np.ndarray:
    """uint32 [128, 2b] words of the lanes -> uint32 [128] selectors."""
    w = [words[:, i] for i in range(2 * bits)]
    if bits == 4:
        return w[2 * h + r]
    if bits == 3:
        a, b, c = w[3 * r : 3 * r + 3]
        if h < 3:
            return w[3 * r + h] & np.uint32(0x77777777)
        return (
            a >> np.uint32(3) & np.uint32(0x11111111)
            | b >> np.uint32(2) & np.uint32(0x22222222)
            | c >> np.uint32(1) & np.uint32(0x44444444)
        )
    return w[2 * (h // 2) + r] >> np.uint32(2 * (h % 2)) & np.uint32(0x33333333)


def random_levels(rng: np.random.Generator, n: int, bits: int) -> np.ndarray:
    """int8 [N, 2^b]: 0 and 127, -1 and -128 occur, and so do equal neighbours."""
    half = 1 << (bits - 1)
    up = np.sort(rng.integers(0, 128, (n, half)), axis=1)
    down = -1 - np.sort(rng.integers(0, 128, (n, half)), axis=1)
    up[0], down[0] = np.linspace(0, 127, half), np.linspace(-1, -128, half)
    up[1], down[1] = 0, -1
    return np.concatenate([up, down], axis=1).astype(np.int8)


@pytest.mark.parametrize("bits", BITS)
def test_every_code_has_one_place(bits: int) -> None:
    """Each direction of a map undoes the other, and no two bits share a place."""
    seen = set()
    for channel, k in itertools.product(range(64), range(128)):
        slot = planner.nk_to_lane(channel, k)
        assert planner.lane_to_nk(*slot) == (channel, k)
        lane, h, r, p = slot
        for plane in range(bits):
            word, bit = planner.slot_to_lane_bit(bits, h, r, p, plane)
            assert planner.lane_bit_to_slot(bits, word, bit) == (h, r, p, plane)
            offset = planner.lane_word_to_offset(bits, lane, word)
            assert planner.offset_to_lane_word(bits, offset) == (lane, word)
            seen.add((offset, bit))
    assert len(seen) == 64 * 128 * bits == planner.half_tile_words(bits) * 32


@pytest.mark.parametrize("bits", BITS)
def test_code_maps_are_inverse_and_follow_the_definition(bits: int) -> None:
    codes = np.arange(1 << bits)
    mapped = [planner.canonical_to_device_code(bits, int(c)) for c in codes]
    assert mapped == device_codes(codes, bits).tolist()
    assert [planner.device_to_canonical_code(bits, d) for d in mapped] == codes.tolist()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("n", "k"),
    [
        (128, 128),  # one tile
        (130, 352),  # ragged N and K, several tiles both ways: tile order and padding
    ],
)
def test_maps_agree_with_packing_by_definition(bits: int, n: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (n, k), dtype=np.uint8)
    packed = prepack(codes, bits).ravel()
    k_tiles = -(-k // 128)
    for row, col in zip(rng.integers(0, n, 4000), rng.integers(0, k, 4000), strict=True):
        device = 0
        for plane in range(bits):
            word, bit = planner.nk_to_offset(bits, int(row), int(col), plane, k_tiles)
            device |= (int(packed[word]) >> bit & 1) << plane
        assert planner.device_to_canonical_code(bits, device) == codes[row, col]
    for half_tile in range(packed.size // planner.half_tile_words(bits)):
        first, start = planner.half_tile_to_nk(half_tile, k_tiles)
        word, _ = planner.nk_to_offset(bits, first, start, 0, k_tiles)
        assert word // planner.half_tile_words(bits) == half_tile


@pytest.mark.parametrize("bits", BITS)
def test_decode_gives_the_mma_operand(bits: int, seed: int) -> None:
    """Register a[2u + r] of slice h, byte i, is the level of row g + 8r, k = 32h + 16u + 4t + i."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 1 << bits, (64, 128), dtype=np.uint8)
    levels = random_levels(rng, 64, bits)
    half_tile = prepack(codes, bits)[0, 0, 0]
    lanes = np.arange(128)
    words = np.stack(
        [
            half_tile[[planner.lane_word_to_offset(bits, int(lane), i) for lane in lanes]]
            for i in range(2 * bits)
        ],
        axis=1,
    )
    expected = np.take_along_axis(levels, codes.astype(np.int64), 1)  # int8 [64, 128]
    tables = level_tables(levels, bits)
    for h, r, u in itertools.product(range(4), range(2), range(2)):
        rows = 16 * (lanes // 32) + lanes % 32 // 4 + 8 * r
        nibbles = slice_nibbles(words, bits, h, r) >> np.uint32(16 * u)
        register = lookup([table[rows] for table in tables], nibbles, bits)
        got = register.astype("<u4").view(np.int8).reshape(128, 4)
        k = 32 * h + 16 * u + 4 * (lanes % 4)[:, None] + np.arange(4)
        np.testing.assert_array_equal(got, expected[rows[:, None], k])


def test_out_of_range_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="weight_bits must be 2, 3 or 4, got 5"):
        planner.words_per_lane(5)
    with pytest.raises(ValueError, match=r"lane must be in \[0, 128\), got 128"):
        planner.lane_to_nk(128, 0, 0, 0)
