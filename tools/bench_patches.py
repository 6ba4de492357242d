"""Time `load_tiles` against the plain way, PIL and torchvision tile by tile, on a folder of JPEG photos.

    python tools/bench_patches.py [--photos 12] [--rounds 5] [--threads 2]

Both ways take turns, six photos at a time; what is printed is the median of the ratios. With one thread processor time is counted, so
that other programs on the machine disturb less (they still take cache and memory from both ways). With --threads above 1 it is time
on the clock, and only `load_tiles` uses the threads: it shows what the threads give only if the other cores are idle.

The last lines show where the time of the plain way goes, and how stretching alone compares: PIL's resize against the two sparse products
that `load_tiles` uses instead, with the same pixels.
"""
import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import Compose, Normalize, ToTensor

from vlmcourse.formats import open_image
from vlmcourse.museum import draw_scene, make_scene
from vlmcourse.patches import IMAGENET_MEAN, IMAGENET_STD, _as_pil, closest_grid, load_tiles, split_tiles

SIZES = [(1920, 1080), (1600, 1200), (1024, 768), (1080, 1920), (640, 480), (800, 800)]   # px, as phones and scanners make them
to_numbers = Compose([ToTensor(), Normalize(IMAGENET_MEAN, IMAGENET_STD)])


def make_photos(folder, n):
    "`n` JPEG photos of museum shelves, in the sizes above by turns, with a little noise as a camera makes it."
    rng = np.random.default_rng(0)
    shelves = [draw_scene(make_scene(i, "train", kind="shelf"), 512) for i in range(min(n, 3))]
    paths = []
    for i in range(n):
        pixels = np.asarray(shelves[i % len(shelves)].resize(SIZES[i % len(SIZES)]), int)
        pixels = (pixels + rng.integers(-6, 7, pixels.shape)).clip(0, 255).astype(np.uint8)
        paths.append(folder / f"{i:03d}.jpg")
        Image.fromarray(pixels).save(paths[-1], quality=90)
    return paths


def plain(path):
    "Open, resize, crop each tile, turn each into numbers, normalise each, stack."
    return torch.stack([to_numbers(tile) for tile in split_tiles(path)])


def parts(path, clock):
    "Seconds for reading the file, stretching the picture, and all the rest of the plain way; then for stretching by two products."
    image, read = timed(lambda: open_image(path), clock)
    columns, rows = closest_grid(image.size)
    sizes = [(448 * columns, 448 * rows)] + [(448, 448)] * (columns * rows > 1)
    _, stretch = timed(lambda: [image.resize(size) for size in sizes], clock)
    _, whole = timed(lambda: plain(path), clock)
    _, products = timed(lambda: [_as_pil(np.array(image), size) for size in sizes], clock)
    return read, stretch, whole - read - stretch, products


def timed(job, clock):
    "(result, seconds)"
    start = clock()
    result = job()
    return result, clock() - start


def middle(values):
    "Median and range, as text."
    return f"{statistics.median(values):5.2f}  ({min(values):.2f} to {max(values):.2f})"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--photos", type=int, default=12)
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--threads", type=int, default=os.cpu_count(), help="as many photos at the same time (default: one per core)")
    a = p.parse_args()
    if min(a.photos, a.rounds, a.threads) < 1:
        p.error("--photos, --rounds and --threads must be at least 1.")
    torch.set_num_threads(1)
    clock = time.process_time if a.threads == 1 else time.perf_counter
    ways = {f"load_tiles, resize={how!r}": dict(resize=how, share=False) for how in ("pil", "torchvision")}
    with tempfile.TemporaryDirectory() as folder:
        paths = make_photos(Path(folder), a.photos)
        groups = [paths[i:i + 6] for i in range(0, len(paths), 6)]  # six photos are about 190 MB of numbers
        for path in paths:                       # also warms up
            assert torch.equal(plain(path), load_tiles(path)[0]), f"{path}: load_tiles is not equal to the plain way"
        ratios, shares = {name: [] for name in ways}, []
        for _ in range(a.rounds):
            for group in groups:
                slow = timed(lambda: [plain(path) for path in group], clock)[1]
                for name, options in ways.items():
                    ratios[name].append(slow / timed(lambda: load_tiles(group, threads=a.threads, **options), clock)[1])
            shares.append(np.sum([parts(path, clock) for path in paths], 0))
    unit = "processor time, 1 thread" if a.threads == 1 else f"time on the clock, {a.threads} threads against 1"
    print(f"{a.photos} photos, {a.rounds} rounds, the ways in turn; {unit}; times as fast as the plain way, median:")
    for name, values in ratios.items():
        print(f"  {middle(values)}  {name}" + (", equal bit for bit" if "'pil'" in name else ", nearly equal"))
    read, stretch, rest, products = np.sum(shares, 0) / (a.rounds * a.photos)
    whole = read + stretch + rest
    print(f"the plain way takes {1000 * whole:.0f} ms a photo: {100 * read / whole:.0f} % for reading the file, {100 * stretch / whole:.0f} % for "
          f"stretching, {100 * rest / whole:.0f} % for tiles and numbers")
    print(f"stretching alone, one thread: PIL {1000 * stretch:.0f} ms, two products {1000 * products:.0f} ms a photo, "
          f"{stretch / products:.2f} times as fast")


if __name__ == "__main__":
    main()
