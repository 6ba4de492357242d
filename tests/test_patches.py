"""The tiling rule against answers of the published code, tile pixels and token counts against real processors, and odd input."""
import hashlib
import os
import random
import subprocess
import sys
import types
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlmcourse import patches
from vlmcourse.boxes import FAMILIES
from vlmcourse.patches import (
    PIXEL_FAMILIES,
    TILE_FAMILIES,
    candidate_grids,
    closest_grid,
    count_image_tokens,
    load_tiles,
    normalise,
    patch_explorer,
    plot_patches,
    plot_tiles,
    share_tiles,
    split_tiles,
)

root = Path(__file__).parent.parent

# SHA-256 of the answers that find_closest_aspect_ratio of OpenGVLab/InternVL (internvl_chat/internvl/train/dataset.py, commit
# 1831ceb9a2b6dd90ae1b714c2b4a76748c8b42b1) gives for the cases below, with the grids of dynamic_preprocess of the same file;
# computed once with CPython 3.11 from the file as published.
PUBLISHED = {
    "10 000 sizes": "3f0e5654b3924d03ce11bc3dd08e3e911525fd8062e9961f3333a71164c5aed4",
    "every limit": "8ad30bddc4aafbd2bb6b4536296b7070d928d2a6eae01a4025842b0abd3a3e30",
    "ties": "b3cb7be177d380288c7c85ef9770b9c8b61ff853fdd968c7d109bfa124fe53c0",
}


def all_cases():
    "Named lists of (size, min_tiles, max_tiles, tile_size)."
    draw = random.Random(0)

    def size():
        w, h = draw.randint(1, 8000), draw.randint(1, 8000)
        return draw.choice([(w, h), (w, w), (w % 1000 + 1, h % 1000 + 1), (w, h % 50 + 1), (w % 50 + 1, h)])

    sizes = [size() for _ in range(10_000)]
    simple = [(columns * k, rows * k) for k in (1, 37, 149, 448, 700) for columns in range(1, 9) for rows in range(1, 9)]
    return {
        "10 000 sizes": [(s, 1, 12, 448) for s in sizes],
        "every limit": [(s, 1, limit, 448) for limit in range(1, 41) for s in sizes[limit::200] + simple],
        "ties": [(s, low, high, tile) for low in range(1, 13) for high in range(low, 13) for tile in (96, 448) for s in simple],
    }


@pytest.fixture(scope="module")
def cases():
    return all_cases()


@pytest.mark.parametrize("name", PUBLISHED)
def test_grids_equal_the_published_code(cases, name):
    answers = [closest_grid(size, min_tiles=low, max_tiles=high, tile_size=tile) for size, low, high, tile in cases[name]]
    assert hashlib.sha256(repr(answers).encode()).hexdigest() == PUBLISHED[name]


def by_hand(size, low, high, tile):
    "The rule in exact fractions: the nearest shape, then the largest grid of that shape that the picture half fills."
    ratio = Fraction(*size)
    grids = [(i, j) for i in range(1, high + 1) for j in range(1, high // i + 1) if i * j >= low]
    nearest = min(abs(ratio - Fraction(i, j)) for i, j in grids)
    equal = sorted((g for g in grids if abs(ratio - Fraction(*g)) == nearest), key=lambda g: g[0] * g[1])
    if len({Fraction(*g) for g in equal}) > 1:
        return None        # half way between two shapes: the published code computes with floats, and their last digit decides
    return ([g for g in equal if 2 * size[0] * size[1] > tile**2 * g[0] * g[1]] or equal[:1])[-1]


def test_grids_equal_the_rule_in_exact_fractions(cases):
    some = cases["every limit"][::5]
    exact = [by_hand(*case) for case in some]
    for (size, low, high, tile), grid in zip(some, exact):
        assert grid in (None, closest_grid(size, min_tiles=low, max_tiles=high, tile_size=tile))
    assert exact.count(None) < len(exact) / 20


def test_the_cases_reach_ties_and_extremes(cases):
    sizes = [size for size, *_ in cases["10 000 sizes"]]
    assert max(w / h for w, h in sizes) > 1000 and min(w / h for w, h in sizes) < 1 / 1000
    assert sum(w == h for w, h in sizes) > 1000
    assert {(1, 1), (2, 2), (3, 3), (12, 1), (1, 12)} <= {closest_grid(size) for size in sizes}


def test_transformers_chooses_the_same_grid(cases):
    from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas
    for (w, h), low, high, tile in cases["every limit"][::3]:
        assert closest_grid((w, h), max_tiles=high, tile_size=tile) == get_optimal_tiled_canvas((h, w), (tile, tile), low, high)


def test_order_decides_between_equal_grids_only_above_one_tile():
    def undecided(low, high):
        shapes = {}
        for i, j in candidate_grids(low, high):
            shapes.setdefault(Fraction(i, j), set()).add(i * j)
        near = sorted(shapes)
        return any(shapes[a] & shapes[b] for a, b in zip(near, near[1:]))
    assert not any(undecided(1, high) for high in range(1, 41))
    assert undecided(4, 4)
    assert closest_grid((150, 60), min_tiles=4, max_tiles=4) == (4, 1)  # the published code, with the order of its set


def test_candidate_grids_are_all_grids():
    for low, high in [(1, 1), (1, 6), (1, 40), (3, 7), (12, 12)]:
        grids = candidate_grids(low, high)
        assert set(grids) == {(i, j) for i in range(1, 41) for j in range(1, 41) if low <= i * j <= high}
        assert len(set(grids)) == len(grids)
        assert [i * j for i, j in grids] == sorted(i * j for i, j in grids)


# --- pixels ---------------------------------------------------------------------------------------------------

ODD = [(1, 1), (448, 448), (449, 447), (96, 96), (640, 480), (1920, 1080), (1080, 1920), (700, 31), (17, 1201), (951, 951),
       (1344, 896), (333, 1000)]


def picture(size, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).resize(size)
    pixels = np.asarray(small, int) + rng.integers(-20, 21, (size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def plain(image, **limits):
    from torchvision.transforms import Compose, Normalize, ToTensor
    to_numbers = Compose([ToTensor(), Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])
    return torch.stack([to_numbers(tile) for tile in split_tiles(image, **limits)])


def hf_tiles(kind, image, limit):
    "Tiles as whole numbers, from an image processor of transformers."
    tool = kind(crop_to_patches=True, max_patches=limit, size=dict(height=448, width=448), do_rescale=False, do_normalize=False)
    return tool(images=[image], return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("size", ODD, ids=str)
def test_tiles_equal_pil_and_the_pil_processor_bit_for_bit(size):
    from transformers import GotOcr2ImageProcessorPil
    image, limit = picture(size), 6
    columns, rows = closest_grid(size, max_tiles=limit)
    stretched = np.asarray(image.resize((448 * columns, 448 * rows), Image.Resampling.BICUBIC))
    expected = [stretched[448 * y:448 * y + 448, 448 * x:448 * x + 448] for y in range(rows) for x in range(columns)]
    if len(expected) > 1:
        expected.append(np.asarray(image.resize((448, 448), Image.Resampling.BICUBIC)))
    tiles = [np.asarray(tile) for tile in split_tiles(image, max_tiles=limit)]
    assert np.array_equal(np.stack(tiles), np.stack(expected))
    theirs = hf_tiles(GotOcr2ImageProcessorPil, image, limit)
    assert torch.equal(theirs.permute(0, 2, 3, 1).to(torch.uint8), torch.from_numpy(np.stack(tiles)))


@pytest.mark.parametrize("size", ODD, ids=str)
def test_load_tiles_equals_the_plain_way(size):
    image = picture(size, 1)
    for limits in [dict(max_tiles=6), dict(max_tiles=4, thumbnail=False), dict(tile_size=96)]:
        block, counts = load_tiles(image, **limits)
        assert block.dtype == torch.float32 and counts == [len(block)]
        assert torch.equal(block, plain(image, **limits))


@pytest.mark.parametrize("size", [(640, 480), (1080, 1920), (448, 448), (96, 96)], ids=str)
def test_torchvision_pixels_are_those_of_transformers(size):
    from transformers import GotOcr2ImageProcessor
    image = picture(size, 2)
    theirs = hf_tiles(GotOcr2ImageProcessor, image, 6)
    ours = load_tiles(image, max_tiles=6, resize="torchvision")[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (patches.IMAGENET_MEAN, patches.IMAGENET_STD))
    assert torch.equal(((ours * std + mean) * 255).round(), theirs.float())
    exact = load_tiles(image, max_tiles=6)[0]
    assert ((exact - ours) * std * 255).abs().max() <= 4          # close to PIL


# --- the resize: two products against PIL ---------------------------------------------------------------------

def unlike_pil(pairs, seed=0):
    "The pairs (size, new size) for which the two products and PIL give other pixels, on noise."
    rng = np.random.default_rng(seed)
    wrong = []
    for (w, h), new in pairs:
        pixels = rng.integers(0, 256, (h, w, 3), dtype=np.uint8)
        ours = patches._as_pil(pixels, new)
        assert ours.dtype == np.uint8 and ours.shape == (new[1], 3, new[0])
        if not np.array_equal(ours.transpose(0, 2, 1), np.asarray(Image.fromarray(pixels).resize(new))):
            wrong.append(((w, h), new))
    return wrong


def random_pairs(n, seed=0):
    "Sizes of all kinds: larger, smaller, flat, narrow, and some in which one side or both stay as they are."
    draw = random.Random(seed)
    pairs = []
    for k in range(n):
        w, h, wide, high = (draw.randint(1, 250) for _ in range(4))
        w, h = [(w, h), (w, h), (w * 8, h % 9 + 1), (w % 9 + 1, h * 8)][k % 4]
        pairs.append(((w, h), [(wide, high), (w, high), (wide, h), (w, h)][k % 7 if k % 7 < 4 else 0]))
    return pairs


ODD_PAIRS = [((1, 1), (448, 448)), ((1, 1), (1, 1)), ((1, 700), (448, 448)), ((700, 1), (448, 448)), ((8000, 50), (5376, 448)),
             ((50, 8000), (448, 5376)), ((50_000, 1), (448, 448)), ((1, 50_000), (448, 448)), ((448, 448), (448, 448)),
             ((64, 64), (128, 128)), ((128, 128), (64, 64)), ((1000, 700), (1, 1)), ((897, 449), (896, 448))]
# around the rule of PIL 13 for the order: the height shrinks by exactly twice as many pixels as the width, by one less, by one more
ORDER = [((60 + dx, 60 + 2 * dx + more), (60, 60)) for dx in (-9, -1, 0, 1, 9) for more in (-1, 0, 1)]


@pytest.mark.parametrize("pairs", [random_pairs(400), ODD_PAIRS, ORDER], ids=["random", "odd", "order"])
def test_two_products_equal_pil(pairs):
    """If this fails after an update of Pillow, its resize has changed (version 13 changed the order of the passes): compare `_weights`
    and `_as_pil` with src/libImaging/Resample.c of that version. Pillow-SIMD rounds its weights otherwise and would fail too."""
    assert unlike_pil(pairs) == []


def test_two_products_on_black_white_and_edges():
    for image in (Image.new("RGB", (97, 61), "white"), Image.new("RGB", (97, 61)), Image.linear_gradient("L").convert("RGB"),
                  Image.fromarray(np.kron(np.indices((9, 9)).sum(0) % 2, np.ones((7, 7)))[..., None].repeat(3, 2).astype(np.uint8) * 255)):
        for new in [(200, 200), (31, 17), (96, 30)]:
            ours = patches._as_pil(np.asarray(image), new).transpose(0, 2, 1)
            assert np.array_equal(ours, np.asarray(image.resize(new)))


def test_sums_fit_into_32_bits():
    draw = random.Random(1)
    pairs = [(a, b) for a in range(1, 40) for b in range(1, 40)] + [(draw.randint(1, 9000), draw.randint(1, 6000)) for _ in range(60)]
    weights = [patches._weights(a, b) for a, b in pairs]
    assert all(w.dtype == np.int32 for w in weights)
    assert max(abs(w.astype(np.int64)).sum(1).max() for w in weights) * 255 + 2**21 < 2**31
    assert (weights[0] @ np.ones((1, 1), np.uint8)).dtype == np.int32


def changed(weights, change):
    weights = weights.copy()
    weights.data = change(weights.data)
    return weights


MUTANTS = {
    "weights one unit higher": lambda m: dict(_weights=lambda a, b: changed(m._weights(a, b), lambda data: data + 1)),
    "weights of 16 binary places": lambda m: dict(_weights=lambda a, b: changed(m._weights(a, b), lambda data: (data + 32) // 64 * 64)),
    "another curve": lambda m: dict(_cubic=lambda x: np.where(abs(x) < 1, m._cubic(x), 1.5 * m._cubic(x))),
    "always across first": lambda m: dict(_as_pil=lambda p, size: m._down(m._across(p, size[0]), size[1])),
    "always down first": lambda m: dict(_as_pil=lambda p, size: m._across(m._down(p, size[1]), size[0])),
    "sums cut off, not rounded": lambda m: dict(_mix=lambda w, p: ((w @ p) >> 22).clip(0, 255).astype(np.uint8)),
    "not cut off at 0 and 255": lambda m: dict(_mix=lambda w, p: (((w @ p) + 2**21) >> 22).astype(np.uint8)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_comparison_with_pil_notices(name, monkeypatch):
    real = types.SimpleNamespace(**{k: getattr(patches, k) for k in ("_weights", "_cubic", "_across", "_down", "_mix", "_as_pil")})
    for key, value in MUTANTS[name](real).items():
        monkeypatch.setattr(patches, key, value)
    real._weights.cache_clear()
    try:
        assert unlike_pil([*random_pairs(12), *ORDER])
    finally:
        real._weights.cache_clear()


def test_normalise_equals_torchvision():
    image = Image.fromarray(np.arange(256 * 3, dtype=np.int64).reshape(16, 16, 3).astype(np.uint8))  # every level
    assert torch.equal(normalise(image)[None], plain(image.resize((448, 448), 0), tile_size=448)[:, :, ::28, ::28])


def test_several_pictures_share_the_limit():
    album = [picture(size, i) for i, size in enumerate([(640, 480), (448, 448), (300, 900)])]
    block, counts = load_tiles(album, max_tiles=12)
    assert torch.equal(block, torch.cat([plain(image, max_tiles=4) for image in album]))
    assert counts == [len(split_tiles(image, max_tiles=4)) for image in album]
    assert counts == [n // 256 for n in count_image_tokens([im.size for im in album], "internvl")]
    alone, counts = load_tiles(album, max_tiles=12, share=False)
    assert torch.equal(alone, torch.cat([plain(image) for image in album]))
    assert torch.equal(alone, load_tiles(album, share=False, threads=3)[0])
    assert counts == [n // 256 for n in count_image_tokens([im.size for im in album], "internvl", share=False)]
    assert [share_tiles(12, n) for n in (1, 2, 5, 12, 13, 100)] == [12, 6, 2, 1, 1, 1]  # max(1, 12 // n), as published


def test_files_grey_transparent_and_turned_pictures(tmp_path):
    image = picture((600, 300), 3)
    note = Image.Exif()
    note[0x0112] = 6
    image.save(tmp_path / "phone.png", exif=note)
    image.convert("L").save(tmp_path / "grey.png")
    Image.new("RGBA", (600, 300), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    turned = image.transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(load_tiles(tmp_path / "phone.png")[0], load_tiles(turned)[0])
    assert split_tiles(str(tmp_path / "phone.png"))[0].tobytes() == split_tiles(turned)[0].tobytes()
    grey = load_tiles(tmp_path / "grey.png")[0]
    assert torch.equal(grey, load_tiles(image.convert("L").convert("RGB"))[0])
    assert torch.equal(load_tiles(tmp_path / "clear.png")[0], load_tiles(Image.new("RGB", (600, 300), "white"))[0])
    with pytest.raises(FileNotFoundError, match="There is no picture"):
        load_tiles([tmp_path / "phone.png", tmp_path / "none.png"])
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="cannot be read"):
        load_tiles(tmp_path / "bad.jpg")


# --- tokens ---------------------------------------------------------------------------------------------------

TABLE = [ # size, InternVL, Qwen2.5-VL, Qwen3-VL: DIAGNOSIS, "Image tokens"
    ((448, 448), 256, 256, 196),
    ((640, 480), 3328, 391, 300),
    ((800, 600), 3328, 609, 475),
    ((1000, 1000), 2560, 1225, 961),
    ((1920, 1080), 2304, 1222, 1222),
]


@pytest.mark.parametrize("size, internvl, qwen25, qwen3", TABLE)
def test_the_table_of_the_papers(size, internvl, qwen25, qwen3):
    assert count_image_tokens(size, "internvl") == internvl
    assert count_image_tokens(size, "qwen2.5-vl") == count_image_tokens(size, "qwen2-vl") == qwen25
    assert count_image_tokens(size, "qwen3-vl") == qwen3


def test_tokens_equal_the_qwen_processors():
    from transformers import Qwen2VLImageProcessor
    sizes = [(28, 28), (1, 1), (100, 20), (640, 480), (97, 1203), (2500, 1800), (448, 449)]
    limits = [{}, dict(min_pixels=400 * 400), dict(max_pixels=300 * 300), dict(min_pixels=4 * 1024, max_pixels=90_000)]
    for family, (side, low, high) in PIXEL_FAMILIES.items():
        for limit in limits:
            a, b = limit.get("min_pixels", low), limit.get("max_pixels", high)
            if a > b:
                continue
            tool = Qwen2VLImageProcessor(patch_size=side // 2, size=dict(shortest_edge=a, longest_edge=b))
            for size in sizes:
                grid = tool(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"]
                assert count_image_tokens(size, family, **limit) == grid.prod() // tool.merge_size**2, (family, limit, size)


def test_default_limits_are_those_of_the_class():
    from transformers import Qwen2VLImageProcessor
    size = Qwen2VLImageProcessor().size
    assert PIXEL_FAMILIES["qwen2-vl"] == (28, size["shortest_edge"], size["longest_edge"])
    assert set(FAMILIES) <= {*PIXEL_FAMILIES, *TILE_FAMILIES}


def test_tokens_equal_the_internvl_processor():
    from transformers import GotOcr2ImageProcessor
    for limit in (1, 6, 12):
        tool = GotOcr2ImageProcessor(crop_to_patches=True, max_patches=limit, size=dict(height=448, width=448))
        for size in ODD:
            tiles = tool.get_number_of_image_patches(size[1], size[0])
            assert count_image_tokens(size, "internvl", max_tiles=limit) == 256 * tiles
    assert count_image_tokens((1920, 1080), "internvl", thumbnail=False) == 8 * 256


def test_tokens_equal_the_tiny_processors():
    from transformers import AutoProcessor

    from vlmcourse.tiny import make_processor, make_tokenizer
    from vlmcourse.vlm import find_model
    shipped = AutoProcessor.from_pretrained(find_model("tiny")[0], local_files_only=True)
    tiles = make_processor(make_tokenizer(family="internvl"), "internvl")
    for size in [(96, 96), (192, 192), (64, 200), (640, 480)]:
        for tool, family in [(shipped, "tiny"), (tiles, "tiny-internvl")]:
            ids = tool(text=[tool.image_token], images=[[Image.new("RGB", size)]])["input_ids"][0]
            token = tool.tokenizer.convert_tokens_to_ids(tool.image_token)
            assert list(ids).count(token) == count_image_tokens(size, family), (family, size)


# --- mistakes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(0, 10), (10, 0), (-3, 5), (2.5, 5), 7, None, "ab", (1, 2, 3)])
def test_sizes_that_cannot_be(size):
    for call in (closest_grid, lambda s: count_image_tokens(s, "internvl"), lambda s: count_image_tokens(s, "qwen3-vl")):
        with pytest.raises(ValueError, match="size"):
            call(size)


@pytest.mark.parametrize("limits, said", [
    (dict(max_tiles=0), "max_tiles=0"), (dict(min_tiles=0), "min_tiles=0"), (dict(min_tiles=7, max_tiles=6), "min_tiles=7"),
    (dict(max_tiles=2.5), "max_tiles=2.5"), (dict(max_tiles="12"), "max_tiles='12'"), (dict(max_tiles=10**6), "from 1 to 1000"),
    (dict(tile_size=0), "tile_size=0")])
def test_limits_that_cannot_be(limits, said):
    image = picture((50, 50))
    for call in (split_tiles, load_tiles, plot_tiles, lambda im, **k: closest_grid(im.size, **k)):
        with pytest.raises(ValueError, match=said):
            call(image, **limits)


@pytest.mark.parametrize("family, limits, said", [
    ("qwen", {}, "family='qwen' is not known. Use one of qwen2-vl, "),
    (None, {}, "family=None"),
    ("internvl", dict(max_pixels=1000), "max_pixels=1000 would do nothing"),
    ("qwen3-vl", dict(max_tiles=6), "max_tiles=6 would do nothing"),
    ("qwen3-vl", dict(max_pixels=1000), "min_pixels=65536 is larger than max_pixels=1000"),
    ("qwen2-vl", dict(min_pixels=0), "min_pixels=0"),
    ("internvl", dict(min_tiles=13), "min_tiles=13 is larger than max_tiles=12"),
    ("internvl", dict(max_tiles=0), "max_tiles=0")])
def test_families_and_limits_that_do_not_fit(family, limits, said):
    for call in (lambda: count_image_tokens((64, 64), family, **limits), lambda: plot_patches(picture((64, 64)), family, **limits),
                 lambda: count_image_tokens([(64, 64)], family, **limits), lambda: count_image_tokens([], family, **limits)):
        with pytest.raises(ValueError) as error:
            call()
        assert said in str(error.value)


def test_pictures_that_cannot_share():
    for call in (lambda: load_tiles([picture((9, 9))] * 5, min_tiles=4), lambda: count_image_tokens([(9, 9)] * 5, "internvl", min_tiles=4)):
        with pytest.raises(ValueError, match="5 pictures share max_tiles=12, that is 2 for each"):
            call()
    assert count_image_tokens([], "internvl") == count_image_tokens([], "tiny") == []
    for bad in (lambda: load_tiles([]), lambda: load_tiles(picture((9, 9)), resize="cv2"), lambda: load_tiles(picture((9, 9)), threads=0),
                lambda: load_tiles(Image.new("RGB", (0, 5)))):
        with pytest.raises(ValueError):
            bad()


def test_strips():
    assert closest_grid((8000, 50)) == (12, 1)
    assert count_image_tokens((50, 8000), "internvl") == 13 * 256
    assert count_image_tokens((8000, 50), "qwen2.5-vl") == 286 * 2
    with pytest.raises(ValueError, match="at most 200"):
        count_image_tokens((8000, 30), "qwen2.5-vl")


# --- pictures and the widget ----------------------------------------------------------------------------------

def test_plots():
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    image = picture((640, 480))
    ax = plot_tiles(image)
    assert ax.get_title() == "640 x 480 px: 4 x 3 tiles of 448 px and a thumbnail"
    assert "thumbnail" not in plot_tiles(image, max_tiles=1).get_title()
    mine = plt.subplots()[1]
    assert plot_patches(image, "qwen2.5-vl", ax=mine) is mine
    assert mine.get_title() == "qwen2.5-vl: 391 tokens of 28 x 28 px"
    assert [len(lines.get_segments()) for lines in mine.collections[-2:]] == [24, 18]  # borders of 23 x 17 tokens
    assert plot_patches(image, "tiny").get_xlabel() == "96 px"
    plt.close("all")


def test_explorer():
    import matplotlib
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    box = patch_explorer(picture((64, 48)), family="internvl")
    family, width, height, tiles, tokens, cost, _ = box.children
    assert "3328 tokens" in cost.value
    tiles.value = 6
    assert f"{count_image_tokens((640, 480), 'internvl', max_tiles=6)} tokens" in cost.value
    for name in [*PIXEL_FAMILIES, *TILE_FAMILIES]:
        family.value = name
        assert f"<b>{name}: " in cost.value
        assert (tiles.disabled, tokens.disabled) == (name in PIXEL_FAMILIES, name in TILE_FAMILIES)
    family.value, tokens.value, width.value, height.value = "qwen3-vl", 64, 1600, 1200
    assert count_image_tokens((1600, 1200), "qwen3-vl", min_pixels=1024, max_pixels=65536) <= 64
    assert "1600 x 1200 px: <b>qwen3-vl: 54 tokens" in cost.value
    plt.close("all")


def test_import_is_quick():
    "The large libraries are imported when a function needs them."
    code = "import sys, vlmcourse.patches; print([m for m in ('torch', 'torchvision', 'matplotlib', 'ipywidgets') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert ran.stdout.strip() == "[]", ran.stdout + ran.stderr


def test_bench_runs():
    ran = subprocess.run([sys.executable, "tools/bench_patches.py", "--photos", "2", "--rounds", "1"], capture_output=True, text=True,
                         cwd=root, env=dict(os.environ, PYTHONPATH=str(root)))
    assert ran.returncode == 0, ran.stderr
    assert "2 photos, 1 rounds" in ran.stdout and "equal bit for bit" in ran.stdout
