"""The tasks of joint training, dense or detection, as parts that one loop can drive, over one shared backbone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn

from segvit.adapters.places import backbone_of
from segvit.contracts import Batch, UserError
from segvit.data.boxes import open_boxes
from segvit.data.cache import cached
from segvit.data.loading import living, train_batches
from segvit.engine.evaluate import evaluate
from segvit.engine.run import RunLog, plain
from segvit.files import write_json, write_text
from segvit.inference.predictor import Predictor
from segvit.model_folder import save_model
from segvit.tasks.balance import class_balance
from segvit.tasks.console import progress_bar
from segvit.tasks.dense import build_model, check_before, located, open_training
from segvit.tasks.detect import (
    Detection,
    batches,
    coco_figures,
    create_detector,
    need_pycocotools,
    save_detector,
)
from segvit.tasks.experiment import Experiment
from segvit.tasks.finish import finish
from segvit.tasks.procedure import make_procedure
from segvit.tasks.run import draw_lists

if TYPE_CHECKING:
    from segvit.data.dataset import Dataset


class Given(NamedTuple):
    """What a task draws for one step."""

    inputs: tuple[Any, ...]  # of its network
    target: Any  # of its loss
    names: list[str]


class Part(NamedTuple):
    """One task on the way: its network and what a loop does with it."""

    network: nn.Module
    trunk: nn.Module  # the backbone in it
    adapter: list[str]  # names of what an adapter trains in the trunk
    losses: Callable[[Any, Any, dict[str, Tensor]], dict[str, Tensor]]  # (output, target, totals) -> weighted terms
    counts: Callable[[Any], dict[str, Tensor]]  # target -> normalisers
    draws: Callable[[int], Iterator[Given]]  # first step -> what each step draws
    validate: Callable[[], float]  # the figure that counts: mIoU, or AP; NaN where there is no val split
    save: Callable[[], None]
    finish: Callable[[RunLog], None]


class Inputs(dict[str, Any]):
    """What goes to the device by task, with the one method of a tensor that the loop calls."""

    def to(self, device: Any, *, non_blocking: bool = False) -> Inputs:
        """The same on a device."""
        return Inputs({name: send_to_device(value, device, non_blocking=non_blocking) for name, value in self.items()})


class JointNetwork(nn.Module):
    """The networks of all tasks; each sees its own images."""

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.tasks = nn.ModuleDict(networks)

    def forward(self, inputs: Inputs) -> dict[str, Any]:
        return {name: network(*inputs[name]) for name, network in self.tasks.items()}


def dense_part(task: Experiment, folder: Path, accelerator: Accelerator, *, steps: int, first: bool) -> Part:
    """A segmentation task; only the `first` loads backbone weights, since the others take its backbone."""
    task = replace(task, data=located(task.data))
    check_before(task)
    task, dataset = open_training(task)
    with progress_bar("decoding") as progress:
        dataset = cached(dataset, task.cache, workers=task.workers, progress=progress)
    starts = task if first else replace(task, weights=None)
    model = build_model(starts, dataset.classes, levels=dataset.levels).to(accelerator.device)
    balance = class_balance(task, dataset)
    procedure = make_procedure(task, dataset, device=accelerator.device, steps=steps, balance=balance)

    def draws(start: int) -> Iterator[Given]:
        loader: Any = train_batches(
            dataset, spec=model.spec, augment=task.augment, seed=task.seed, workers=task.workers,
            draws=draw_lists(task, accelerator, start, steps), rarity=balance.rarity,
        )  # fmt: skip
        return (Given((batch.images,), batch.masks, batch.names) for batch in living(loader))

    def validate() -> float:
        if not has_val(dataset):
            return math.nan
        predictor = Predictor(model, device=accelerator.device)
        return evaluate(predictor, dataset, "val", workers=task.workers).confusion.metrics().miou

    def close(log: RunLog) -> None:
        write_text(folder / "config.yaml", yaml.safe_dump(plain(asdict(task)), sort_keys=False))
        finish(folder, dataset, task, log=log)

    _, trunk = backbone_of(model)
    own = [] if model.adapter is None else model.adapter.trained
    return Part(
        model, trunk, own, procedure.criterion, procedure.normalisers, draws, validate,
        partial(save_model, model, folder / "model"), close,
    )  # fmt: skip


def detection_part(task: Detection, folder: Path, accelerator: Accelerator, *, first: bool) -> Part:
    """A detection task; its losses are the network's own, on each image's objects."""
    task = replace(task, data=located(task.data))
    dataset = open_boxes(task.data)
    if not dataset.counts.get("train"):
        raise UserError(f"{task.data} has no training images; it has {', '.join(dataset.counts) or 'no splits'}")
    judged = bool(dataset.counts.get("val"))
    if judged:
        need_pycocotools()  # now, and not after hours of training
    options = task.options | {"size": list(task.size)}
    detector = create_detector(task.model, dataset.names, options, weights=task.weights if first else None)
    network = detector.network.to(accelerator.device)

    def draws(start: int) -> Iterator[Given]:
        return (Given((list(images), list(targets)), None, list(names))
                for images, targets, names in batches(dataset, task, start))  # fmt: skip

    def losses(out: Any, target: Any, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"loss_{name}": value for name, value in out.items()}

    def validate() -> float:
        figures = coco_figures(detector, dataset, "val", device=accelerator.device) if judged else {}
        return math.nan if figures.get("AP") is None else figures["AP"]

    def close(log: RunLog) -> None:
        if judged:
            found = coco_figures(detector, dataset, "val", device=accelerator.device)
            write_json(folder / "val.json", found)
            log.message(f"AP {found['AP']}, AP50 {found['AP50']} on {found['images']} validation images")

    neck = network.get_submodule("backbone")
    return Part(
        network, neck.get_submodule("backbone"), [], losses, lambda target: {}, draws, validate,
        partial(save_detector, detector, folder / "model"), close,
    )  # fmt: skip


def has_val(dataset: Dataset) -> bool:
    """Whether there is anything to validate on."""
    return "val" in dataset.splits and dataset.count("val") > 0


def tie(parts: Mapping[str, Part]) -> None:
    """Put the tensors of the first task's backbone in the place of all the others' of the same name.

    Names that one backbone lacks (the last norm) stay with the tasks that have them. Raises UserError for backbones
    whose shapes differ.
    """
    lead, *others = parts
    known = tensors(parts[lead].trunk)
    for name in others:
        own = tensors(parts[name].trunk)
        wrong = [key for key in own if key in known and own[key].shape != known[key].shape]
        if wrong or not own.keys() & known.keys():
            raise UserError(
                f"{name} has another backbone than {lead} ({wrong[0] if wrong else 'no name in common'}); give all "
                "tasks the same one, image_size included"
            )
        for key in own.keys() & known.keys():
            owner, _, leaf = key.rpartition(".")
            module = parts[name].trunk.get_submodule(owner)
            slots: dict[str, Any] = module._parameters if leaf in module._parameters else module._buffers
            slots[leaf] = known[key]


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def joined(parts: Mapping[str, Part], start: int) -> Iterator[list[Batch]]:
    """For each step one micro-batch that holds what every task draws."""
    streams = {name: part.draws(start) for name, part in parts.items()}
    while True:
        given = {name: next(stream, None) for name, stream in streams.items()}
        drawn = {name: one for name, one in given.items() if one is not None}
        if len(drawn) < len(parts):
            return
        inputs: Any = Inputs({name: one.inputs for name, one in drawn.items()})
        targets: Any = Inputs({name: one.target for name, one in drawn.items()})
        yield [Batch(inputs, targets, [f"{name}: {file}" for name, one in drawn.items() for file in one.names])]
