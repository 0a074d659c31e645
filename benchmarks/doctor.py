"""How fast the dataset doctor reads masks, beside a plain read of the same files by as many threads.

    python benchmarks/doctor.py                        # 400 palette masks of 512 x 512, 20 classes
    python benchmarks/doctor.py --count 2000 --json

Masks and images are generated in a temporary folder. All parts run in turn, several times, and the best time of each
counts. Exit code 1 when fewer than 400 masks a second are read, or it takes more than 1.5 times the plain read. The
machine should have nothing else to do: with all cores free, counting hides behind the plain read's waiting for the
interpreter's lock, on a busy machine it does not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segvit.data.doctor.survey import survey
from segvit.palette import generate_palette

SIDE, CLASSES = 512, 20
LEAST_RATE, MOST_RATIO = 400, 1.5


def blobs(rng: np.random.Generator) -> NDArray[np.uint8]:
    """Class ids (512, 512), the largest of smooth random fields: about 12 KB as PNG."""
    fields = rng.standard_normal((CLASSES, 12, 12)).astype(np.float32)
    best, ids = np.full((SIDE, SIDE), -np.inf, np.float32), np.zeros((SIDE, SIDE), np.uint8)
    for i, field in enumerate(fields):
        large = np.asarray(Image.fromarray(field).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        ids[large > best] = i
        best = np.maximum(best, large)
    return ids


def make_dataset(root: Path, count: int) -> None:
    """Palette masks and JPEG images of the same regions, in the layout without a YAML."""
    rng = np.random.default_rng(0)
    colors = np.array(generate_palette(CLASSES), np.uint8)
    for folder in ("images", "masks"):
        (root / folder).mkdir()
    for i in range(count):
        ids = blobs(rng)
        mask = Image.fromarray(ids)
        mask.putpalette(colors.tobytes())
        mask.save(root / "masks" / f"{i:05d}.png")
        noise = rng.integers(0, 32, (SIDE, SIDE, 1), dtype=np.uint8)
        Image.fromarray(colors[ids] // 2 + noise).save(root / "images" / f"{i:05d}.jpg", quality=90)


def plain_read(files: list[Path], workers: int) -> None:
    """Decode all files and do nothing with them."""

    def read(chunk: list[Path]) -> None:
        for path in chunk:
            Image.open(path).load()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(read, [files[start : start + 16] for start in range(0, len(files), 16)]))


def measure(root: Path, *, count: int, workers: int, rounds: int) -> dict[str, float]:
    """Best seconds of each part, the rates and the ratio."""
    make_dataset(root, count)
    files = sorted((root / "masks").iterdir())
    seconds: dict[str, list[float]] = {}

    def note(name: str, work: Callable[[], float]) -> None:
        seconds.setdefault(name, []).append(work())

    def plain() -> float:
        start = time.perf_counter()
        plain_read(files, workers)
        return time.perf_counter() - start

    def examined(name: str, *, remember: bool) -> float:
        return survey(root, hashes=name == "hashes", workers=workers, remember=remember).seconds[name]

    examined("masks", remember=True)
    for _ in range(rounds):
        note("plain", plain)
        note("masks", lambda: examined("masks", remember=False))
        note("masks_remembered", lambda: examined("masks", remember=True))
        note("image_headers", lambda: examined("images", remember=False))
    for _ in range(rounds):
        note("hashes", lambda: examined("hashes", remember=False))
    best = {f"{name}_s": min(times) for name, times in seconds.items()}
    return best | {
        "masks_per_s": count / best["masks_s"],
        "hashes_per_s": count / best["hashes_s"],
        "ratio_to_plain_read": best["masks_s"] / best["plain_s"],
        "gain_by_memory": best["masks_s"] / best["masks_remembered_s"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SEGVIT_CACHE"] = str(Path(folder, "cache"))  # the user's own is left alone
        root = Path(folder, "data")
        root.mkdir()
        report = measure(root, count=arguments.count, workers=arguments.workers, rounds=arguments.rounds)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        for key, value in report.items():
            print(f"{key:24} {value:.4g}")
    if report["masks_per_s"] < LEAST_RATE or report["ratio_to_plain_read"] > MOST_RATIO:
        sys.exit(1)


if __name__ == "__main__":
    main()
