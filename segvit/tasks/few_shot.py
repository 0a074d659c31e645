"""Few-shot segmentation: train on episodes of a fold's base classes, evaluate on its novel ones, on one device.

The run folder is like that of dense training: config.yaml, env.json, metrics.jsonl, checkpoints/, model/, val.json.
"""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import set_seed
from numpy.typing import NDArray
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.utils.data import DataLoader

from segvit import __version__
from segvit.adapters.handle import Handle
from segvit.adapters.svf import svf
from segvit.contracts import InputSpec, Sample, UserError
from segvit.data.dataset import Dataset, open_dataset
from segvit.data.episodes import BENCHMARKS, MIN_PIXELS, Episodes, Fold, distort, find_objects, fit, open_folds
from segvit.data.prepare import normalise
from segvit.engine.optim import clip_gradients, make_optimizer, parameter_rates, set_rates
from segvit.engine.run import PREVIOUS_STATE, STATE, claim, locked, write_environment
from segvit.engine.settings import Optim, Schedule
from segvit.engine.state import random_state, replace_state
from segvit.files import open_atomic, write_json, write_text
from segvit.metrics.few_shot import EpisodeCounts
from segvit.systems.few_shot import FEW_SHOT, MetaLearner, PFENet, criterion, normalisers
from segvit.tasks.commands import default_device
from segvit.tasks.console import progress_bar
from segvit.tasks.dense import located
from segvit.tasks.detect import restored

SPEC = InputSpec(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
Network = MetaLearner | PFENet


@dataclass(frozen=True, kw_only=True)
class FewShot:
    """One training run on a fold (from 0); rates are the effective ones of BAM's recipe, ten times what it states.

    `svf` trains the singular values of the backbone's stages 2 to 4 at a tenth of the head's rate; else the backbone is
    frozen. Training leaves out images that show novel classes, as BAM and SVF do, unless `keep_novel`, as PFENet did.
    Raises UserError for numbers that make no run.
    """

    data: str
    out: str
    folds: str = "pascal"
    fold: int = 0
    model: str = "few_shot_baseline_resnet50"
    options: dict[str, Any] = field(default_factory=dict)
    weights: str | None = None
    shots: int = 1
    svf: bool = False
    keep_novel: bool = False
    min_pixels: int = MIN_PIXELS
    size: int = 473
    steps: int
    batch_size: int = 8
    episodes: int = 1000
    seeds: int = 5
    optim: Optim = Optim(
        name="sgd", lr=0.05, weight_decay=1e-4, lr_mult={"singular_values": 0.1}, decay_mult={}, clip=None
    )
    schedule: Schedule = Schedule(power=0.9, warmup=0)
    seed: int = 0
    device: Literal["cpu", "cuda"] | None = None
    workers: int = 2
    checkpoint_every: int = 1000
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        counts = (self.steps, self.batch_size, self.checkpoint_every, self.episodes, self.seeds, self.min_pixels)
        if min(counts) < 1 or self.workers < 0:
            raise UserError(
                "steps, batch_size, checkpoint_every, episodes, seeds and min_pixels must be 1 or more, and workers "
                "0 or more"
            )
        if self.size < 33:
            raise UserError(f"size is {self.size}; give 33 or more, best 8 n + 1 such as 473")


class Draws:
    """Episode n of training as tensors: query, supports, binary masks, and the query's name."""

    def __init__(self, episodes: Episodes, *, size: int) -> None:
        self.episodes, self.size = episodes, size

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor, str]:
        samples = self.episodes.read(self.episodes.draw(number))
        rng = np.random.default_rng([self.episodes.seed, number, 2])
        return *tensors([distort(sample, self.size, rng) for sample in samples]), samples[0].name


def tensors(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    """Query and supports in one: images (1 + K, 3, H, W) and masks (1 + K, H, W)."""
    images = torch.stack([normalise(sample.image, SPEC) for sample in samples])
    return images, torch.from_numpy(np.stack([sample.mask for sample in samples]))


def train_few_shot(run: FewShot) -> dict[str, Any]:
    """Train on the base classes of a fold; returns the figures of its novel classes on val, {} without such a split.

    On the CPU a resumed run ends as one that was never stopped. Raises UserError for anything the user can mend.
    """
    folder, device = Path(run.out), torch.device(run.device or default_device())
    folds = run.folds if run.folds in BENCHMARKS else str(Path(run.folds).absolute())  # found from any folder
    run = replace(run, data=located(run.data), folds=folds)
    dataset = open_dataset(run.data)
    fold = chosen_fold(run.folds, run.fold, dataset)
    without = () if run.keep_novel else fold.novel
    objects = find_objects(dataset, "train", fold.base, min_pixels=run.min_pixels, without=without)
    episodes = Episodes(dataset, "train", objects, shots=run.shots, seed=run.seed, shuffle=True)
    tests = novel_episodes(dataset, fold, run.shots, run.min_pixels) if "val" in dataset.splits else None
    set_seed(run.seed)
    config = {"name": run.model, "options": run.options, "folds": run.folds, "fold": run.fold, "shots": run.shots}
    config |= {"size": run.size, "min_pixels": run.min_pixels}
    network = create_few_shot(config, weights=run.weights)
    handle: Handle | None = svf(network.matcher.backbone) if run.svf else None
    network.to(device)
    with locked(folder):
        claim(folder, asdict(run))
        write_environment(folder)
        fit_few_shot(network, episodes, run, device)
        if handle is not None:
            handle.merge()  # the model folder holds plain weights
        save_few_shot(network, config, folder / "model")
        if tests is None:
            return {}
        found = few_shot_figures(network, tests, size=run.size, count=run.episodes, seeds=run.seeds, device=device)
        write_json(folder / "val.json", found)
    return found


def chosen_fold(folds: str, number: int, dataset: Dataset) -> Fold:
    """One fold of a benchmark or a fold file. Raises UserError when it has no such fold."""
    known = open_folds(folds, dataset.classes)
    if not 0 <= number < len(known):
        raise UserError(f"{folds} has folds 0..{len(known) - 1}, not {number}")
    return known[number]


def novel_episodes(dataset: Dataset, fold: Fold, shots: int, min_pixels: int, split: str = "val") -> Episodes:
    """The episodes that test a fold."""
    objects = find_objects(dataset, split, fold.novel, min_pixels=min_pixels)
    return Episodes(dataset, split, objects, shots=shots)


def fit_few_shot(network: Network, episodes: Episodes, run: FewShot, device: torch.device) -> None:
    """The training loop, from the last checkpoint on where the run is resumed."""
    folder = Path(run.out)
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    optimizer = make_optimizer(parameter_rates(named, run.optim), run.optim)
    start = restored(folder, network, optimizer) if run.resume else 0
    history = folder / "metrics.jsonl"
    rows = history.read_text(encoding="utf-8").splitlines(keepends=True)[:start] if history.is_file() else []
    write_text(history, "".join(rows))
    network.train()
    with history.open("a", encoding="utf-8") as file, progress_bar("training") as progress:
        for step, (images, masks, names) in enumerate(batches(episodes, run, start), start=start):
            started = time.perf_counter()
            _, lr = set_rates(optimizer, run.schedule, step, run.steps)
            images, masks = images.to(device), masks.to(device)
            out = network(images[:, 0], images[:, 1:], masks[:, 1:])
            terms = criterion(out, masks[:, 0], normalisers(masks[:, 0], ignore_index=255))
            total = torch.stack(list(terms.values())).sum()
            if not math.isfinite(float(total.detach())):
                raise UserError(f"the loss is {float(total)} at step {step + 1} ({', '.join(names)}); lower the rate")
            total.backward()
            norm = float(clip_gradients([parameter for _, parameter in named], run.optim.clip))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            row = {"step": step + 1, "loss": float(total.detach()), "lr": lr, "grad_norm": norm}
            row |= {name: float(value.detach()) for name, value in terms.items()}
            file.write(json.dumps(row | {"seconds": time.perf_counter() - started}) + "\n")
            file.flush()
            progress(step + 1, run.steps)
            if step + 1 == run.steps or (step + 1) % run.checkpoint_every == 0:
                state = {"model": network.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
                replace_state(folder / STATE, folder / PREVIOUS_STATE, state | {"random": random_state()})


def batches(episodes: Episodes, run: FewShot, start: int) -> Iterator[Any]:
    """(images (B, 1 + K, 3, H, W), masks (B, 1 + K, H, W), names) of each step from `start` to the end."""
    numbers = [list(range(step * run.batch_size, (step + 1) * run.batch_size)) for step in range(start, run.steps)]
    draws: Any = Draws(episodes, size=run.size)
    own = torch.Generator()  # else the loader draws from the one that dropout is to find as it was saved
    return iter(DataLoader(draws, batch_sampler=numbers, num_workers=run.workers, generator=own))


# Folders


def create_few_shot(config: dict[str, Any], *, weights: str | None = None) -> Network:
    """A network by the `name` and `options` of its config. Raises UserError for those that there are not."""
    name, options = config["name"], config["options"]
    if name not in FEW_SHOT:
        raise UserError(f"unknown few-shot network {name!r}; choose from {', '.join(FEW_SHOT)}")
    accepted = [option for option in inspect.signature(FEW_SHOT[name]).parameters if option not in ("head", "weights")]
    for option in options:
        if option not in accepted:
            raise UserError(f"{name} has no option {option!r}; it has {', '.join(accepted)}")
    return FEW_SHOT[name](weights=weights, **options)


def save_few_shot(network: nn.Module, config: dict[str, Any], folder: Path) -> None:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": "segvit_few_shot", "version": __version__, **config})
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    with open_atomic(folder / "model.safetensors") as file:
        file.write(serialize(state, metadata={"format": "pt"}))


def load_few_shot(source: str | Path, *, device: str | torch.device = "cpu") -> tuple[Network, dict[str, Any]]:
    """Network and config of a run or model folder. Raises UserError when there is none or it is damaged."""
    folder = next((path for path in (Path(source), Path(source) / "model") if (path / "config.json").is_file()), None)
    if folder is None:
        raise UserError(f"{source} holds no few-shot model (no config.json, no model/config.json); give a run folder")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        network = create_few_shot(config)
        network.load_state_dict(load_file(folder / "model.safetensors"))
    except (ValueError, KeyError, RuntimeError, OSError) as error:
        raise UserError(f"{folder} cannot be read as a few-shot model ({str(error)[:200]}); copy it again") from error
    return network.to(device).eval(), config


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
