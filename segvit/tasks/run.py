"""One training run: model, optimiser, loop, validation, checkpoints and log, for any number of processes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from segvit.adapters.files import save_adapter
from segvit.contracts import Batch, UserError
from segvit.data.dataset import Dataset
from segvit.data.loading import Draw, living, train_batches
from segvit.engine.evaluate import evaluate
from segvit.engine.fit import Progress, fit
from segvit.engine.freeze import frozen_parts, train_mode
from segvit.engine.interrupt import Stopped, StopRequest
from segvit.engine.loggers import open_loggers
from segvit.engine.optim import make_optimizer, parameter_rates
from segvit.engine.pace import Pace
from segvit.engine.run import BEST_STATE, PREVIOUS_STATE, STATE, RunLog
from segvit.engine.sharding import load_whole, shard, whole_model_state, whole_optimizer_state
from segvit.engine.state import copy_state, newest_state, random_state, replace_state, restore_random
from segvit.inference.predictor import Predictor
from segvit.metrics.confusion import Metrics
from segvit.model_folder import save_model
from segvit.tasks.balance import class_balance
from segvit.tasks.experiment import Experiment
from segvit.tasks.pictures import side_by_side
from segvit.tasks.procedure import make_procedure

if TYPE_CHECKING:
    from segvit.contracts import Model

STATES = (STATE, PREVIOUS_STATE, BEST_STATE)  # what a run is resumed from, the first that can be read
LARGE_RATE = 1e-2  # of AdamW, above which training from any start usually fails


class Run:
    """One training run: the objects that the loop, the checkpoints and the validation share."""

    def __init__(
        self, experiment: Experiment, folder: Path, dataset: Dataset, model: Model, accelerator: Accelerator,
        stop: StopRequest,
    ) -> None:  # fmt: skip
        self.experiment, self.folder, self.dataset, self.accelerator = experiment, folder, dataset, accelerator
        self.stop = stop
        self.balance = class_balance(experiment, dataset)
        steps = experiment.total_steps(dataset.count("train"))
        self.procedure = make_procedure(
            experiment, dataset, device=accelerator.device, steps=steps, balance=self.balance
        )
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":  # torch has no such norm on the CPU
            model = cast("Model", nn.SyncBatchNorm.convert_sync_batchnorm(model))
        self.plain_model = model
        self.twin: Model | None = None  # of a sharded model: whole, on the CPU, for validation and files
        if experiment.shard:
            self.twin = copy.deepcopy(model).cpu()
            shard(model, accelerator.device)
        self.rates = parameter_rates(model.named_parameters(), experiment.optim)
        decay = experiment.ema
        self.average = (
            None if decay is None
            else AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
        )  # fmt: skip
        # Evaluation mode: mixed precision without DDP around what is sharded already.
        self.model = accelerator.prepare_model(model, evaluation_mode=experiment.shard)
        self.optimizer = accelerator.prepare(make_optimizer(self.rates, experiment.optim))
        self.progress = Progress()
        resumes = experiment.resume and has_checkpoint(folder)
        self.found = newest_state([folder / place for place in STATES]) if resumes else None
        start = self.found[0]["step"] if self.found else 0
        self.log = open_log(experiment, folder, accelerator, steps=self.procedure.steps, start=start)

    def resume(self) -> None:
        """Take up the last checkpoint, if the experiment asks for it and there is one."""
        if self.found is None:
            if self.experiment.resume:
                self.log.message("no checkpoint was written yet; starting from the beginning")
            return
        state, path, problems = self.found
        self.found = None  # it holds a second copy of all weights
        for problem in problems:
            self.log.message(f"warning: {problem}; going on from {path} instead")
        if self.twin is not None:
            load_whole(self.plain_model, self.optimizer.optimizer, state["model"], state["optimizer"])
        else:
            self.plain_model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.progress = Progress(step=state["step"], best=state["best"], best_step=state["best_step"])
        ranks = state["random"]
        restore_random(ranks[self.accelerator.process_index % len(ranks)])
        if len(ranks) != self.accelerator.num_processes:
            self.log.message(
                f"warning: the run had {len(ranks)} processes and now has {self.accelerator.num_processes}; samples "
                "and losses stay the same, dropout does not"
            )
        self.log.message(f"resumed at step {self.progress.step}")

    def save(self, *, best: bool) -> None:
        """Write the checkpoint of this step and keep the one before; `best` also keeps a copy."""
        several = self.accelerator.num_processes > 1
        ranks = gather_object([random_state()]) if several else [random_state()]
        if self.twin is not None:
            weights = whole_model_state(self.plain_model)
            moments = whole_optimizer_state(self.plain_model, self.optimizer.optimizer)
        else:
            weights, moments = self.plain_model.state_dict(), self.optimizer.state_dict()
        if not self.accelerator.is_main_process:
            return
        scaler = self.accelerator.scaler
        state = {
            "model": weights, "optimizer": moments,
            "average": self.average.state_dict() if self.average is not None else None,
            "scaler": scaler.state_dict() if scaler is not None else None,
            "step": self.progress.step, "best": self.progress.best, "best_step": self.progress.best_step,
            "random": ranks,
        }  # fmt: skip
        replace_state(self.folder / STATE, self.folder / PREVIOUS_STATE, state)
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
            workers=self.experiment.workers, rarity=self.balance.rarity,
        )  # fmt: skip
        fit(
            self.model, self.optimizer, grouped(self.watched(loader), self.experiment.accumulate),
            procedure=self.procedure, accelerator=self.accelerator, progress=self.progress, average=self.average,
            report=Pace(self.log.row, self.log.message, steps=self.procedure.steps), after=self.after,
        )  # fmt: skip

    def watched(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, with a warning the first time that one holds nothing to learn from."""
        warned, ignore = False, self.dataset.classes.ignore_index
        for batch in living(batches):
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
        stopping = 0 if last else self.stop_asked()
        if best or last or stopping or step % self.experiment.checkpoint_every == 0:
            self.save(best=best)
        if stopping:
            self.log.message(f"stopped at step {step} as asked; everything is saved, go on with --resume")
            raise Stopped(stopping)

    def stop_asked(self) -> int:
        """The signal that asks any of the processes to stop, 0 for none; all of them learn it at the same step."""
        if self.accelerator.num_processes == 1:
            return self.stop.number
        asked = torch.tensor([self.stop.number], device=self.accelerator.device)
        return int(self.accelerator.gather(asked).max())

    def validate(self) -> Metrics:
        """Metrics of the current (averaged, where there is an average) weights on the val split."""
        count, limit = self.dataset.count("val"), self.experiment.val_images
        chosen = range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]
        mine = chosen[self.accelerator.process_index :: self.accelerator.num_processes]
        random = random_state()  # what validation draws must not change the training
        weights = self.weights()
        predictor = Predictor(weights, device=self.accelerator.device)
        found = evaluate(predictor, self.dataset, "val", indices=mine, workers=self.experiment.workers)
        if self.experiment.val_pictures and self.accelerator.is_main_process:
            shown = range(min(count, self.experiment.val_pictures))
            self.log.picture(self.progress.step, "val", side_by_side(predictor, self.dataset, "val", shown))
        restore_random(random)
        if self.twin is not None:
            self.twin.cpu()
        train_mode(weights)
        train_mode(self.model)
        if self.accelerator.num_processes > 1:
            matrix = torch.from_numpy(found.confusion.matrix).to(self.accelerator.device)
            found.confusion.matrix[:] = self.accelerator.reduce(matrix, reduction="sum").cpu().numpy()
        return found.confusion.metrics()

    def weights(self) -> Model:
        """The model that is validated and saved; with sharding all processes must call it."""
        if self.twin is not None:
            self.twin.load_state_dict(whole_model_state(self.plain_model))
            return self.twin
        return self.plain_model if self.average is None else cast("Model", self.average.module)

    def save_model(self) -> None:
        """Write the model folder, and the adapter folder of a tuned backbone."""
        weights = self.weights()
        if self.accelerator.is_main_process:
            save_model(weights, self.folder / "model")
            if weights.adapter is not None and self.experiment.adapter != "full":  # that would be the whole model again
                save_adapter(weights, self.folder / "adapter", base=base_weights(self.experiment))


def announce(run: Run, memory: str) -> None:
    """A few lines before the first step: what is about to happen, and the `memory` that it takes."""
    experiment, dataset = run.experiment, run.dataset
    trained = sum(rate.parameter.numel() for rate in run.rates)
    total = sum(parameter.numel() for parameter in run.plain_model.parameters())
    frozen = f" (frozen: {frozen_parts(run.plain_model)})" if trained < total else ""
    val = dataset.count("val") if "val" in dataset.splits else 0
    run.log.message(
        f"{experiment.model}: {trained / 1e6:.2f} of {total / 1e6:.2f} M parameters train{frozen}; "
        f"{dataset.count('train')} training and {val} validation images, {len(dataset.classes)} classes; "
        f"{run.procedure.steps} steps of {experiment.batch_size} images on {run.accelerator.device} "
        f"in {run.accelerator.mixed_precision.replace('no', 'fp32')}"
    )
    run.log.message(memory)
    if run.balance.weights is not None:
        run.log.message(run.balance.message(dataset.classes.names))
    highest = max(rate.lr for rate in run.rates)
    if experiment.optim.name == "adamw" and highest > LARGE_RATE:
        run.log.message(f"warning: a learning rate of {highest:g} is large for AdamW; transformers rarely bear it")


def base_weights(experiment: Experiment) -> str:
    """Where an adapter's loader finds the frozen weights: a hub name, an absolute path, or the run's own model."""
    source = experiment.init or experiment.weights
    if source in (None, "none"):
        return "../model"
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def has_checkpoint(folder: Path) -> bool:
    """Whether there is anything to resume from."""
    return any((folder / place).exists() for place in STATES)


def open_log(experiment: Experiment, folder: Path, accelerator: Accelerator, *, steps: int, start: int) -> RunLog:
    """The run's log, with the tools that the experiment names; these hear only of the main process."""
    main = accelerator.is_main_process
    loggers = open_loggers(experiment.log, folder, start=start, config=asdict(experiment)) if main else []
    return RunLog(
        folder, steps=steps, start=start, batch_size=experiment.images_a_step, main=main, loggers=loggers
    )  # fmt: skip


def make_accelerator(experiment: Experiment) -> Accelerator:
    """Device and precision. Raises UserError when CUDA is asked for and absent, and for fp16 without it."""
    if experiment.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda but torch sees no GPU; use --device cpu, or see segvit doctor")
    if experiment.precision == "fp16" and (experiment.device == "cpu" or not torch.cuda.is_available()):
        raise UserError("precision fp16 needs a GPU; on the CPU use --precision bf16 or fp32")
    precision = experiment.precision
    if precision == "auto":
        on_gpu = experiment.device != "cpu" and torch.cuda.is_available()
        precision = "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "fp32"
    AcceleratorState._reset_state()  # a second run in one process may choose another precision
    mixed = "no" if precision == "fp32" else precision
    return Accelerator(cpu=experiment.device == "cpu", mixed_precision=mixed, step_scheduler_with_optimizer=False)


def draw_lists(experiment: Experiment, accelerator: Accelerator, start: int, steps: int) -> Iterator[list[Draw]]:
    """The draws of each micro-batch of this process, step by step from `start`.

    With `augment.passes` each batch comes at one factor after the other.

    Raises UserError when the global batch does not divide into processes and micro-batches.
    """
    batch = experiment.images_a_step
    parts = experiment.accumulate * accelerator.num_processes
    if batch % parts:
        raise UserError(f"batch_size {batch} must be a multiple of accumulate x processes = {parts}; change one")
    size, factors = batch // parts, experiment.augment.passes
    for step in range(start, steps):
        number, place = divmod(step, max(1, len(factors)))
        for micro in range(experiment.accumulate):
            first = number * batch + (micro * accelerator.num_processes + accelerator.process_index) * size
            yield [(draw, factors[place]) if factors else draw for draw in range(first, first + size)]


def grouped(batches: Iterator[Batch], count: int) -> Iterator[Sequence[Batch]]:
    """The micro-batches of each step."""
    for first in batches:
        yield [first, *(next(batches) for _ in range(count - 1))]
