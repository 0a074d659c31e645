"""Does tuning the backbone help few-shot segmentation? Frozen, SVF and full tuning on generated families of shapes.

18 classes, each a shape with a texture; colours and grounds say nothing. Base classes are 12 of them, novel ones 6:
each shape and each texture was seen in training, their pairs were not. As in the papers, a small ResNet learns on other
data first, here other shapes and textures; PFENet starts from it, and BAM from a base learner that went on
from it with the base classes. Both learn by episodes of base classes, with the same episodes and steps for each way of
tuning, and are tested on novel classes. What the backbone's rate is to the head's is chosen on episodes of base classes
in val. AdamW instead of the papers' SGD, which needs more steps than are taken here. No download.

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
from safetensors.torch import save_file

import segvit
from segvit.backbones.deep_stem import deep_stem_resnet
from segvit.data.dataset import open_dataset
from segvit.data.episodes import Fold
from segvit.data.prepare import normalise
from segvit.engine.settings import Optim, Schedule
from segvit.files import write_json, write_text
from segvit.tasks.few_shot import FewShot, few_shot_figures, novel_episodes, train_few_shot
from segvit.tasks.few_shot_base import BaseLearning, learn_base
from segvit.tasks.few_shot_models import SPEC, load_few_shot

Plane = NDArray[np.float64]
Tune = Literal["frozen", "svf", "full"]


class Family(NamedTuple):
    """Shapes in rows and columns of -1..1, textures in pixels; the classes are their pairs."""

    shapes: dict[str, Callable[[Plane, Plane], NDArray[np.bool_]]]
    textures: dict[str, Callable[[NDArray[np.intp], NDArray[np.intp]], NDArray[np.bool_]]]

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(texture, shape) of each class."""
        return [(texture, shape) for shape in self.shapes for texture in self.textures]


SIZE, MIN_PIXELS = 32, 60
FAMILY = Family(
    {
        "disc": lambda y, x: y**2 + x**2 < 0.8,
        "square": lambda y, x: np.maximum(abs(y), abs(x)) < 0.75,
        "tent": lambda y, x: (y < 0.75) & (abs(x) < (y + 0.9) * 0.55),
        "ring": lambda y, x: (y**2 + x**2 < 0.95) & (y**2 + x**2 > 0.25),
        "cross": lambda y, x: (np.minimum(abs(y), abs(x)) < 0.3) & (np.maximum(abs(y), abs(x)) < 0.95),
        "bar": lambda y, x: (abs(y) < 0.38) & (abs(x) < 0.98),
    },
    {
        "plain": lambda y, x: np.zeros(y.shape, bool),
        "striped": lambda y, x: (x + y) // 3 % 2 == 0,
        "dotted": lambda y, x: (x % 5 < 2) & (y % 5 < 2),
    },
)
OTHERS = Family(  # which the backbone learns first
    {
        "diamond": lambda y, x: abs(y) + abs(x) < 0.95,
        "dome": lambda y, x: (y**2 + x**2 < 0.95) & (y < 0.2),
        "angle": lambda y, x: (np.maximum(abs(y), abs(x)) < 0.85) & ((y > 0.25) | (x < -0.25)),
        "wedge": lambda y, x: (y**2 + x**2 < 0.9) & ((y > 0) | (x > 0)),
    },
    {
        "level": lambda y, x: y // 3 % 2 == 0,
        "checked": lambda y, x: (x // 3 + y // 3) % 2 == 0,
        "upright": lambda y, x: x // 2 % 2 == 0,
    },
)
NOVEL = [i for i, (texture, shape) in enumerate(FAMILY.pairs)
         if list(FAMILY.shapes).index(shape) % 3 == list(FAMILY.textures).index(texture)]  # fmt: skip
BASE = [i for i in range(len(FAMILY.pairs)) if i not in NOVEL]
TUNES: tuple[Tune, ...] = ("frozen", "svf", "full")
HEAD_RATE, FACTORS = 3e-3, (0.1, 1.0)  # of AdamW; of the backbone's rate on the head's


class Plan(NamedTuple):
    """A network, and what brings its backbone, as in its paper."""

    options: dict[str, Any]
    start: Literal["weights", "base"]


NETWORKS = {
    "pfenet_tiny": Plan({"dim": 64, "bins": [1.0, 0.5, 0.25, 0.125]}, "weights"),
    "bam_tiny": Plan({"dim": 64}, "base"),
}


def draw(
    family: Family, kinds: NDArray[np.intp], rng: np.random.Generator, *, size: int = SIZE
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """An image and its mask: an object of each kind (ids from 1) on a noisy ground; the later one lies above."""
    rows, columns = np.mgrid[:size, :size]
    image = rng.uniform(40, 215, 3) + rng.uniform(-0.8, 0.8, 3) * columns[..., None]
    mask = np.zeros((size, size), np.uint8)
    for kind in kinds:
        texture, shape = family.pairs[kind]
        radius, angle = rng.uniform(9, 13), rng.uniform(-0.4, 0.4)
        top, left = rng.uniform(radius * 0.8, size - radius * 0.8, 2)
        y, x = (rows - top) / radius, (columns - left) / radius
        inside = family.shapes[shape](y * np.cos(angle) - x * np.sin(angle), y * np.sin(angle) + x * np.cos(angle))
        first, second = rng.uniform(0, 255, (2, 3))
        while np.abs(first - second).mean() < 60:
            second = rng.uniform(0, 255, 3)
        marked = inside & family.textures[texture](rows + rng.integers(9), columns + rng.integers(9))
        image[inside], image[marked] = first, second
        mask[inside] = kind + 1
    return np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8), mask


def write_data(folder: Path, train: int, val: int) -> None:
    """Training images of one or two base classes, validation images of any one or two; the classes and the fold."""
    names = ["background", *(f"{texture}_{shape}" for texture, shape in FAMILY.pairs)]
    write_text(folder / "classes.txt", "\n".join(names) + "\n")
    novel, base = (", ".join(str(i + 1) for i in classes) for classes in (NOVEL, BASE))
    write_text(folder / "folds.yaml", f"folds:\n- novel: [{novel}]\n  base: [{base}]\n")
    for number, (split, count, kinds) in enumerate((("train", train, BASE), ("val", val, [*BASE, *NOVEL]))):
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            rng = np.random.default_rng([number, i])
            image, mask = draw(FAMILY, rng.choice(kinds, int(rng.integers(1, 3)), replace=False), rng)
            Image.fromarray(image).save(folder / "images" / split / f"{i:05d}.png")
            Image.fromarray(mask).save(folder / "masks" / split / f"{i:05d}.png")


def pretrain(path: Path, steps: int) -> float:
    """A backbone that learns the other family from nothing, cell by cell of its grid; accuracy on cells of objects."""

    def batch(count: int, seed: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        rng = np.random.default_rng(seed)
        drawn = [draw(OTHERS, rng.choice(len(OTHERS.pairs), int(rng.integers(1, 3)), replace=False), rng, size=SIZE + 1)
                 for _ in range(count)]  # fmt: skip
        cells = np.stack([mask[::8, ::8] for _, mask in drawn])
        return torch.stack([normalise(image, SPEC) for image, _ in drawn]), torch.from_numpy(cells).long()

    torch.manual_seed(0)
    backbone = deep_stem_resnet("tiny")
    head = torch.nn.Conv2d(backbone.dims[-1], 1 + len(OTHERS.pairs), 1)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for step in range(steps):
        images, cells = batch(24, [2, step])
        loss = torch.nn.functional.cross_entropy(head(backbone(images)[-1]), cells)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(f"pretraining, step {step + 1}: loss {float(loss.detach()):.3f}", file=sys.stderr, flush=True)
    save_file(backbone.state_dict(), path)
    with torch.inference_mode():
        images, cells = batch(200, [3])
        found = head(backbone.eval()(images)[-1]).argmax(1)
        return float((found == cells)[cells > 0].float().mean())


def learn_classes(out: Path, steps: int) -> float:
    """BAM's base learner, from the pretrained backbone; its mIoU on background and base classes."""
    found = learn_base(BaseLearning(
        data=str(out / "data"), out=str(out / "base"), folds=str(out / "data/folds.yaml"), backbone="tiny", hidden=64,
        weights=str(out / "backbone.safetensors"), min_pixels=MIN_PIXELS, size=SIZE + 1, steps=steps, batch_size=8,
        optim=Optim(name="adamw", lr=2e-3, weight_decay=1e-2, lr_mult={}, decay_mult={}, clip=5.0),
        schedule=Schedule(power=0.9, warmup=0), device="cpu", workers=0, checkpoint_every=steps,
    ))  # fmt: skip
    return float(found["miou"])


def learn(
    out: Path, model: str, tune: Tune, factor: float, *, seed: int, steps: int, episodes: int
) -> dict[str, Any]:  # fmt: skip
    """One run; returns its figures on novel classes."""
    plan = NETWORKS[model]
    start = {"weights": str(out / "backbone.safetensors"), "base": str(out / "base")}
    optim = Optim(name="adamw", lr=HEAD_RATE, weight_decay=1e-4, lr_mult={"matcher.backbone": factor}, decay_mult={},
                  clip=5.0)  # fmt: skip
    return train_few_shot(FewShot(
        data=str(out / "data"), out=str(out / "run"), folds=str(out / "data/folds.yaml"), model=model,
        options=dict(plan.options), tune=tune, min_pixels=MIN_PIXELS, size=SIZE + 1, steps=steps, batch_size=4,
        episodes=episodes, seeds=1, optim=optim, schedule=Schedule(power=0.9, warmup=0), seed=seed, device="cpu",
        workers=0, checkpoint_every=steps, overwrite=True, **{plan.start: start[plan.start]},
    ))  # fmt: skip


def on_base_classes(out: Path, episodes: int) -> float:
    """mIoU of the last run on episodes of base classes in val."""
    fold = Fold((), tuple(i + 1 for i in BASE))
    tests = novel_episodes(open_dataset(out / "data"), fold, 1, MIN_PIXELS)
    network, config = load_few_shot(out / "run")
    where = torch.device("cpu")
    return float(few_shot_figures(network, tests, size=config["size"], count=episodes, seeds=1, device=where)["miou"])


def choose(out: Path, model: str, tune: Tune, *, steps: int, episodes: int) -> tuple[float, str]:
    """The factor with the best mIoU on episodes of base classes, and what was tried."""
    if tune == "frozen":
        return 0.0, "nothing to choose"
    found = []
    for factor in FACTORS:
        learn(out, model, tune, factor, seed=100, steps=steps, episodes=1)
        found.append(on_base_classes(out, episodes))
    tried = "; ".join(f"{factor:g}: {100 * miou:.2f}" for factor, miou in zip(FACTORS, found, strict=True))
    return FACTORS[int(np.argmax(found))], tried


def prepare(out: Path, arguments: argparse.Namespace) -> list[str]:
    """Data, the pretrained backbone and BAM's base learner; what the report says of them."""
    if out.exists():
        shutil.rmtree(out)
    write_data(out / "data", arguments.train, arguments.val)
    accuracy = pretrain(out / "backbone.safetensors", arguments.pretrain_steps)
    base = learn_classes(out, arguments.base_steps)
    novel = ", ".join(f"{texture} {shape}" for texture, shape in (FAMILY.pairs[i] for i in NOVEL))
    return [
        f"{len(BASE)} base and {len(NOVEL)} novel classes ({novel}); {arguments.train} training images without novel "
        f"classes, {arguments.val} test images of {SIZE} x {SIZE} pixels.",
        f"The backbone learned {len(OTHERS.pairs)} classes of other shapes and textures from nothing, "
        f"{arguments.pretrain_steps} steps; {100 * accuracy:.1f} % of the cells of objects get their class.",
        f"BAM's base learner goes on from it with the base classes, {arguments.base_steps} steps, mIoU "
        f"{100 * base:.2f} with the background.",
    ]


def study(out: Path, arguments: argparse.Namespace) -> list[str]:
    """All runs; the lines of the report."""
    started = time.process_time()
    lines = prepare(out, arguments)
    print(*lines, sep="\n", file=sys.stderr, flush=True)
    notes, rows, everything = list[str](), list[str](), dict[str, Any]()
    for model in NETWORKS:
        for tune in TUNES:
            factor, tried = choose(out, model, tune, steps=arguments.steps // 2, episodes=arguments.episodes)
            found = [learn(out, model, tune, factor, seed=seed, steps=arguments.steps, episodes=arguments.episodes)
                     for seed in range(arguments.seeds)]  # fmt: skip
            miou, fb_iou = (100 * np.array([figures[key] for figures in found]) for key in ("miou", "fb_iou"))
            spread = f" +- {miou.std(ddof=1):.2f}" if len(miou) > 1 else ""
            each = ", ".join(f"{value:.2f}" for value in miou)
            rows.append(f"| {model} | {tune} | {miou.mean():.2f}{spread} | {fb_iou.mean():.2f} | {each} |")
            notes.append(f"- {model}, {tune}: {tried}")
            everything[f"{model} {tune}"] = {"factor": factor, "runs": found}
            print(rows[-1], notes[-1], f"{time.process_time() - started:.0f} s", sep="\n", file=sys.stderr, flush=True)
    write_json(out / "figures.json", everything)
    return [
        *lines, f"Each run: {arguments.steps} steps of 4 episodes, 1 support. The test: {arguments.episodes} episodes "
        "of novel classes, the same for all.", "",
        "| network | backbone | mIoU | FB-IoU | mIoU by seed |", "|---|---|---:|---:|---|", *rows, "",
        f"AdamW, the head's rate {HEAD_RATE:g}. The backbone's rate as a factor on it, and the mIoU on episodes of "
        "base classes in val after half the steps; the best one was taken:", "", *notes, "",
        f"{(time.process_time() - started) / 60:.1f} minutes of CPU time in all.",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/few_shot_study"), help="Folder that is written anew.")
    for name, value in (
        ("train", 600),
        ("val", 300),
        ("pretrain_steps", 300),
        ("base_steps", 150),
        ("steps", 400),
        ("episodes", 200),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--seeds", type=int, default=2, help="Runs of each row.")
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
