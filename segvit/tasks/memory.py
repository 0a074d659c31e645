"""The memory of a run: measured before the first step, the batch that fits, and what helps when memory runs out."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import yaml

from segvit.backbones.vit import PlainViT
from segvit.contracts import Batch, InputSpec, UserError
from segvit.data.dataset import Dataset
from segvit.data.loading import Draw, train_batches
from segvit.engine import memory
from segvit.engine.memory import LARGEST, SHARE, Footprint, Precision, amount, is_out_of_memory
from segvit.tasks.experiment import Experiment
from segvit.tasks.procedure import make_procedure
from segvit.zoo import find_system

if TYPE_CHECKING:
    from accelerate import Accelerator

    from segvit.contracts import Model

LOOKED_AT = 8  # crops, of which the one with the most classes is measured: losses of masks grow with them


class Settled(NamedTuple):
    """An experiment whose batch is a number."""

    experiment: Experiment
    need: Footprint | None  # None where nothing had to be measured
    text: str  # how the batch was chosen; "" where it was given


def settle_batch(
    experiment: Experiment, folder: Path, dataset: Dataset, model: Model, accelerator: Accelerator
) -> Settled:
    """Replace `batch_size: auto` by the largest batch that fits, alike in every process; a resumed run keeps its own.

    Raises UserError where nothing fits or the system does not say what is free.
    """
    if experiment.batch_size != "auto":
        return Settled(experiment, None, "")
    stored = folder / "config.yaml"
    if experiment.resume and stored.exists():
        known = yaml.safe_load(stored.read_text(encoding="utf-8"))["batch_size"]
        return Settled(replace(experiment, batch_size=known), None, "")
    need, free = measure(experiment, dataset, model, accelerator), free_here(accelerator)
    if free is None:
        raise UserError("batch_size auto needs to know how much memory is free, and the system does not say; give it")
    parts, most = experiment.accumulate * accelerator.num_processes, min(LARGEST, dataset.count("train"))
    size = memory.largest_batch(need, free, parts=parts, most=most)
    if accelerator.num_processes > 1:
        size = int(accelerator.gather(torch.tensor([size], device=accelerator.device)).min())
    limit = f"{100 * SHARE:.0f} % of the {amount(free)} that are free"
    if size + parts > most:
        limit = f"auto takes at most {LARGEST} images, or all there are; {amount(free)} are free"
    text = f"batch_size auto: {size} images at {crop_text(experiment)} with {amount(need.image)} each ({limit})"
    return Settled(replace(experiment, batch_size=size), need, text)


def measure(
    experiment: Experiment, dataset: Dataset, model: Model, accelerator: Accelerator, *,
    precision: Precision | None = None,
) -> Footprint:  # fmt: skip
    """The footprint of each process in the experiment's training; the model must not be prepared.

    Raises UserError when not even the one or two images fit that are measured.
    """
    procedure = make_procedure(experiment, dataset, device=accelerator.device, steps=1)
    try:
        found = memory.footprint(
            model, fullest_crop(experiment, dataset, model.spec), criterion=procedure.criterion,
            normalisers=procedure.normalisers, precision=precision or chosen_precision(accelerator),
            optim=experiment.optim, average=experiment.ema is not None,
            most=None if experiment.batch_size == "auto" else micro_batch(experiment, accelerator),
        )  # fmt: skip
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return found.sharded(accelerator.num_processes) if experiment.shard else found
    raise UserError(
        f"out of memory: not even one or two crops of {crop_text(experiment)} fit, {free_text(accelerator)}; use a "
        "smaller model or a smaller augment.crop"
    )


def fullest_crop(experiment: Experiment, dataset: Dataset, spec: InputSpec) -> Batch:
    """Of the first crops of the run, the one with the most classes, at the largest of its passes."""
    factor = max(experiment.augment.passes, default=1.0)
    draws: list[Draw] = [(draw, factor) for draw in range(min(LOOKED_AT, dataset.count("train")))]
    loader = train_batches(
        dataset, spec=spec, augment=replace(experiment.augment, rare_crops=0.0), seed=experiment.seed, draws=[draws],
        workers=0,
    )  # fmt: skip
    batch: Batch = next(iter(loader))
    chosen = int(np.argmax([len(mask.unique()) for mask in batch.masks]))
    return Batch(batch.images[chosen : chosen + 1], batch.masks[chosen : chosen + 1], [batch.names[chosen]])


def micro_batch(experiment: Experiment, accelerator: Accelerator) -> int:
    """Images that go through the network at once; one where the batch does not divide, which training refuses."""
    return max(1, experiment.images_a_step // (experiment.accumulate * accelerator.num_processes))


def memory_text(experiment: Experiment, need: Footprint, accelerator: Accelerator) -> str:
    """The estimate for the console, with a warning where it is more than there is."""
    images, free = micro_batch(experiment, accelerator), free_here(accelerator)
    text = f"memory: about {need.text(images)}; {free_text(accelerator)}"
    return text if free is None or need.coming(images) <= free else f"{text}; warning: this will hardly fit"


def out_of_memory(
    experiment: Experiment, dataset: Dataset, model: Model, accelerator: Accelerator, need: Footprint
) -> UserError:
    """What was needed, what there is, and how much each of the options would save, measured on this model.

    The model must not be prepared, and the run's tensors must be gone.
    """
    images = micro_batch(experiment, accelerator)
    size = f"{experiment.batch_size} of {crop_text(experiment)}"
    ways = [f"--accumulate {experiment.accumulate * factor} saves {amount(need.image * (images - images // factor))}"
            for factor in range(2, images + 1) if not images % factor][:1]  # fmt: skip
    for option, other in [] if experiment.shard else alternatives(experiment, dataset, model, accelerator):
        if other.total(images) < need.total(images):
            ways.append(f"{option} saves {amount(need.total(images) - other.total(images))}")
    ways.append("or a smaller augment.crop or batch_size")
    needs = f"needs about {amount(need.total(images))}, {free_text(accelerator, more=need.weights)}"
    return UserError(f"out of memory at batch {size} ({needs}): {', '.join(ways)}")


def alternatives(
    experiment: Experiment, dataset: Dataset, model: Model, accelerator: Accelerator
) -> Iterator[tuple[str, Footprint]]:
    """Options that may make a step smaller, with the footprint of each; what cannot even be measured is left out."""
    options: list[tuple[str, list[PlainViT], Precision]] = []
    precision, builder = chosen_precision(accelerator), inspect.signature(find_system(experiment.model).build)
    trunks = [module for module in model.modules() if isinstance(module, PlainViT) and not module.checkpointing]
    if trunks and "checkpointing" in builder.parameters:
        options.append(("--options.checkpointing true", trunks, precision))
    if precision == "fp32" and (accelerator.device.type == "cpu" or torch.cuda.is_bf16_supported()):
        options.append(("--precision bf16", [], "bf16"))
    for option, recomputed, used in options:
        try:
            with checkpointing(recomputed):
                yield option, measure(experiment, dataset, model, accelerator, precision=used)
        except UserError:  # out of memory with one or two images
            continue


@contextmanager
def checkpointing(trunks: list[PlainViT]) -> Iterator[None]:
    """Recompute the blocks of these backbones for a while."""
    for trunk in trunks:
        trunk.checkpointing = True
    try:
        yield
    finally:
        for trunk in trunks:
            trunk.checkpointing = False


def chosen_precision(accelerator: Accelerator) -> Precision:
    """The precision that a run's accelerator was made with."""
    names: dict[str, Precision] = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}
    return names[accelerator.mixed_precision]


def free_here(accelerator: Accelerator) -> int | None:
    """Bytes that this process may still take; processes without a device of their own share what there is."""
    gc.collect()
    free = memory.free_memory(accelerator.device)
    if free is None or accelerator.device.type == "cuda":
        return free
    return free // accelerator.num_processes


def free_text(accelerator: Accelerator, *, more: int = 0) -> str:
    """What is free, and `more` that the run holds already, in words."""
    free = free_here(accelerator)
    return "nobody knows how much is free" if free is None else f"{amount(free + more)} free"


def crop_text(experiment: Experiment) -> str:
    """The training crop, such as 512x512."""
    return "x".join(map(str, experiment.augment.crop))
