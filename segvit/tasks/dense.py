"""Dense segmentation from a recipe: build, train, validate, save, report. Where zoo, data and engine meet."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segvit.contracts import Batch, Classes, InputSpec, UserError
from segvit.data.dataset import Dataset, open_dataset
from segvit.data.loading import train_batches
from segvit.engine.evaluate import Evaluation, evaluate
from segvit.engine.fit import Procedure, Progress, fit
from segvit.engine.optim import make_optimizer, parameter_rates
from segvit.engine.run import BEST_STATE, STATE, RunLog, claim, locked, write_environment
from segvit.engine.state import copy_state, random_state, read_state, restore_random, save_state
from segvit.files import write_json
from segvit.inference.predictor import Predictor
from segvit.metrics.confusion import Metrics
from segvit.tasks.experiment import Experiment
from segvit.tasks.finish import finish
from segvit.zoo import create_model, find_system, load_model, match_classes, save_model

if TYPE_CHECKING:
    from segvit.contracts import Model


LARGE_RATE = 1e-2  # of AdamW, above which training from any start usually fails


@dataclass(frozen=True)
class Result:
    """What a finished run has to show."""

    folder: Path
    metrics: Metrics | None  # of the saved model on the val split; None where there is none
    best_step: int


def train(experiment: Experiment) -> Result:
    """Train a dense system as the experiment says; everything is written to `experiment.out`.

    Raises UserError for anything the user can mend: data, names, sizes, weights, an existing run, a loss that is NaN.
    """
    folder = Path(experiment.out)
    experiment = replace(experiment, data=located(experiment.data))
    accelerator = make_accelerator(experiment)
    dataset = open_dataset(experiment.data)
    if "train" not in dataset.splits or not dataset.count("train"):
        raise UserError(f"{experiment.data} has no training images; it has {', '.join(dataset.splits) or 'no splits'}")
    if experiment.num_classes not in (None, len(dataset.classes)):
        raise UserError(
            f"{experiment.data} has {len(dataset.classes)} classes, the recipe expects {experiment.num_classes}; "
            "correct the class table, or set num_classes to null"
        )
    check_loss(experiment)
    set_seed(experiment.seed)
    resumes = experiment.resume and (folder / STATE).exists()  # then the checkpoint holds all weights
    starts = replace(experiment, weights=None, init=None) if resumes else experiment
    model = build_model(starts, dataset.classes).to(accelerator.device)
    with locked(folder) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            claim(folder, asdict(experiment))
            write_environment(folder)
            write_json(folder / "data_report.json", describe(dataset, experiment.data))
        accelerator.wait_for_everyone()
        run = Run(experiment, folder, dataset, model, accelerator)
        try:
            run.resume()
            run.start_message()
            run.fit()
            metrics = finish(run.folder, dataset, experiment, log=run.log) if accelerator.is_main_process else None
        finally:
            run.log.close()
    return Result(folder, metrics, run.progress.best_step)


class Run:
    """One training run: the objects that the loop, the checkpoints and the validation share."""

    def __init__(
        self, experiment: Experiment, folder: Path, dataset: Dataset, model: Model, accelerator: Accelerator
    ) -> None:
        self.experiment, self.folder, self.dataset, self.accelerator = experiment, folder, dataset, accelerator
        system, classes = find_system(experiment.model), dataset.classes
        counts = {"num_classes": len(classes), "ignore_index": classes.ignore_index}
        self.procedure = Procedure(
            criterion=partial(system.criterion, ignore_index=classes.ignore_index, **experiment.loss),
            normalisers=partial(system.normalisers, **counts),
            schedule=experiment.schedule, steps=experiment.total_steps(dataset.count("train")),
            clip=experiment.optim.clip,
        )  # fmt: skip
        self.rates = parameter_rates(model.named_parameters(), experiment.optim)
        self.plain_model = model
        decay = experiment.ema
        self.average = (
            None if decay is None
            else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        )  # fmt: skip
        self.model, self.optimizer = accelerator.prepare(model, make_optimizer(self.rates, experiment.optim))
        self.progress = Progress()
        start = read_state(folder / STATE)["step"] if experiment.resume and (folder / STATE).exists() else 0
        self.log = RunLog(
            folder, steps=self.procedure.steps, start=start, batch_size=experiment.batch_size,
            main=accelerator.is_main_process,
        )  # fmt: skip

    def resume(self) -> None:
        """Take up the last checkpoint, if the experiment asks for it and there is one."""
        if not self.experiment.resume:
            return
        if not (self.folder / STATE).exists():
            self.log.message("no checkpoint was written yet; starting from the beginning")
            return
        state = read_state(self.folder / STATE)
        self.plain_model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(step=state["step"], best=state["best"], best_step=state["best_step"])
        restore_random(state["random"])
        self.log.message(f"resumed at step {self.progress.step}")

    def save(self, *, best: bool) -> None:
        """Write the checkpoint of this step; `best` also keeps a copy."""
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "model": self.plain_model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "step": self.progress.step, "best": self.progress.best, "best_step": self.progress.best_step,
            "random": random_state(),
        }  # fmt: skip
        save_state(self.folder / STATE, state)
        if best:
            copy_state(self.folder / STATE, self.folder / BEST_STATE)

    def fit(self) -> None:
        """Run the loop to the end, with validations and checkpoints on the way."""
        if self.progress.step >= self.procedure.steps:
            self.log.message(f"the run is finished: {self.progress.step} steps were done")
            return
        loader = train_batches(
            self.dataset, spec=self.plain_model.spec, augment=self.experiment.augment, seed=self.experiment.seed,
            draws=draw_lists(self.experiment, self.accelerator, self.progress.step, self.procedure.steps),
            workers=self.experiment.workers,
        )  # fmt: skip
        fit(
            self.model, self.optimizer, grouped(self.watched(loader), self.experiment.accumulate),
            procedure=self.procedure, accelerator=self.accelerator, progress=self.progress, average=self.average,
            report=self.log.row, after=self.after,
        )  # fmt: skip

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with a warning the first time that one holds nothing to learn from."""
        warned, ignore = False, self.dataset.classes.ignore_index
        for batch in batches:
            if not warned and bool((batch.masks == ignore).all()):
                warned = True
                self.log.message(f"warning: nothing but ignored pixels in {', '.join(batch.names)}; check these masks")
            yield batch

    def after(self, step: int) -> None:
        """After each step: validate and save when it is time, and at the end."""
        last, every = step == self.procedure.steps, self.experiment.val_every
        best = False
        if "val" in self.dataset.splits and (last or (every and step % every == 0)):
            metrics = self.validate()
            self.log.row({"step": step, "val": {"miou": metrics.miou, "macc": metrics.macc, "aacc": metrics.aacc}})
            self.log.message(f"step {step}: validation mIoU {metrics.miou:.4f}")
            nothing_yet = last and not self.progress.best_step  # the figure may be NaN: masks of nothing but ignore
            best = metrics.miou > self.progress.best or nothing_yet
            if best:
                self.progress.best, self.progress.best_step = metrics.miou, step
                self.save_model()
        elif last:
            self.save_model()
        if best or last or step % self.experiment.checkpoint_every == 0:
            self.save(best=best)

    def validate(self) -> Metrics:
        """Metrics of the current (averaged, where there is an average) weights on the val split."""
        count, limit = self.dataset.count("val"), self.experiment.val_images
        chosen = range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        random = random_state()  # what validation draws must not change the training
        found = evaluate(Predictor(self.weights()), self.dataset, "val", indices=mine, workers=self.experiment.workers)
        restore_random(random)
        self.weights().train()
        self.model.train()
        if self.accelerator.num_processes > 1:
            matrix = torch.from_numpy(found.confusion.matrix).to(self.accelerator.device)
            found.confusion.matrix[:] = self.accelerator.reduce(matrix, reduction="sum").cpu().numpy()
        return found.confusion.metrics()

    def weights(self) -> Model:
        """The model that is validated and saved."""
        return self.plain_model if self.average is None else cast("Model", self.average.module)

    def save_model(self) -> None:
        """Write the model folder."""
        if self.accelerator.is_main_process:
            save_model(self.weights(), self.folder / "model")

    def start_message(self) -> None:
        """One line before the first step: what is about to happen."""
        trained = sum(rate.parameter.numel() for rate in self.rates)
        total = sum(parameter.numel() for parameter in self.plain_model.parameters())
        val = self.dataset.count("val") if "val" in self.dataset.splits else 0
        self.log.message(
            f"{self.experiment.model}: {trained / 1e6:.2f} of {total / 1e6:.2f} M parameters train; "
            f"{self.dataset.count('train')} training and {val} validation images, {len(self.dataset.classes)} classes; "
            f"{self.procedure.steps} steps of {self.experiment.batch_size} images on {self.accelerator.device} "
            f"in {self.accelerator.mixed_precision.replace('no', 'fp32')}"
        )
        highest = max(rate.lr for rate in self.rates)
        if self.experiment.optim.name == "adamw" and highest > LARGE_RATE:
            self.log.message(f"warning: a learning rate of {highest:g} is large for AdamW; transformers rarely bear it")


def located(data: str) -> str:
    """A data path as an absolute one, so that the run folder can be used from anywhere."""
    path = Path(data).expanduser()
    return str(path.resolve()) if path.exists() else data


def make_accelerator(experiment: Experiment) -> Accelerator:
    """Device and precision. Raises UserError when CUDA is asked for and absent."""
    if experiment.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda but torch sees no GPU; use --device cpu, or see segvit doctor")
    precision = experiment.precision
    if precision == "auto":
        on_gpu = experiment.device != "cpu" and torch.cuda.is_available()
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    AcceleratorState._reset_state()  # a second run in one process may choose another precision
    mixed = "no" if precision == "fp32" else precision
    return Accelerator(cpu=experiment.device == "cpu", mixed_precision=mixed, step_scheduler_with_optimizer=False)


def build_model(experiment: Experiment, classes: Classes) -> Model:
    """The experiment's model with its input spec; pretrained or initialised from another run where asked for."""
    options = dict(experiment.options)
    if experiment.weights not in (None, "none"):
        options["weights"] = experiment.weights
    model = create_model(experiment.model, classes=classes, **options)
    model.spec = input_spec(experiment, model.spec)
    if experiment.init is not None:
        match_classes(model, load_model(experiment.init))
    return model


def check_loss(experiment: Experiment) -> None:
    """Raises UserError for a loss option that the system's criterion does not have."""
    parameters = inspect.signature(find_system(experiment.model).criterion).parameters.values()
    accepted = [item.name for item in parameters if item.kind is item.KEYWORD_ONLY and item.name != "ignore_index"]
    for name in experiment.loss:
        if name not in accepted:
            raise UserError(f"{experiment.model} has no loss option {name!r}; it has {', '.join(accepted) or 'none'}")


def input_spec(experiment: Experiment, default: InputSpec) -> InputSpec:
    """The experiment's input options over the backbone's mean and standard deviation."""
    given = {name: value for name, value in asdict(experiment.input).items() if value is not None}
    return replace(default, **given)


def draw_lists(experiment: Experiment, accelerator: Accelerator, start: int, steps: int) -> Iterator[list[int]]:
    """The draw numbers of each micro-batch of this process, step by step from `start`.

    Raises UserError when the global batch does not divide into processes and micro-batches.
    """
    parts = experiment.accumulate * accelerator.num_processes
    if experiment.batch_size % parts:
        raise UserError(
            f"batch_size {experiment.batch_size} must be a multiple of accumulate x processes = {parts}; change one"
        )
    size = experiment.batch_size // parts
    for step in range(start, steps):
        for micro in range(experiment.accumulate):
            first = (
                step * experiment.batch_size + (micro * accelerator.num_processes + accelerator.process_index) * size
            )
            yield list(range(first, first + size))


def grouped(batches: Iterator[Batch], count: int) -> Iterator[Sequence[Batch]]:
    """The micro-batches of each step."""
    for first in batches:
        yield [first, *(next(batches) for _ in range(count - 1))]


def describe(dataset: Dataset, source: str) -> dict[str, Any]:
    """What the run folder says of the data."""
    splits = {split: dataset.count(split) for split in dataset.splits}
    return {"data": source, "splits": splits, "classes": list(dataset.classes.names)}


def evaluate_model(
    model: Model, data: str | Dataset, *, split: str = "val", predictor: Predictor | None = None, workers: int = 0
) -> Evaluation:
    """Evaluate a model on a split of a dataset (a source or an open one)."""
    dataset = open_dataset(data) if isinstance(data, str) else data
    return evaluate(predictor or Predictor(model), dataset, split, workers=workers)
