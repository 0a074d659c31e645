"""FRPT against what it starts from, on generated shapes that differ in little, all in one run.

A small residual network first learns eight kinds of texture and form, from nothing. It is then frozen, and must tell
apart stars that differ by their number of points, how deep they are cut, and their filling: FRPT learns on some kinds
of stars and is measured on others (Recall@1, every image searches all others). Beside it, with the same images, steps,
batches and optimiser: the frozen features, the class scores of a linear head on them and, with --ways, the features of
the network when it is trained as a whole, and other forms of FRPT.

    OMP_NUM_THREADS=1 python examples/retrieval_study.py --table benchmarks/results/retrieval_study.md
"""

from __future__ import annotations

import argparse
import itertools
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import segvit
from segvit.data.image_folder import ImageFolder, open_image_folder
from segvit.engine.settings import Optim, Schedule
from segvit.files import write_text
from segvit.metrics.retrieval import recall_at_k
from segvit.model_folder import load_model
from segvit.tasks.classify import Classification, scores, train_classifier
from segvit.tasks.contact_sheet import save_sheet
from segvit.tasks.gallery import read_gallery, search_files, write_gallery
from segvit.tasks.labelled import Whole
from segvit.tasks.retrieve import Retrieval, load_retriever, retrieval_figures, train_retriever

SIZE = 64
BACKBONE = "test_resnet"  # the smallest of timm's residual networks, 0.37 M parameters
KERNEL = 9  # of the paper's prompt, on a map of 16 x 16 cells
FORMS: dict[str, dict[str, Any]] = {  # the head with a bottleneck is one fit of the paper's count: 384 of 2048 channels
    "paper": {"kernel": KERNEL},
    "paper_bottleneck": {"kernel": KERNEL, "bottleneck_dim": 18},
    "released": {"form": "released", "size": SIZE},
}
WAYS = {
    "linear": "linear head on them, its class scores",
    "whole": "whole network trained, its features",
    "paper": "FRPT, the paper's form",
    "paper_bottleneck": "FRPT, the paper's form with a bottleneck",
    "released": "FRPT, the released form",
}
POINTS, DEPTHS, FILLINGS = (4, 5, 6, 7), (0.35, 0.55, 0.75), ("plain", "striped", "dotted")


class Row(NamedTuple):
    """One way to make vectors, and how well they find."""

    name: str
    trained: int  # parameters
    figures: dict[str, Any]
    seconds: float


Pixels = NDArray[np.uint8]
Plane = NDArray[np.float64]


# Images


def plane() -> tuple[Plane, Plane]:
    """Rows and columns from -1 to 1."""
    line = np.linspace(-1, 1, SIZE)
    return np.meshgrid(line, line, indexing="ij")


def ground(rng: np.random.Generator) -> NDArray[np.float64]:
    """A cluttered ground (SIZE, SIZE, 3): waves and patches of colours that say nothing of the class."""
    rows, columns = plane()
    image = np.broadcast_to(rng.uniform(60, 190, 3), (SIZE, SIZE, 3)).copy()
    for _ in range(3):
        a, b, phase = rng.uniform(-6, 6), rng.uniform(-6, 6), rng.uniform(0, 6)
        image += 14 * np.sin(a * rows + b * columns + phase)[..., None] * rng.uniform(-1, 1, 3)
    for _ in range(4):
        y, x, radius = rng.uniform(-1, 1, 2).tolist() + [rng.uniform(0.08, 0.25)]
        image[np.hypot(rows - y, columns - x) < radius] += rng.uniform(-50, 50, 3)
    return image


def star(points: int, depth: float, filling: str, rng: np.random.Generator) -> Pixels:
    """A star that fills a quarter to a half of the width, at any place and angle."""
    rows, columns = plane()
    radius = rng.uniform(0.35, 0.55)
    y, x = rng.uniform(radius - 0.95, 0.95 - radius, 2)
    turn = rng.uniform(0, 2 * np.pi)
    angle = (np.arctan2(rows - y, columns - x) + turn) % (2 * np.pi / points) - np.pi / points
    inner = radius * depth
    # Between a tip and a notch the outline is a straight line; in polar form r = c / cos(angle - slope).
    along = np.abs(angle)
    notch, tip = np.array([inner, 0.0]), radius * np.array([np.cos(np.pi / points), np.sin(np.pi / points)])
    normal = np.array([tip[1] - notch[1], notch[0] - tip[0]])
    limit = normal @ notch / (normal[0] * np.cos(along) + normal[1] * np.sin(along))
    inside = np.hypot(rows - y, columns - x) < limit
    return painted(inside, filling, rng)


def painted(inside: NDArray[np.bool_], filling: str, rng: np.random.Generator) -> Pixels:
    """A region filled with one of the textures on a random ground."""
    rows, columns = plane()
    image, color, other = ground(rng), rng.uniform(0, 255, 3), rng.uniform(0, 255, 3)
    other = rng.uniform(0, 255, 3)
    phase, turn = rng.uniform(0, 6), rng.uniform(0, np.pi)
    wave = 24 * (np.cos(turn) * rows + np.sin(turn) * columns) + phase
    across = 24 * (np.cos(turn) * columns - np.sin(turn) * rows)
    second = {
        "plain": np.zeros_like(inside),
        "striped": np.sin(wave) > 0,
        "dotted": (np.sin(wave) > 0.2) & (np.sin(across) > 0.2),
    }[filling]
    image[inside] = color
    image[inside & second] = other
    return image.clip(0, 255).astype(np.uint8)


def thing(kind: str, rng: np.random.Generator) -> Pixels:
    """An image of what the backbone is pretrained on: four forms, each of two fillings; no stars."""
    form, filling = kind.split("_")
    rows, columns = plane()
    turn, size = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 0.9)
    y, x = rng.uniform(size - 0.95, 0.95 - size, 2)
    down, right = rows - y, columns - x
    u, v = np.cos(turn) * right + np.sin(turn) * down, np.cos(turn) * down - np.sin(turn) * right
    inside = {
        "disc": np.hypot(u, v) < size,
        "bar": (np.abs(u) < size) & (np.abs(v) < 0.35 * size),
        "square": (np.abs(u) < 0.75 * size) & (np.abs(v) < 0.75 * size),
        "ring": (np.hypot(u, v) < size) & (np.hypot(u, v) > 0.55 * size),
    }[form]
    return painted(inside, filling, rng)


THINGS = [f"{form}_{filling}" for form in ("bar", "disc", "ring", "square") for filling in FILLINGS[1:]]
STARS = list(itertools.product(POINTS, DEPTHS, FILLINGS))


def star_name(kind: tuple[int, float, str]) -> str:
    """Such as 5p_cut35_dotted."""
    points, depth, filling = kind
    return f"{points}p_cut{100 * depth:.0f}_{filling}"


def write_images(root: Path, split: str, kinds: dict[str, Callable[[np.random.Generator], Pixels]], count: int) -> None:
    """`count` images of each kind."""
    for number, (name, draw) in enumerate(kinds.items()):
        folder = root / split / name
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            seed = [sum(map(ord, split)), number, i]
            Image.fromarray(draw(np.random.default_rng(seed))).save(folder / f"{i:03d}.png")


def write_data(out: Path, *, things: int, train: int, test: int) -> tuple[Path, Path]:
    """The folder to pretrain on and the folder of stars, whose test classes (every second kind) train lacks."""
    kinds = {kind: partial(thing, kind) for kind in THINGS}
    write_images(out / "things", "train", kinds, things)
    write_images(out / "things", "val", kinds, max(2, things // 10))
    for split, first, count in (("train", 0, train), ("test", 1, test)):
        kinds = {star_name(kind): partial(star, *kind) for kind in STARS[first::2]}
        write_images(out / "stars", split, kinds, count)
    known = out / "stars_known"  # the same training images, for classifiers, which know no others
    known.mkdir(exist_ok=True)
    if not (known / "train").exists():
        (known / "train").symlink_to((out / "stars" / "train").resolve(), target_is_directory=True)
    return out / "things", out / "stars"


# Training


def settings(steps: int) -> dict[str, Any]:
    """What all runs share."""
    return {
        "steps": steps, "batch_size": 16, "size": SIZE, "device": "cpu", "workers": 0, "overwrite": True,
        "checkpoint_every": steps, "crop": (0.875, 1.0), "jitter": 0.2,
        "optim": Optim(lr=1e-3, weight_decay=0.01, lr_mult={}, decay_mult={}, clip=5.0),
        "schedule": Schedule(kind="cosine", warmup=steps // 20),
    }  # fmt: skip


def classification(data: Path, out: Path, steps: int, **changes: Any) -> Classification:
    """A classifier on the small backbone."""
    options = {"backbone": BACKBONE}
    return Classification(
        data=str(data), out=str(out), model="classifier", options=options, **(settings(steps) | changes)
    )


def retrieval(data: Path, out: Path, steps: int, base: Path, options: dict[str, Any]) -> Retrieval:
    """FRPT over the backbone of `base`."""
    options = {"backbone": BACKBONE, **options}
    return Retrieval(data=str(data), out=str(out), model="frpt", options=options, init=str(base), **settings(steps))


def recall_of_scores(run: Path, source: ImageFolder) -> dict[str, Any]:
    """Recall@K where the vectors are a classifier's probabilities of the training classes."""
    model = load_model(run)
    whole = Whole(source, "test", model.spec)
    images, labels, _ = zip(*(whole[i] for i in range(len(whole))), strict=True)
    vectors = torch.cat([scores(model, torch.stack(images[i : i + 64])) for i in range(0, len(images), 64)]).numpy()
    return {f"recall_at_{k}": value for k, value in recall_at_k(vectors, np.array(labels)).items()}


def features(run: Path, source: ImageFolder) -> dict[str, Any]:
    """Recall@K of a run's embeddings."""
    return retrieval_figures(load_retriever(str(run), device="cpu"), source, "test")


def study(
    out: Path, ways: list[str], *, base_steps: int, steps: int, things: int, train: int, test: int
) -> tuple[float, list[Row]]:
    """The top-1 accuracy of the pretrained backbone on its own val images, and one row for each way."""
    known, stars = write_data(out, things=things, train=train, test=test)
    source, base = open_image_folder(stars, own_classes=True), out / "base"
    top1 = train_classifier(classification(known, base, base_steps))["top1"]
    rows = [Row("frozen features", 0, features(base, source), 0.0)]
    print(f"backbone: top-1 {100 * top1:.1f}", rows[-1], sep="\n", flush=True)
    for way in ways:
        run, started = out / way, time.perf_counter()
        if way in FORMS:
            train_retriever(retrieval(stars, run, steps, base, FORMS[way]))
        else:
            frozen = ["^backbone"] if way == "linear" else []
            optim = replace(settings(steps)["optim"], freeze=frozen)
            train_classifier(classification(out / "stars_known", run, steps, init=str(base), optim=optim))
        seconds = time.perf_counter() - started
        found = recall_of_scores(run, source) if way == "linear" else features(run, source)
        rows.append(Row(WAYS[way], trained(run, "head" if way == "linear" else ""), found, seconds))
        print(rows[-1], flush=True)
    return top1, rows


def trained(run: Path, part: str) -> int:
    """The number of parameters that trained, of those with `part` in their names."""
    named = load_model(run).named_parameters()
    return sum(value.numel() for name, value in named if value.requires_grad and part in name)


def draw_sheet(out: Path, sheet: Path, *, run: str = "paper", every: int) -> None:
    """Neighbours of a few test images, one of every few classes, by FRPT."""
    gallery, queries = out / "gallery.npz", out / "queries"
    write_gallery(str(out / "stars" / "test"), str(out / run), gallery, device="cpu")
    shutil.rmtree(queries, ignore_errors=True)
    for folder in sorted((out / "stars" / "test").iterdir())[::every]:
        (queries / folder.name).mkdir(parents=True)
        (queries / folder.name / "000.png").symlink_to((folder / "000.png").resolve())
    known = read_gallery(gallery)
    save_sheet(sheet, search_files(str(queries), known, str(out / run), top=5, device="cpu"), known)


def report(top1: float, rows: list[Row], counts: str) -> str:
    """The committed table."""
    command = " ".join(["OMP_NUM_THREADS=1 python examples/retrieval_study.py", *sys.argv[1:]])
    table = [
        f"| {row.name} | " + " | ".join(f"{100 * row.figures[f'recall_at_{k}']:.2f}" for k in (1, 2, 4, 8))
        + f" | {row.trained:,} | {row.seconds:.0f} s |"
        for row in rows
    ]  # fmt: skip
    lines = [
        "# Retrieval study", "", f"{counts} `{BACKBONE}` reached top-1 {100 * top1:.2f} on its own kinds.",
        "", "| vectors | R@1 | R@2 | R@4 | R@8 | trained | time |", "|---|---:|---:|---:|---:|---:|---:|", *table, "",
        f"Measured {date.today()} on CPU ({os.cpu_count()} cores, {torch.get_num_threads()} thread), python "
        f"{platform.python_version()}, torch {torch.__version__}, segvit {segvit.__version__}. One run each, one seed.",
        "", f"    {command}", "", "![neighbours](retrieval_study.png)", "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/retrieval"))
    parser.add_argument("--ways", default="linear,paper,paper_bottleneck", help=f"Of {', '.join(WAYS)}.")
    parser.add_argument("--base_steps", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--things", type=int, default=200, help="Images of each kind that the backbone learns.")
    parser.add_argument("--train", type=int, default=30, help="Images of each training kind of stars.")
    parser.add_argument("--test", type=int, default=10, help="Images of each test kind of stars.")
    parser.add_argument("--table", type=Path, help="Where to write the report, a Markdown file, and beside it a sheet.")
    given = parser.parse_args()

    counts = {"things": given.things, "train": given.train, "test": given.test}
    top1, rows = study(given.out, given.ways.split(","), base_steps=given.base_steps, steps=given.steps, **counts)
    words = (
        f"Backbone: {len(THINGS)} kinds of {given.things} images, {given.base_steps} steps. Stars: 18 kinds of "
        f"{given.train} images to train on, 18 others of {given.test} to search; {given.steps} steps of 16 images each."
    )
    text = report(top1, rows, words)
    if given.table is not None:
        write_text(given.table, text)
        draw_sheet(given.out, given.table.with_suffix(".png"), every=6)
    print(text)


if __name__ == "__main__":
    main()
