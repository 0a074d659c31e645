"""Does tuning the backbone help few-shot segmentation? Frozen, SVF and full tuning on generated families of shapes.

18 classes, each a shape with a texture; colours and grounds say nothing. Base classes are 12 of them, novel ones 6:
each shape and each texture was seen in training, their pairs were not. A small ResNet learns to segment the base
classes from nothing; from its weights PFENet and BAM learn by episodes of base classes, the same episodes and steps for
each way of tuning, and are tested on novel classes. Rates are chosen on episodes of base classes in val. No download.

    OMP_NUM_THREADS=1 python examples/few_shot_study.py --table benchmarks/results/few_shot_study.md
"""

from __future__ import annotations

import argparse
import platform
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import segvit
from segvit.data.dataset import open_dataset
from segvit.data.episodes import Fold
from segvit.engine.settings import Optim, Schedule
from segvit.files import write_json, write_text
from segvit.tasks.few_shot import FewShot, few_shot_figures, novel_episodes, train_few_shot
from segvit.tasks.few_shot_base import BaseLearning, learn_base
from segvit.tasks.few_shot_models import load_few_shot

Plane = NDArray[np.float64]
Tune = Literal["frozen", "svf", "full"]

SIZE, MIN_PIXELS = 64, 60
SHAPES: dict[str, Callable[[Plane, Plane], NDArray[np.bool_]]] = {  # in rows and columns of -1..1
    "disc": lambda y, x: y**2 + x**2 < 0.8,
    "square": lambda y, x: np.maximum(abs(y), abs(x)) < 0.75,
    "tent": lambda y, x: (y < 0.75) & (abs(x) < (y + 0.9) * 0.55),
    "ring": lambda y, x: (y**2 + x**2 < 0.95) & (y**2 + x**2 > 0.25),
    "cross": lambda y, x: (np.minimum(abs(y), abs(x)) < 0.3) & (np.maximum(abs(y), abs(x)) < 0.95),
    "bar": lambda y, x: (abs(y) < 0.38) & (abs(x) < 0.98),
}
TEXTURES: dict[str, Callable[[NDArray[np.intp], NDArray[np.intp]], NDArray[np.bool_]]] = {  # in pixels
    "plain": lambda y, x: np.zeros(y.shape, bool),
    "striped": lambda y, x: (x + y) // 3 % 2 == 0,
    "dotted": lambda y, x: (x % 5 < 2) & (y % 5 < 2),
}
PAIRS = [(texture, shape) for shape in SHAPES for texture in TEXTURES]
NOVEL = [i for i, (texture, shape) in enumerate(PAIRS)
         if list(SHAPES).index(shape) % 3 == list(TEXTURES).index(texture)]  # fmt: skip
BASE = [i for i in range(len(PAIRS)) if i not in NOVEL]
NETWORKS = {"pfenet_tiny": {"dim": 64, "bins": [1.0, 0.5, 0.25, 0.125]}, "bam_tiny": {"dim": 64}}
TUNES: tuple[Tune, ...] = ("frozen", "svf", "full")
HEAD_RATES, BACKBONE_RATES = (0.01, 0.05), (0.1, 1.0, 10.0)


class Rates(NamedTuple):
    """Of the head, and the backbone's as a factor on it."""

    head: float
    backbone: float


def draw(kinds: list[int], rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image and its mask: 2 or 3 objects of different classes (ids from 1) on a noisy ground."""
    rows, columns = np.mgrid[:SIZE, :SIZE]
    image = rng.uniform(40, 215, 3) + rng.uniform(-0.8, 0.8, 3) * columns[..., None]
    mask = np.zeros((SIZE, SIZE), np.uint8)
    for kind in rng.choice(kinds, int(rng.integers(2, 4)), replace=False):
        texture, shape = PAIRS[kind]
        radius, angle = rng.uniform(11, 17), rng.uniform(-0.4, 0.4)
        top, left = rng.uniform(radius * 0.8, SIZE - radius * 0.8, 2)
        y, x = (rows - top) / radius, (columns - left) / radius
        inside = SHAPES[shape](y * np.cos(angle) - x * np.sin(angle), y * np.sin(angle) + x * np.cos(angle))
        first, second = rng.uniform(0, 255, (2, 3))
        while np.abs(first - second).mean() < 60:
            second = rng.uniform(0, 255, 3)
        marked = inside & TEXTURES[texture](rows + rng.integers(9), columns + rng.integers(9))
        image[inside], image[marked] = first, second
        mask[inside] = kind + 1
    return np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8), mask


def write_data(folder: Path, train: int, val: int) -> None:
    """Training images without novel classes, validation images with all; the classes and the fold."""
    names = ["background", *(f"{texture}_{shape}" for texture, shape in PAIRS)]
    write_text(folder / "classes.txt", "\n".join(names) + "\n")
    fold = ", ".join(str(i + 1) for i in NOVEL)
    write_text(folder / "folds.yaml", f"folds:\n- novel: [{fold}]\n  base: [{', '.join(str(i + 1) for i in BASE)}]\n")
    for number, (split, count, kinds) in enumerate((("train", train, BASE), ("val", val, [*BASE, *NOVEL]))):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, mask = draw(kinds, np.random.default_rng([number, i]))
            Image.fromarray(image).save(folder / "images" / split / f"{i:05d}.png")
            Image.fromarray(mask).save(folder / "masks" / split / f"{i:05d}.png")


def learn(out: Path, model: str, tune: Tune, rates: Rates, *, seed: int, steps: int, episodes: int) -> dict[str, Any]:
    """One run from the base learner's weights; returns its figures on novel classes."""
    optim = Optim(name="sgd", lr=rates.head, weight_decay=1e-4, lr_mult={"matcher.backbone": rates.backbone},
                  decay_mult={}, clip=5.0)  # fmt: skip
    return train_few_shot(FewShot(
        data=str(out / "data"), out=str(out / "run"), folds=str(out / "data/folds.yaml"), model=model,
        options=dict(NETWORKS[model]), base=str(out / "base"), tune=tune, min_pixels=MIN_PIXELS, size=SIZE + 1,
        steps=steps, batch_size=4, episodes=episodes, seeds=1, optim=optim, schedule=Schedule(power=0.9, warmup=0),
        seed=seed, device="cpu", workers=0, checkpoint_every=steps, overwrite=True,
    ))  # fmt: skip


def choose(out: Path, model: str, *, steps: int, episodes: int) -> dict[Tune, tuple[Rates, list[str]]]:
    """The rates of each way with the best mIoU on episodes of base classes; the head's rate is that of `frozen`."""
    dataset = open_dataset(out / "data")
    tests = novel_episodes(dataset, Fold((), tuple(i + 1 for i in BASE)), 1, MIN_PIXELS)
    head, chosen = HEAD_RATES[0], dict[Tune, tuple[Rates, list[str]]]()
    for tune in TUNES:
        grid = [Rates(rate, 0.0) for rate in HEAD_RATES] if tune == "frozen" else [
            Rates(head, rate) for rate in BACKBONE_RATES]  # fmt: skip
        found = []
        for rates in grid:
            learn(out, model, tune, rates, seed=100, steps=steps, episodes=1)
            network, config = load_few_shot(out / "run")
            figures = few_shot_figures(network, tests, size=config["size"], count=episodes, seeds=1,
                                       device=torch.device("cpu"))  # fmt: skip
            found.append(figures["miou"])
        best = grid[int(np.argmax(found))]
        head = best.head
        chosen[tune] = (
            best,
            [f"{_rate(rates, tune)}: {100 * miou:.2f}" for rates, miou in zip(grid, found, strict=True)],
        )
    return chosen


def _rate(rates: Rates, tune: Tune) -> str:
    return f"{rates.head:g}" if tune == "frozen" else f"{rates.backbone:g}"


def study(out: Path, arguments: argparse.Namespace) -> list[str]:
    """All runs; the lines of the report."""
    started = time.perf_counter()
    if out.exists():
        shutil.rmtree(out)
    write_data(out / "data", arguments.train, arguments.val)
    base = learn_base(BaseLearning(
        data=str(out / "data"), out=str(out / "base"), folds=str(out / "data/folds.yaml"), backbone="tiny", hidden=64,
        min_pixels=MIN_PIXELS, size=SIZE + 1, steps=arguments.base_steps, batch_size=16, device="cpu", workers=0,
        optim=Optim(name="sgd", lr=0.02, weight_decay=1e-4, lr_mult={}, decay_mult={}, clip=5.0),
        checkpoint_every=arguments.base_steps,
    ))  # fmt: skip
    novel = [f"{PAIRS[i][0]} {PAIRS[i][1]}" for i in NOVEL]
    lines = [
        f"{len(BASE)} base and {len(NOVEL)} novel classes ({', '.join(novel)}); {arguments.train} training images "
        f"without novel classes, {arguments.val} test images of {SIZE} x {SIZE} pixels.",
        f"The base learner reaches mIoU {100 * base['miou']:.2f} on background and base classes after "
        f"{arguments.base_steps} steps from nothing.",
        f"Each run: {arguments.steps} steps of 4 episodes, 1 support; the test: {arguments.episodes} episodes of novel "
        "classes, the same for all.", "",
        "| network | backbone | mIoU | FB-IoU | mIoU by seed |", "|---|---|---:|---:|---|",
    ]  # fmt: skip
    notes, everything = [], dict[str, Any]()
    for model in NETWORKS:
        rates = choose(out, model, steps=arguments.steps // 2, episodes=arguments.episodes // 2)
        for tune in TUNES:
            chosen, tried = rates[tune]
            found = [learn(out, model, tune, chosen, seed=seed, steps=arguments.steps, episodes=arguments.episodes)
                     for seed in range(arguments.seeds)]  # fmt: skip
            miou, fb_iou = (100 * np.array([figures[key] for figures in found]) for key in ("miou", "fb_iou"))
            spread = f" +- {miou.std(ddof=1):.2f}" if len(miou) > 1 else ""
            lines.append(f"| {model} | {tune} | {miou.mean():.2f}{spread} | {fb_iou.mean():.2f} | "
                         f"{', '.join(f'{value:.2f}' for value in miou)} |")  # fmt: skip
            what = "the head" if tune == "frozen" else f"the backbone over the head's ({chosen.head:g})"
            notes.append(f"- {model}, {tune}: rate of {what}: {'; '.join(tried)}")
            everything[f"{model} {tune}"] = {"rates": chosen, "runs": found}
            print(lines[-1], notes[-1], f"{time.perf_counter() - started:.0f} s", sep="\n", file=sys.stderr, flush=True)
    write_json(out / "figures.json", everything)
    means = "Rates tried and the mIoU on episodes of base classes in val after half the steps; the best one was taken:"
    return [*lines, "", means, "", *notes, "", f"{(time.perf_counter() - started) / 60:.1f} minutes in all."]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/few_shot_study"), help="Folder that is written anew.")
    for name, value in (("train", 1200), ("val", 400), ("base_steps", 700), ("steps", 240), ("episodes", 400)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seeds", type=int, default=3, help="Runs of each row.")
    parser.add_argument("--table", type=Path, help="Where to write the report, a Markdown file.")
    arguments = parser.parse_args()
    lines = study(arguments.out, arguments)
    command = f"OMP_NUM_THREADS=1 python examples/few_shot_study.py {' '.join(sys.argv[1:])}".strip()
    closing = (f"Measured {time.strftime('%Y-%m-%d')} on a CPU ({platform.machine()}), torch threads "
               f"{torch.get_num_threads()}, torch {torch.__version__}, segvit {segvit.__version__}.")  # fmt: skip
    text = "\n".join(["# Few-shot study", "", *lines, closing, "", f"    {command}", ""])
    if arguments.table is not None:
        write_text(arguments.table, text)
    print(text)


if __name__ == "__main__":
    main()
