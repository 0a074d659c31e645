"""Several tasks, each with its data, head and loss, train one backbone together.

Setting   X. Liang et al., "Effective Adaptation in Multi-Task Co-Training for Unified Autonomous Driving", NeurIPS
          2022, arXiv 2209.08953: segmentation, drivable area and detection on one backbone; pretrain, adapt, finetune.
Found     in its abstract: in the stage in between only adapters train, under all objectives, and the pretrained weights
          stay as they are.
Proposed  all else, which is ours: every step draws a batch of each task, whose images carry that task's labels only;
          the weighted sum of their losses moves the shared backbone; heads, and where there is one the adapter, train
          in both stages, the backbone in the second alone. Rates of backbone and heads differ by `optim.lr_mult`.

The run folder `out` has one log, one metrics.jsonl and one checkpoint; `out/TASK` is what a run of that task alone
would leave: model, figures, report.
"""

from __future__ import annotations

import math
import re
import shutil
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor

from segvit.contracts import UserError
from segvit.engine.fit import Procedure, Progress, fit
from segvit.engine.freeze import freeze, train_mode
from segvit.engine.interrupt import Stopped, StopRequest, stop_requests
from segvit.engine.optim import make_optimizer, parameter_rates
from segvit.engine.pace import Pace
from segvit.engine.run import MAY_CHANGE, PREVIOUS_STATE, STATE, RunLog, claim, locked, plain, write_environment
from segvit.engine.state import newest_state, random_state, replace_state, restore_random
from segvit.tasks.detect import Detection
from segvit.tasks.experiment import Experiment
from segvit.tasks.joint_parts import Inputs, JointNetwork, Part, dense_part, detection_part, joined, tie
from segvit.tasks.run import has_checkpoint, make_accelerator

T = TypeVar("T", Experiment, Detection)

# What one optimiser and one loop have one of, and what this loop does not do.
SAME = ("steps", "optim", "schedule", "seed", "weights", "checkpoint_every")
SAME_DENSE = ("precision", "device", "val_every", "adapter", "adapter_options")
ABSENT = ("epochs", "ema", "shard", "overfit", "val_images", "val_pictures", "log", "accumulate", "resume", "overwrite")


@dataclass(frozen=True, kw_only=True)
class Joint:
    """One joint training run.

    Args:
        out: Run folder to write.
        tasks: A run for each task, the first of them dense. Length, optimiser, seed, weights and adapter must be the
            same in all; `out` of a task is not used.
        weights: Factors on the loss of tasks; 1 for those not named.
        adapt_steps: Steps at the start in which the backbone stands still: the adapt stage. As many as the run has
            steps = it never moves.
        resume: Go on with the run in out from its last checkpoint.
        overwrite: Replace the run in out.
    """

    out: str
    tasks: dict[str, Experiment | Detection]
    weights: dict[str, float] = field(default_factory=dict)
    adapt_steps: int = 0
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if len(self.tasks) < 2 or not isinstance(next(iter(self.tasks.values())), Experiment):
            raise UserError("joint training needs two tasks or more, the first of them a segmentation")
        for name, task in self.tasks.items():
            if not re.fullmatch(r"[A-Za-z]\w*", name) or name in ("checkpoints", "keys", "items", "values", "pop"):
                raise UserError(f"a task cannot be called {name!r}; use another word of letters, digits and _")
            dense = isinstance(task, Experiment)
            for key in (*SAME, *(SAME_DENSE if dense else ())):
                if vars(task)[key] != vars(self.lead)[key]:
                    raise UserError(f"{key} of {name} is not that of the first task; joint training has one")
            for option in fields(Experiment) if dense else ():
                if option.name in ABSENT and vars(task)[option.name] != option.default and vars(task)[option.name]:
                    raise UserError(f"joint training has no {option.name}; leave it out of {name}")
            if not dense and self.lead.adapter is not None:
                raise UserError(f"{name} is a detector, whose folder holds no adapter; leave adapter out")
        for name, weight in self.weights.items():
            if name not in self.tasks or not 0 <= weight < math.inf:
                raise UserError(f"weight {weight} of {name!r}: give tasks of this run ({', '.join(self.tasks)}) a "
                                "number from 0")  # fmt: skip
        if self.lead.steps is None or not 0 <= self.adapt_steps <= self.lead.steps:
            raise UserError(f"adapt_steps is {self.adapt_steps}; give steps, and adapt_steps from 0 to as many")
        if self.resume and self.overwrite:
            raise UserError("resume and overwrite exclude each other; choose one")

    @property
    def lead(self) -> Experiment:
        """The first task, whose settings all share."""
        first = next(iter(self.tasks.values()))
        assert isinstance(first, Experiment)  # __post_init__ saw to it
        return first

    @property
    def steps(self) -> int:
        """The length of the run."""
        assert self.lead.steps is not None  # __post_init__ saw to it
        return self.lead.steps


def train_tasks(joint: Joint) -> dict[str, float]:
    """Train all tasks; returns mIoU, or AP of a detector, by task at the end (NaN without a val split).

    On the CPU a resumed run ends as one that was never stopped. Raises UserError for anything the user can mend.
    """
    folder, accelerator = Path(joint.out), make_accelerator(joint.lead)
    if accelerator.num_processes > 1:
        raise UserError("joint training runs in one process; start it without a launcher")
    set_seed(joint.lead.seed)
    parts = make_parts(joint, folder, accelerator)
    with locked(folder):
        claim(folder, settings(joint))
        write_environment(folder)
        for name in joint.tasks if joint.overwrite else ():
            shutil.rmtree(folder / name, ignore_errors=True)
        with stop_requests() as stop:
            run = JointRun(joint, folder, parts, accelerator, stop)
            try:
                run.fit()
                for name, part in parts.items():
                    run.log.message(f"{name}:")
                    part.finish(run.log)
            finally:
                run.log.close()
    return run.figures


def make_parts(joint: Joint, folder: Path, accelerator: Accelerator) -> dict[str, Part]:
    """The tasks on one backbone, that of the first."""
    parts: dict[str, Part] = {}
    for name, task in joint.tasks.items():
        place, first = folder / name, not parts
        if isinstance(task, Detection):
            parts[name] = detection_part(task, place, accelerator, first=first)
        else:
            parts[name] = dense_part(task, place, accelerator, steps=joint.steps, first=first)
    tie(parts)
    return parts


def settings(joint: Joint) -> dict[str, Any]:
    """What config.yaml says, and a continuation may not change."""
    kept = {name: {key: value for key, value in asdict(task).items() if key not in MAY_CHANGE}
            for name, task in joint.tasks.items()}  # fmt: skip
    config: dict[str, Any] = plain(asdict(joint) | {"tasks": kept, "steps": joint.steps})
    return config


class JointRun:
    """The objects that the loop, the checkpoints and the validation share."""

    def __init__(
        self, joint: Joint, folder: Path, parts: dict[str, Part], accelerator: Accelerator, stop: StopRequest
    ) -> None:
        self.joint, self.folder, self.parts, self.accelerator, self.stop = joint, folder, parts, accelerator, stop
        self.figures = dict.fromkeys(parts, math.nan)
        self.network = JointNetwork({name: part.network for name, part in parts.items()})
        lead = parts[next(iter(parts))]
        # By name of the first task; what its adapter trains is no part of the backbone that stands still.
        self.backbone = [item for name, item in lead.trunk.named_parameters() if name not in lead.adapter]
        self.set_stage(joint.steps)
        rates = {id(rate.parameter): rate for part in reversed(parts.values())
                 for rate in parameter_rates(part.network.named_parameters(), joint.lead.optim)}  # fmt: skip
        self.trained = sum(rate.parameter.numel() for rate in rates.values())
        self.optimizer = accelerator.prepare(make_optimizer(list(rates.values()), joint.lead.optim))
        self.model = accelerator.prepare_model(self.network)
        self.progress = Progress()
        resumes = joint.resume and has_checkpoint(folder)
        if resumes:
            self.resume()
        size = sum(task.batch_size for task in joint.tasks.values() if task.batch_size != "auto")
        self.log = RunLog(
            folder, steps=joint.steps, start=self.progress.step, batch_size=size, main=True, loggers=[]
        )  # fmt: skip
        self.log.message(f"resumed at step {self.progress.step}" if resumes else self.words())

    def words(self) -> str:
        """What is about to happen."""
        stages = f"{self.joint.adapt_steps} of {self.joint.steps} steps" if self.joint.adapt_steps else "no step"
        shared = sum(item.numel() for item in self.backbone)
        return (
            f"{', '.join(self.parts)} on one backbone of {shared / 1e6:.2f} M parameters, which stands still for "
            f"{stages}; {self.trained / 1e6:.2f} M parameters train in all; on {self.accelerator.device}"
        )

    def set_stage(self, step: int) -> None:
        """Whether the backbone moves after that many steps; at the end, as in the last stage."""
        moves = step >= self.joint.adapt_steps and self.joint.adapt_steps < self.joint.steps
        for parameter in self.backbone:
            parameter.requires_grad_(moves)
        for part in self.parts.values():
            freeze(part.network, self.joint.lead.optim.freeze)

    def resume(self) -> None:
        """Take up the last checkpoint."""
        state, _, _ = newest_state([self.folder / place for place in (STATE, PREVIOUS_STATE)])
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.figures = state["figures"]
        self.progress = Progress(step=state["step"], best=state["best"], best_step=state["best_step"])
        restore_random(state["random"])

    def save(self) -> None:
        """Write the checkpoint of this step and keep the one before."""
        scaler = self.accelerator.scaler
        state = {
            "model": self.network.state_dict(), "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None, "figures": self.figures,
            "step": self.progress.step, "best": self.progress.best, "best_step": self.progress.best_step,
            "random": random_state(),
        }  # fmt: skip
        replace_state(self.folder / STATE, self.folder / PREVIOUS_STATE, state)

    def fit(self) -> None:
        """Run the loop to the end."""
        if self.progress.step >= self.joint.steps:
            self.log.message(f"the run is finished: {self.progress.step} steps were done")
            return
        lead = self.joint.lead
        procedure = Procedure(
            criterion=self.losses, normalisers=self.counts, schedule=lead.schedule, steps=self.joint.steps,
            clip=lead.optim.clip,
        )  # fmt: skip
        self.set_stage(self.progress.step)
        fit(
            self.model, self.optimizer, joined(self.parts, self.progress.step), procedure=procedure,
            accelerator=self.accelerator, progress=self.progress, average=None, after=self.after,
            report=Pace(self.log.row, self.log.message, steps=self.joint.steps),
        )  # fmt: skip

    def losses(self, out: dict[str, Any], targets: Any, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weighted terms of all tasks, as TASK/TERM."""
        terms = {}
        for name, part in self.parts.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in totals.items() if key.startswith(f"{name}/")}
            factor = self.joint.weights.get(name, 1.0)
            for term, value in part.losses(out[name], targets[name], own).items():
                terms[f"{name}/{term}"] = factor * value
        return terms

    def counts(self, targets: Any) -> dict[str, Tensor]:
        """The normalisers of all tasks, as TASK/COUNT."""
        given: Inputs = targets
        return {f"{name}/{key}": value
                for name, part in self.parts.items() for key, value in part.counts(given[name]).items()}  # fmt: skip

    def after(self, step: int) -> None:
        """After each step: change the stage, validate and save when it is time, and at the end."""
        last, every = step == self.joint.steps, self.joint.lead.val_every
        if step == self.joint.adapt_steps and not last:
            self.log.message(f"step {step}: the backbone trains from here on")
            self.set_stage(step)
            train_mode(self.model)
        if last or (every and step % every == 0):
            self.validate(step, last=last)
        stopping = 0 if last else self.stop.number
        if last or stopping or step % self.joint.lead.checkpoint_every == 0:
            self.save()
        if stopping:
            self.log.message(f"stopped at step {step} as asked; everything is saved, go on with --resume")
            raise Stopped(stopping)

    def validate(self, step: int, *, last: bool) -> None:
        """Measure every task, and write the model folders where their mean is the best so far."""
        random = random_state()  # what validation draws must not change the training
        self.figures = {name: part.validate() for name, part in self.parts.items()}
        restore_random(random)
        train_mode(self.model)
        known = [figure for figure in self.figures.values() if not math.isnan(figure)]
        mean = sum(known) / len(known) if known else math.nan
        self.log.row({"step": step, "val": {"miou": mean, **self.figures}})
        self.log.message(f"step {step}: " + ", ".join(f"{name} {value:.4f}" for name, value in self.figures.items()))
        if mean > self.progress.best or (last and not self.progress.best_step):
            self.progress.best, self.progress.best_step = mean, step
            for part in self.parts.values():
                part.save()


def read_joint(config: str, given: dict[str, Any]) -> Joint:
    """A YAML of joint training: the keys of a recipe, which count for all, `tasks` and `adapt_steps`.

    A task holds the keys that are its own (data, model, options, batch_size, augment, input, loss ...), or those of a
    detector with `detector` as its name, and `weight` of its loss. `given` (not None) replaces keys of the file.
    Raises UserError for what is no such file.
    """
    try:
        content = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{config} cannot be read as YAML ({error})") from error
    if not isinstance(content, dict) or not isinstance(content.get("tasks"), dict):
        raise UserError(f"{config} names no tasks; it should hold the keys of a recipe and tasks: {{NAME: {{data: ...")
    content |= {name: value for name, value in given.items() if value is not None}
    tasks = {name: dict(task or {}) for name, task in content.pop("tasks").items()}
    own = {key: content.pop(key) for key in ("adapt_steps", "resume", "overwrite") if key in content}
    out = str(content.get("out") or "")
    if not out:
        raise UserError(f"{config} names no run folder; give --out")
    weights = {name: float(task.pop("weight")) for name, task in tasks.items() if "weight" in task}
    made: dict[str, Experiment | Detection] = {}
    for name, task in tasks.items():
        where = f"{config}, {name}"
        if "detector" in task:
            made[name] = detection(task, content, where)
        else:
            both = content | {key: merged(content.get(key), value) for key, value in task.items()}
            made[name] = typed(Experiment, both, where)
    return Joint(out=out, tasks=made, weights=weights, **own)


def merged(shared: Any, own: Any) -> Any:
    """A task's value over the one that counts for all; tables key by key."""
    return shared | own if isinstance(shared, dict) and isinstance(own, dict) else own


def detection(task: dict[str, Any], content: dict[str, Any], where: str) -> Detection:
    """A detection task; what all tasks have in common comes from the recipe."""
    common = ("out", "steps", "seed", "weights", "checkpoint_every", "workers")
    shared: dict[str, Any] = {key: content[key] for key in common if key in content}
    own = {"model" if key == "detector" else key: value for key, value in task.items()}
    rates: dict[str, Any] = {key: content[key] for key in ("optim", "schedule") if key in content}
    lead = typed(Experiment, {"data": "unused", **shared, **rates}, where)
    return replace(typed(Detection, shared | own, where), optim=lead.optim, schedule=lead.schedule)


def typed(kind: type[T], content: dict[str, Any], where: str) -> T:
    """A record from plain values. Raises UserError for unknown keys and values of another type."""
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        return kind(**parser.instantiate(parser.parse_object(content)).as_dict())
    except ArgumentError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
