"""Few-shot segmentation: train on episodes of a fold's base classes, evaluate on its novel ones, on one device.

The run folder is like that of dense training: config.yaml, env.json, metrics.jsonl, checkpoints/, model/, val.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from numpy.typing import NDArray
from torch import Tensor

from segvit.adapters.handle import Handle
from segvit.adapters.svf import svf
from segvit.contracts import Sample, UserError
from segvit.data.dataset import Dataset, open_dataset
from segvit.data.episodes import (
    MIN_PIXELS,
    Episodes,
    Fold,
    base_mask,
    chosen_fold,
    distort,
    find_objects,
    fit,
    located_folds,
)
from segvit.data.prepare import normalise
from segvit.engine.run import claim, locked, write_environment
from segvit.engine.settings import Optim, Schedule, check_counts
from segvit.files import write_json
from segvit.metrics.few_shot import EpisodeCounts
from segvit.systems.few_shot import BAM, Network, criterion, normalisers
from segvit.tasks.console import progress_bar
from segvit.tasks.dense import located
from segvit.tasks.few_shot_loop import fit_steps, load_draws
from segvit.tasks.few_shot_models import SPEC, base_options, create_few_shot, load_few_shot, save_few_shot, take_base
from segvit.tasks.sources import default_device

Tune = Literal["frozen", "svf", "full"]


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """One training run on a fold (from 0); rates are the effective ones of BAM's recipe, ten times what it states.

    `base` is the run of a base learner, whose backbone is taken, and by BAM the learner too. `tune` says what of the
    backbone trains, at a tenth of the head's rate: nothing, the singular values of stages 2 to 4 (SVF), or all weights
    of these stages; its norms keep their statistics. Training leaves out images that show novel classes, as BAM and
    SVF do, unless `keep_novel`, as PFENet did.
    Raises UserError for numbers that make no run.
    """

    data: str
    out: str
    folds: str = "pascal"
    fold: int = 0
    model: str = "few_shot_baseline_resnet50"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    base: str | None = None
    shots: int = 1
    tune: Tune = "frozen"
    keep_novel: bool = False
    min_pixels: int = MIN_PIXELS
    size: int = 473
    steps: int
    batch_size: int = 8
    episodes: int = 1000
    seeds: int = 5
    optim: Optim = Optim(
        name="sgd", lr=0.05, weight_decay=1e-4, lr_mult={"matcher.backbone": 0.1}, decay_mult={}, clip=None
    )
    schedule: Schedule = Schedule(power=0.9, warmup=0)
    seed: int = 0
    device: Literal["cpu", "cuda"] | None = None
    workers: int = 2
    checkpoint_every: int = 1000
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "steps", "batch_size", "checkpoint_every", "episodes", "seeds", "min_pixels")
        if self.size < 33:
            raise UserError(f"size is {self.size}; give 33 or more, best 8 n + 1 such as 473")
        if self.base is not None and self.weights is not None:
            raise UserError("base and weights both bring a backbone; leave one out")


class Draws:
    """Episode n of training as tensors; images are the query, then its supports.

    (images (1 + K, 3, H, W), binary masks (1 + K, H, W), the query's base classes from 1 (H, W), the class that the
    episode is about among them, the query's name).
    """

    def __init__(self, episodes: Episodes, base: tuple[int, ...], *, size: int) -> None:
        self.episodes, self.base, self.size = episodes, base, size

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, Tensor, int, str]:
        episode = self.episodes.draw(number)
        rng = np.random.default_rng([self.episodes.seed, number, 2])
        ignore, label = self.episodes.dataset.classes.ignore_index, self.base.index(episode.label) + 1
        samples = self.episodes.samples(episode)
        named = [sample._replace(mask=base_mask(sample.mask, self.base, ignore)) for sample in samples]
        images, masks = tensors([distort(sample, self.size, rng) for sample in named])
        return images, (masks == label).byte().masked_fill(masks == 255, 255), masks[0], label, samples[0].name


def tensors(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Query and supports in one: images (1 + K, 3, H, W) and masks (1 + K, H, W)."""
    images = torch.stack([normalise(sample.image, SPEC) for sample in samples])
    return images, torch.from_numpy(np.stack([sample.mask for sample in samples]))


def train_few_shot(run: FewShot) -> dict[str, Any]:
    """Train on the base classes of a fold; returns the figures of its novel classes on val, {} without such a split.

    On the CPU a resumed run ends as one that was never stopped. Raises UserError for anything the user can mend.
    """
    folder, device = Path(run.out), torch.device(run.device or default_device())
    run = replace(run, data=located(run.data), folds=located_folds(run.folds))
    dataset = open_dataset(run.data)
    fold = chosen_fold(run.folds, run.fold, dataset)
    without = () if run.keep_novel else fold.novel
    objects = find_objects(dataset, "train", fold.base, min_pixels=run.min_pixels, without=without)
    episodes = Episodes(dataset, "train", objects, shots=run.shots, seed=run.seed, shuffle=True)
    tests = novel_episodes(dataset, fold, run.shots, run.min_pixels) if "val" in dataset.splits else None
    set_seed(run.seed)
    options = run.options if run.base is None else run.options | base_options(run.base, run.model, fold.base)
    config = {"name": run.model, "options": options, "folds": run.folds, "fold": run.fold, "shots": run.shots}
    config |= {"size": run.size, "min_pixels": run.min_pixels}
    network = create_few_shot(config, weights=run.weights)
    if run.base is not None:
        take_base(network, run.base)
    handle = tune_backbone(network, run.tune)
    network.to(device)
    with locked(folder):
        claim(folder, asdict(run))
        write_environment(folder)
        fit_steps(
            network, lambda start: batches(episodes, run, fold.base, start),
            lambda batch: episode_loss(network, batch, device), folder=folder, steps=run.steps, optim=run.optim,
            schedule=run.schedule, checkpoint_every=run.checkpoint_every, resume=run.resume,
        )  # fmt: skip
        if handle is not None:
            handle.merge()  # the model folder holds plain weights
        save_few_shot(network, config, folder / "model")
        if tests is None:
            return {}
        found = few_shot_figures(network, tests, size=run.size, count=run.episodes, seeds=run.seeds, device=device)
        write_json(folder / "val.json", found)
    return found


def tune_backbone(network: Network, tune: Tune) -> Handle | None:
    """Let a part of the frozen backbone train; the handle merges singular values into plain weights."""
    backbone = network.matcher.backbone
    if tune == "svf":
        return svf(backbone)
    if tune == "full":
        for stage in (backbone.layer2, backbone.layer3, backbone.layer4):
            stage.requires_grad_(True)
    return None


def novel_episodes(dataset: Dataset, fold: Fold, shots: int, min_pixels: int, split: str = "val") -> Episodes:
    """The episodes that test a fold."""
    objects = find_objects(dataset, split, fold.novel, min_pixels=min_pixels)
    return Episodes(dataset, split, objects, shots=shots)


def episode_loss(network: Network, batch: Any, device: torch.device) -> dict[str, Tensor]:
    """The terms of a batch of `Draws`."""
    images, masks, base, labels = (value.to(device) for value in batch[:4])
    totals = normalisers(masks[:, 0], ignore_index=255)
    if isinstance(network, BAM):
        out = network(images[:, 0], images[:, 1:], masks[:, 1:], labels)
        return criterion(out, masks[:, 0], totals, base_masks=base)
    return criterion(network(images[:, 0], images[:, 1:], masks[:, 1:]), masks[:, 0], totals)


def batches(episodes: Episodes, run: FewShot, base: tuple[int, ...], start: int) -> Iterator[Any]:
    """What `Draws` gives, stacked, for each step from `start` to the end."""
    draws = Draws(episodes, base, size=run.size)
    return load_draws(draws, batch_size=run.batch_size, start=start, steps=run.steps, workers=run.workers)


# Measuring


@torch.inference_mode()
def segment(network: Network, samples: list[Sample], *, size: int, device: torch.device) -> NDArray[np.uint8]:
    """The query's binary mask at its own size; `samples` are the query and the supports with binary masks."""
    images, masks = tensors([fit(sample, size) for sample in samples])
    images, masks = images.to(device), masks.to(device)
    logits = network.eval()(images[None, 0], images[None, 1:], masks[None, 1:]).logits
    height, width = samples[0].mask.shape
    side = max(height, width)
    full = F.interpolate(logits, size=(side, side), mode="bilinear", align_corners=True)
    return full[0, :, :height, :width].argmax(0).byte().cpu().numpy()


def few_shot_figures(
    network: Network, episodes: Episodes, *, size: int, count: int, seeds: int, device: torch.device
) -> dict[str, Any]:
    """mIoU and FB-IoU as fractions: means over tests with seeds 0, 1, ... of `count` episodes each, and every test."""
    runs = []
    with progress_bar("evaluating") as progress:
        for seed in range(seeds):
            drawn, counts = replace(episodes, seed=seed), EpisodeCounts(episodes.objects)
            for number in range(count):
                episode = drawn.draw(number)
                samples = drawn.read(episode)
                counts.update(episode.label, segment(network, samples, size=size, device=device), samples[0].mask)
                progress(seed * count + number + 1, seeds * count)
            runs.append(counts.metrics())
    names = episodes.dataset.classes.names
    return {
        "miou": float(np.mean([run.miou for run in runs])), "fb_iou": float(np.mean([run.fb_iou for run in runs])),
        "classes": {names[c]: float(np.mean([run.class_iou[c] for run in runs])) for c in episodes.objects},
        "shots": episodes.shots, "episodes": count, "runs": [run.to_json() for run in runs],
    }  # fmt: skip


def evaluate_few_shot(
    source: str, data: str, *, folds: str | None = None, fold: int | None = None, shots: int | None = None,
    split: str = "val", episodes: int = 1000, seeds: int = 5, device: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The figures of a run or model folder on the novel classes; None = what it was trained with.

    Raises UserError for what `chosen_fold` and `Episodes` refuse, and for no episodes.
    """
    if min(episodes, seeds) < 1:
        raise UserError(f"episodes is {episodes} and seeds {seeds}; both must be 1 or more")
    where = torch.device(device or default_device())
    network, config = load_few_shot(source, device=where)
    dataset = open_dataset(data)
    given = {"folds": folds, "fold": fold, "shots": shots}
    config |= {name: value for name, value in given.items() if value is not None}
    chosen = chosen_fold(config["folds"], config["fold"], dataset)
    tests = novel_episodes(dataset, chosen, config["shots"], config["min_pixels"], split)
    return few_shot_figures(network, tests, size=config["size"], count=episodes, seeds=seeds, device=where)
