"""Which is the brake of training, loading or the model: both measured alone, on the real data and the real step."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, cycle, islice, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import yaml

from segvit.contracts import Batch, InputSpec, Sample, Size, UserError
from segvit.data.cache import RAM_SHARE, CachedDataset, Ram, cached, estimated_bytes
from segvit.data.dataset import Dataset, open_dataset
from segvit.data.loading import permutation, train_batches
from segvit.data.memory import available_memory
from segvit.engine.fit import Progress, fit
from segvit.engine.optim import make_optimizer, parameter_rates
from segvit.tasks.console import aligned, progress_bar
from segvit.tasks.dense import build_model, check_loss
from segvit.tasks.experiment import Experiment
from segvit.tasks.procedure import make_procedure
from segvit.tasks.run import make_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator

    from segvit.contracts import Model

CACHED_IMAGES = 128  # with a cache, measure on so many images and not wait until all are in it
SPARE = 1.1  # how much faster than the model loading should be, so that the model never waits
WARM_UP = 2  # steps: memory is allocated, kernels are chosen


@dataclass(frozen=True)
class Bench:
    """What `segvit data bench` prints: for machines and for people."""

    report: dict[str, Any]
    text: str


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """What was measured, in images a second and seconds an image, and what there is to change."""

    loader: float  # images a second with the given workers
    model: float
    decode: float  # seconds an image: reading and decoding, in one process
    augment: float  # seconds an image: everything after that
    workers: int
    cache: Literal["none", "ram", "disk"]
    cores: int
    fits_ram: bool = True  # whether all decoded samples do


class Stopwatch:
    """A dataset that adds up the time of its reads."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.reads, self.seconds = dataset, 0, 0.0
        self.classes, self.splits = dataset.classes, dataset.splits
        self.channels, self.levels = dataset.channels, dataset.levels
        self.count, self.name = dataset.count, dataset.name

    def read(self, split: str, i: int) -> Sample:
        """Sample i, decoded."""
        started = time.perf_counter()
        sample = self.dataset.read(split, i)
        self.seconds += time.perf_counter() - started
        self.reads += 1
        return sample


def bench(
    data: str | None = None, *, model: str | None = None, config: str | None = None, batch_size: int | None = None,
    crop: Size | None = None, workers: int | None = None,
    cache: Literal["none", "ram", "disk"] | None = None, seconds: float = 10.0,
) -> Bench:  # fmt: skip
    """Say whether loading or the model is the brake of training.

    Args:
        data: Dataset; None = that of the recipe.
        model: Model to compare with; None = that of the recipe, else segvit_vit_small.
        config: Recipe, of which everything not given here is taken.
        batch_size: Images in a step; None = the recipe's, else 16.
        crop: Height and width of the training crop; None = the recipe's, else 512 512.
        workers: Processes that load data; None = the recipe's, else 2.
        cache: Where decoded images are kept; None = as the recipe says, else nowhere.
        seconds: Length of each measurement.
    """
    given: dict[str, Any] = {"data": data, "model": model, "batch_size": batch_size, "workers": workers, "cache": cache}
    if crop is not None:
        given["augment"] = {"crop": list(crop)}
    return bench_loading(read_experiment(config, given), seconds=seconds)


def read_experiment(config: str | None, given: dict[str, Any]) -> Experiment:
    """The recipe with what is `given` (not None) in its place; without weights, which change no speed."""
    from jsonargparse import ArgumentError, ArgumentParser

    try:
        recipe = yaml.safe_load(Path(config).read_text(encoding="utf-8")) if config else {"steps": 1}
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{config} cannot be read as a recipe ({error})") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{config} is not a recipe; it should hold names and values, see recipes/")
    crop = given.pop("augment", {})
    recipe |= {name: value for name, value in given.items() if value is not None}
    recipe |= {"out": "unused", "weights": None, "init": None, "augment": (recipe.get("augment") or {}) | crop}
    if not recipe.get("data"):
        raise UserError("give a dataset, or a --config that names one")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Experiment)
    try:
        return Experiment(**parser.instantiate(parser.parse_object(recipe)).as_dict())
    except ArgumentError as error:
        raise UserError(f"{config}: {' '.join(str(error).split())}") from error


def bench_loading(experiment: Experiment, *, seconds: float = 10.0) -> Bench:
    """Measure the loader with the experiment's workers and without any, then the training step, `seconds` each.

    Nothing is written but the samples of a disk cache. Raises UserError for whatever `train` would refuse.
    """
    if seconds <= 0:
        raise UserError(f"seconds is {seconds}; measure for some time")
    accelerator = make_accelerator(experiment)
    dataset = open_dataset(experiment.data)
    experiment = experiment.for_channels(dataset.channels)
    check_loss(experiment)
    model = build_model(experiment, dataset.classes, levels=dataset.levels)
    places = [(split, i) for split in ("train", "val") if split in dataset.splits for i in range(dataset.count(split))]
    free = available_memory()
    fits = free is not None and estimated_bytes(dataset, places) <= RAM_SHARE * free
    kept, draws = keep_some(dataset, experiment)
    loader = loader_speed(kept, experiment, model.spec, draws, workers=experiment.workers, seconds=seconds)
    watched = Stopwatch(kept)
    alone = loader_speed(watched, experiment, model.spec, draws, workers=0, seconds=seconds)
    decode = watched.seconds / watched.reads
    speeds = Speeds(
        loader=loader if experiment.workers else alone, decode=decode, augment=max(0.0, 1 / alone - decode),
        model=model_speed(model, experiment, kept, draws, accelerator, seconds=seconds),
        workers=experiment.workers, cache=experiment.cache, cores=os.cpu_count() or 1, fits_ram=fits,
    )  # fmt: skip
    return summary(speeds, alone, experiment, accelerator)


def keep_some(dataset: Dataset, experiment: Experiment) -> tuple[Dataset, Iterator[int]]:
    """The dataset as training will see it once its cache is filled, and the draws to measure with."""
    if experiment.cache == "none":
        return dataset, count()  # ever new images: what the system still has in memory is not measured twice
    number = min(CACHED_IMAGES, dataset.count("train"))
    order = permutation(experiment.seed, 0, dataset.count("train"))[:number]
    places = [("train", int(i)) for i in order]
    with progress_bar("decoding") as progress:
        if experiment.cache == "ram":
            return CachedDataset(dataset, Ram(dataset, places, progress=progress)), cycle(range(number))
        kept = cached(dataset, "disk", workers=experiment.workers)
        for done, place in enumerate(places, start=1):
            kept.read(*place)
            progress(done, number)
    return kept, cycle(range(number))


def loader_speed(
    dataset: Dataset, experiment: Experiment, spec: InputSpec, draws: Iterator[int], *, workers: int, seconds: float
) -> float:
    """Images a second of the training loader when nobody else wants the processor."""
    batches = load(dataset, experiment, spec, draws, size=micro_batch(experiment), workers=workers)
    turn = max(1, workers)  # batches come in turns, one of each worker; only whole turns tell the speed
    names = [batch.names for batch in islice(batches, turn)]
    started, turns, elapsed = time.perf_counter(), 0, 0.0
    while elapsed < seconds:
        names = [batch.names for batch in islice(batches, turn)]
        turns, elapsed = turns + 1, time.perf_counter() - started
    return turns * sum(map(len, names)) / elapsed


def load(
    dataset: Dataset, experiment: Experiment, spec: InputSpec, draws: Iterator[int], *, size: int, workers: int
) -> Iterator[Batch]:
    """Endless batches as training gets them."""
    rarity = np.ones(len(dataset.classes), np.float32) if experiment.augment.rare_crops else None
    lists = (list(islice(draws, size)) for _ in repeat(None))
    return iter(
        train_batches(
            dataset, spec=spec, augment=experiment.augment, seed=experiment.seed, draws=lists, workers=workers,
            rarity=rarity,
        )
    )  # fmt: skip


def model_speed(
    model: Model, experiment: Experiment, dataset: Dataset, draws: Iterator[int], accelerator: Accelerator, *,
    seconds: float,
) -> float:  # fmt: skip
    """Images a second of whole training steps on one batch that is already there.

    The batch is as large as the experiment's micro-batch, or smaller where a single step of it would take too long.
    """
    procedure = make_procedure(experiment, dataset, device=accelerator.device, steps=0)
    # The rate is 0, so that hundreds of steps on one batch cannot diverge.
    rates = parameter_rates(model.named_parameters(), replace(experiment.optim, lr=0.0))
    network, optimizer = accelerator.prepare(model.to(accelerator.device), make_optimizer(rates, experiment.optim))

    def steps(size: int, number: int) -> float:
        batch = next(load(dataset, experiment, model.spec, draws, size=size, workers=0))
        taken: list[float] = []
        fit(
            network, optimizer, repeat([batch]), procedure=replace(procedure, steps=WARM_UP + number),
            accelerator=accelerator, progress=Progress(), average=None,
            report=lambda row: taken.append(row["seconds"]), after=lambda step: None,
        )  # fmt: skip
        return sum(taken[WARM_UP:]) / number

    try:
        single = steps(1, 1)
        size = max(1, min(micro_batch(experiment), round(seconds / (WARM_UP + 1) / single)))
        each = steps(size, 1)
        return size / steps(size, max(1, min(1000, round(seconds / each))))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"{micro_batch(experiment)} crops of {experiment.augment.crop} at once do not fit on the device; lower "
            "batch_size, or raise accumulate in the recipe"
        ) from error


def micro_batch(experiment: Experiment) -> int:
    """Images that are loaded and go through the network at once."""
    return experiment.images_a_step // experiment.accumulate


def verdict(speeds: Speeds) -> tuple[Literal["loader", "model"], str]:
    """Which is the brake, and in one sentence why and what to change."""
    loader, model = f"loader {speeds.loader:.3g} images/s", f"model {speeds.model:.3g} images/s"
    if speeds.loader >= speeds.model:
        if not speeds.workers:
            return "model", f"{model} < {loader}, but without workers each waits for the other: use --workers 1"
        return "model", f"{model} < {loader}: loading is fast enough, the model sets the pace"
    ways = remedies(speeds)
    if not ways:
        best = speeds.loader / max(1, speeds.workers) * speeds.cores
        return "loader", (
            f"{loader} < {model}: all {speeds.cores} cores would load about {best:.3g} images/s; shrink the image "
            "files to the size they are trained at, or use a machine with more cores"
        )
    return "loader", f"{loader} < {model}: use {' or '.join(ways)}"


def remedies(speeds: Speeds) -> list[str]:
    """The options that would make loading faster than the model, the cheapest first."""
    need = SPARE * speeds.model
    each = speeds.loader / max(1, speeds.workers)
    store = "ram" if speeds.fits_ram else "disk"
    undecoded = each * (speeds.decode + speeds.augment) / max(speeds.augment, 1e-9)  # of a worker with a cache
    ways = []
    workers, fewer = math.ceil(need / each), max(1, speeds.workers, math.ceil(need / undecoded))
    if workers <= speeds.cores:
        ways.append(f"--workers {workers}")
    if speeds.cache == "none" and fewer == speeds.workers:
        ways.append(f"--cache {store}")
    elif speeds.cache == "none" and not ways and fewer <= speeds.cores:
        ways.append(f"--cache {store} with --workers {fewer}")
    return ways


def summary(speeds: Speeds, alone: float, experiment: Experiment, accelerator: Accelerator) -> Bench:
    """The figures as JSON and as a table."""
    brake, sentence = verdict(speeds)
    if accelerator.device.type == "cpu" and speeds.workers:
        sentence += "; on the CPU both share the cores, so training is slower than either"
    where = f"{accelerator.device} in {accelerator.mixed_precision.replace('no', 'fp32')}"
    high, wide = experiment.augment.crop
    rows: list[Sequence[str]] = [("", "images/s", "ms an image")]
    if speeds.workers:
        plural = "s" if speeds.workers > 1 else ""
        rows.append((f"loader, {speeds.workers} worker{plural}", f"{speeds.loader:.1f}", f"{1e3 / speeds.loader:.1f}"))
    rows += [
        ("loader, in the main process", f"{alone:.1f}", f"{1e3 / alone:.1f}"),
        ("  reading and decoding", "", f"{1e3 * speeds.decode:.1f}"),
        ("  augmentation and the rest", "", f"{1e3 * speeds.augment:.1f}"),
        (f"model on {where}", f"{speeds.model:.1f}", f"{1e3 / speeds.model:.1f}"),
    ]
    report = {
        "data": experiment.data, "model": experiment.model, "crop": [high, wide], "batch_size": experiment.batch_size,
        "workers": speeds.workers, "cache": speeds.cache, "device": where, "cores": speeds.cores,
        "loader_images_per_second": speeds.loader, "main_process_images_per_second": alone,
        "decode_ms": 1e3 * speeds.decode, "augment_ms": 1e3 * speeds.augment,
        "model_images_per_second": speeds.model, "brake": brake, "advice": sentence,
    }  # fmt: skip
    title = f"{experiment.model} at {high} x {wide} on {experiment.data}, cache {speeds.cache}"
    return Bench(report, f"{title}\n\n{aligned(rows)}\n\n{sentence}")
