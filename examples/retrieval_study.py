"""FRPT against what it starts from, on generated shapes that differ in little, all in one run.

A small residual network first learns eight kinds of form and filling, from nothing. It is then frozen, and must tell
apart stars that differ by their number of points, how deep they are cut, and their filling: FRPT learns on every
second kind of star and is measured on the others (Recall@K, every image searches all others). Beside it, with the
same images, steps and batches: the frozen features, the class scores of a linear head on them and, with --ways, the
features of the network when it is trained as a whole, and other forms of FRPT.

The learning rate of each way is the best of four on a third of the training kinds, held back for that alone. A study
that was stopped goes on from the runs that are done in --out.

    OMP_NUM_THREADS=1 python examples/retrieval_study.py --table benchmarks/results/retrieval_study.md
"""

from __future__ import annotations

import argparse
import itertools
import json
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
from segvit.files import write_json, write_text
from segvit.metrics.retrieval import recall_at_k
from segvit.model_folder import load_model
from segvit.tasks.classify import Classification, scores, train_classifier
from segvit.tasks.contact_sheet import save_sheet
from segvit.tasks.gallery import read_gallery, search_files, write_gallery
from segvit.tasks.labelled import Whole
from segvit.tasks.retrieve import KS, Retrieval, load_retriever, retrieval_figures, train_retriever

SIZE = 64
BACKBONE = "test_resnet"  # the smallest of timm's residual networks, 0.37 M parameters
KERNEL = 9  # of the paper's prompt, on a map of 16 x 16 cells
FORMS: dict[str, dict[str, Any]] = {  # the head with a bottleneck is one fit of the paper's count: 384 of 2048 channels
    "paper": {"kernel": KERNEL},
    "paper_bottleneck": {"kernel": KERNEL, "bottleneck_dim": 18},
    "released": {"form": "released", "size": SIZE},
}
WAYS = {
    "frozen": "frozen features",
    "linear": "linear head on them, its class scores",
    "whole": "whole network trained, its features",
    "paper": "FRPT, the paper's form",
    "paper_bottleneck": "FRPT, the paper's form with a bottleneck",
    "released": "FRPT, the released form",
}
POINTS, DEPTHS, FILLINGS = (4, 5, 6, 7), (0.35, 0.55, 0.75), ("plain", "striped", "dotted")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
PROMPT = 0.01  # of the rate
KEPT = "row.json"  # in the folder of a run that is done


class Row(NamedTuple):
    """One way to make vectors, trained once, and how well they find."""

    way: str
    rate: float
    seed: int
    trained: int  # parameters
    recall: list[float]  # at KS
    seconds: float  # of the processor, to train


Pixels = NDArray[np.uint8]
Plane = NDArray[np.float64]


# Images


def plane() -> tuple[Plane, Plane]:
    """Rows and columns from -1 to 1."""
    line = np.linspace(-1, 1, SIZE)
    return np.meshgrid(line, line, indexing="ij")


def ground(rng: np.random.Generator) -> Plane:
    """A dark, cluttered ground (SIZE, SIZE, 3): waves and patches of colours that say nothing of the class."""
    rows, columns = plane()
    image = np.broadcast_to(rng.uniform(30, 90, 3), (SIZE, SIZE, 3)).copy()
    for _ in range(3):
        a, b, phase = rng.uniform(-6, 6), rng.uniform(-6, 6), rng.uniform(0, 6)
        image += 10 * np.sin(a * rows + b * columns + phase)[..., None] * rng.uniform(-1, 1, 3)
    for _ in range(4):
        y, x, radius = rng.uniform(-1, 1, 2).tolist() + [rng.uniform(0.08, 0.25)]
        image[np.hypot(rows - y, columns - x) < radius] += rng.uniform(-30, 60, 3)
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
    """A region filled with one of the textures on a random ground, in bright and dark colours."""
    rows, columns = plane()
    image, color, other = ground(rng), rng.uniform(140, 255, 3), rng.uniform(0, 110, 3)
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


def write_images(folder: Path, kinds: dict[str, Callable[[np.random.Generator], Pixels]], count: int) -> None:
    """`count` images of each kind, of a seed that follows from the folder's name, the kind's place and the image's."""
    for number, (name, draw) in enumerate(kinds.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            path = folder / name / f"{i:03d}.png"
            if not path.exists():
                rng = np.random.default_rng([sum(map(ord, folder.name)), number, i])
                Image.fromarray(draw(rng)).save(path)


def link(source: Path, target: Path) -> None:
    """`target` shows the folder `source`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        target.symlink_to(source.resolve(), target_is_directory=True)


def write_data(out: Path, *, things: int, train: int, test: int) -> None:
    """Folders below `out`: things to pretrain on; stars, whose test kinds train lacks; choice, to choose rates on.

    The test of choice is a third of the training kinds, its train the others. NAME_known is the train of NAME alone,
    for classifiers, which know no other kinds.
    """
    kinds = {kind: partial(thing, kind) for kind in THINGS}
    write_images(out / "things" / "train", kinds, things)
    write_images(out / "things" / "val", kinds, max(2, things // 8))
    for split, first, count in (("train", 0, train), ("test", 1, test)):
        kinds = {star_name(kind): partial(star, *kind) for kind in STARS[first::2]}
        write_images(out / "stars" / split, kinds, count)
    for number, kind in enumerate(STARS[::2]):
        name, split = star_name(kind), "test" if number % 3 == 1 else "train"
        link(out / "stars" / "train" / name, out / "choice" / split / name)
    for name in ("stars", "choice"):
        link(out / name / "train", out / f"{name}_known" / "train")


# Training


def settings(out: Path, *, steps: int, rate: float, seed: int = 0) -> dict[str, Any]:
    """What all runs share. The rate of the prompt is low: each output of its kernel sums over 9 x 9 x 32 weights."""
    return {
        "out": str(out), "steps": steps, "batch_size": 16, "size": SIZE, "device": "cpu", "workers": 0, "seed": seed,
        "overwrite": True, "checkpoint_every": steps, "crop": (0.875, 1.0), "options": {"backbone": BACKBONE},
        "optim": Optim(lr=rate, weight_decay=0.01, lr_mult={"prompt": PROMPT}, decay_mult={}, clip=5.0),
        "schedule": Schedule(kind="cosine", warmup=steps // 10),
    }  # fmt: skip


def pretrain(out: Path, steps: int) -> float:
    """The backbone in `out`/base and its top-1 on the val images of its own kinds."""
    run, kept = out / "base", out / "base" / KEPT
    if not kept.exists():
        given = settings(run, steps=steps, rate=4e-3)
        top1 = train_classifier(Classification(data=str(out / "things"), model="classifier", **given))["top1"]
        write_json(kept, {"top1": top1})
    return float(json.loads(kept.read_text(encoding="utf-8"))["top1"])


def measure(way: str, out: Path, data: str, *, steps: int, rate: float, seed: int) -> Row:
    """Train one way on the training kinds of a folder and search the test kinds, unless that has been done."""
    run = out / f"{way}_{data}_{rate:g}_{seed}"
    if not (run / KEPT).exists():
        given, started = settings(run, steps=steps, rate=rate, seed=seed), time.process_time()
        if way in FORMS:
            given["options"] = given["options"] | FORMS[way]
            train_retriever(Retrieval(data=str(out / data), model="frpt", init=str(out / "base"), **given))
        elif way != "frozen":
            given["optim"] = replace(given["optim"], freeze=["^backbone"] if way == "linear" else [])
            known = str(out / f"{data}_known")
            train_classifier(Classification(data=known, model="classifier", init=str(out / "base"), **given))
        seconds = 0.0 if way == "frozen" else time.process_time() - started
        source = open_image_folder(out / data, own_classes=True)
        made = out / "base" if way == "frozen" else run
        found = recall_of_scores(made, source) if way == "linear" else features(made, source)
        count = 0 if way == "frozen" else trained(made, "head" if way == "linear" else "")
        run.mkdir(exist_ok=True)
        write_json(run / KEPT, Row(way, rate, seed, count, [found[f"recall_at_{k}"] for k in KS], seconds)._asdict())
    row = Row(**json.loads((run / KEPT).read_text(encoding="utf-8")))
    print(data, row, flush=True)
    return row


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


def trained(run: Path, part: str) -> int:
    """The number of parameters that trained, of those with `part` in their names."""
    named = load_model(run).named_parameters()
    return sum(value.numel() for name, value in named if value.requires_grad and part in name)


# The report


def choice_table(rows: dict[str, list[Row]]) -> list[str]:
    """Recall@1 on the kinds held back, for each way and rate."""
    lines = [f"| vectors | {' | '.join(f'{rate:g}' for rate in RATES)} |", "|---|" + "---:|" * len(RATES)]
    for way, found in rows.items():
        lines.append(f"| {WAYS[way]} | " + " | ".join(f"{100 * row.recall[0]:.2f}" for row in found) + " |")
    return lines


def result_table(rows: dict[str, list[Row]]) -> list[str]:
    """Recall on the test kinds: means over the seeds, and the single ones at 1."""
    lines = [
        "| vectors | R@1 | R@2 | R@4 | R@8 | R@1 of each seed | rate | trained | CPU time of a run |",
        "|---|---:|---:|---:|---:|---|---:|---:|---:|",
    ]
    for way, found in rows.items():
        means = " | ".join(f"{100 * value:.2f}" for value in np.mean([row.recall for row in found], 0))
        single = ", ".join(f"{100 * row.recall[0]:.2f}" for row in found)
        rate = "" if way == "frozen" else f"{found[0].rate:g}"
        seconds = np.mean([row.seconds for row in found])
        lines.append(f"| {WAYS[way]} | {means} | {single} | {rate} | {found[0].trained:,} | {seconds:.0f} s |")
    return lines


def report(words: str, choice: dict[str, list[Row]], result: dict[str, list[Row]]) -> str:
    """The committed page."""
    command = " ".join(["OMP_NUM_THREADS=1 python examples/retrieval_study.py", *sys.argv[1:]])
    lines = [
        "# Retrieval study", "", words, "", *result_table(result), "",
        "Rates were chosen by Recall@1 on a third of the training kinds, with the rest to train on, of seed 0:", "",
        *choice_table(choice), "",
        f"Measured {date.today()} on CPU ({os.cpu_count()} cores, {torch.get_num_threads()} thread), python "
        f"{platform.python_version()}, torch {torch.__version__}, segvit {segvit.__version__}.", "", f"    {command}",
        "", "Queries of some test kinds, and their five nearest by FRPT (seed 0); green frames are right.", "",
        "![neighbours](retrieval_study.png)", "",
    ]  # fmt: skip
    return "\n".join(lines)


def draw_sheet(out: Path, run: Path, sheet: Path, *, every: int = 4) -> None:
    """Neighbours of the first test image of one of every few kinds, in few colours, so that the file is small."""
    gallery, queries = out / "gallery.npz", out / "queries"
    write_gallery(str(out / "stars" / "test"), str(run), gallery, device="cpu")
    shutil.rmtree(queries, ignore_errors=True)
    for folder in sorted((out / "stars" / "test").iterdir())[::every]:
        (queries / folder.name).mkdir(parents=True)
        (queries / folder.name / "000.png").symlink_to((folder / "000.png").resolve())
    known = read_gallery(gallery)
    save_sheet(sheet, search_files(str(queries), known, str(run), top=5, device="cpu"), known)
    with Image.open(sheet) as picture:
        small = picture.quantize(64, dither=Image.Dither.NONE)
    small.save(sheet, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/retrieval"))
    parser.add_argument("--ways", default="linear,paper", help=f"Of {', '.join(WAYS)}.")
    parser.add_argument("--base_steps", type=int, default=250)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--things", type=int, default=200, help="Images of each kind that the backbone learns.")
    parser.add_argument("--train", type=int, default=30, help="Images of each training kind of stars.")
    parser.add_argument("--test", type=int, default=20, help="Images of each test kind of stars.")
    parser.add_argument("--table", type=Path, help="Where to write the report, a Markdown file, and beside it a sheet.")
    given = parser.parse_args()

    out, ways = given.out, given.ways.split(",")
    write_data(out, things=given.things, train=given.train, test=given.test)
    top1 = pretrain(out, given.base_steps)
    print(f"backbone: top-1 {100 * top1:.1f}", flush=True)
    choice = {"frozen": [measure("frozen", out, "choice", steps=0, rate=0.0, seed=0)] * len(RATES)}
    result = {"frozen": [measure("frozen", out, "stars", steps=0, rate=0.0, seed=0)]}
    for way in ways:
        choice[way] = [measure(way, out, "choice", steps=given.steps, rate=rate, seed=0) for rate in RATES]
        best = max(choice[way], key=lambda row: row.recall[0]).rate
        result[way] = [
            measure(way, out, "stars", steps=given.steps, rate=best, seed=seed) for seed in range(given.seeds)
        ]
    text = report(
        f"Backbone: `{BACKBONE}`, {given.base_steps} steps on {len(THINGS)} kinds of {given.things} images, top-1 "
        f"{100 * top1:.2f} on others of these kinds. Stars: {len(STARS) // 2} kinds of {given.train} images to train "
        f"on, {len(STARS) // 2} other kinds of {given.test} to search; {given.steps} steps of 16 images for each way "
        "and seed. The seeds change the order of images and the first weights, not the images or the backbone.",
        choice, result,
    )  # fmt: skip
    if given.table is not None:
        write_text(given.table, text)
        draw_sheet(out, out / f"paper_stars_{result['paper'][0].rate:g}_0", given.table.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
