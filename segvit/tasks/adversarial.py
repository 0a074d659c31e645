"""Adversarial training: a dense model as the generator of masks against a critic of images under masks (WGAN-GP).

A step draws `critic_steps` batches. The critic learns on each; the generator on the last, from its supervised loss and
the critic's verdict. All is computed in fp32 on one device, since the gradient penalty needs second derivatives.
The run folder is that of dense training, and so is the model in it; the critic stays in the checkpoints.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import set_seed
from torch import Tensor, nn

from segvit.contracts import Batch, UserError
from segvit.data.dataset import Dataset
from segvit.data.loading import living, train_batches
from segvit.engine.evaluate import evaluate
from segvit.engine.fit import NotFiniteError, Progress, to_device
from segvit.engine.freeze import train_mode
from segvit.engine.interrupt import Stopped, StopRequest, stop_requests
from segvit.engine.optim import clip_gradients, make_optimizer, parameter_rates, set_rates
from segvit.engine.run import PREVIOUS_STATE, STATE, RunLog, claim, locked, write_environment
from segvit.engine.settings import Optim
from segvit.engine.state import newest_state, random_state, replace_state, restore_random
from segvit.files import write_json
from segvit.inference.predictor import Predictor
from segvit.losses.adversarial import ClassAware, class_aware, gradient_penalty, one_hot
from segvit.losses.cross_entropy import logits_at
from segvit.metrics.confusion import Metrics
from segvit.model_folder import save_model
from segvit.systems.castformer import Critic
from segvit.tasks.dense import build_model, check_before, describe, located, open_training
from segvit.tasks.experiment import Experiment
from segvit.tasks.finish import finish
from segvit.tasks.procedure import make_procedure

if TYPE_CHECKING:
    from segvit.contracts import Model

# What dense training knows and this does not.
LEFT_OUT = ("accumulate", "adapter", "class_balance", "ema", "shard", "cache", "overfit", "log", "val_pictures")


@dataclass(frozen=True, kw_only=True)
class Adversarial:
    """What a recipe of dense training, `generator`, needs besides to be trained against a critic.

    `weight` is that of the critic's verdict in the generator's loss (the paper: 0.1), `penalty` that of the gradient
    penalty and `critic_steps` the critic's steps for each of the generator (both unknown; 10 and 1 are ours).
    `see` is how several classes multiply the image, `critic` holds keywords of `segvit.systems.castformer.Critic` and
    `critic_lr` is its learning rate; None = the generator's. Raises UserError for what makes no run.
    """

    generator: Experiment
    weight: float = 0.1
    penalty: float = 10.0
    critic_steps: int = 1
    see: ClassAware = "foreground"
    critic: dict[str, Any] = field(default_factory=dict)
    critic_lr: float | None = None

    def __post_init__(self) -> None:
        defaults: dict[str, Any] = {item.name: item.default for item in fields(Experiment)}
        defaults["log"] = []
        for name in LEFT_OUT:
            if vars(self.generator)[name] != defaults[name]:
                raise UserError(f"adversarial training knows no {name}; leave it out of the recipe")
        if self.generator.augment.passes:
            raise UserError("the critic is made for one size of images; leave augment.passes out of the recipe")
        if self.generator.precision not in ("auto", "fp32"):
            raise UserError(f"precision {self.generator.precision}: the gradient penalty needs fp32; set that")
        if self.weight <= 0 or self.penalty < 0 or self.critic_steps < 1 or (self.critic_lr or 0) < 0:
            raise UserError(
                f"weight {self.weight} must be positive, penalty {self.penalty} and critic_lr not negative, and "
                f"critic_steps {self.critic_steps} 1 or more; segvit train trains without a critic"
            )
        accepted = [name for name in inspect.signature(Critic).parameters if name not in ("image_size", "in_channels")]
        for name in self.critic:
            if name not in accepted:
                raise UserError(f"the critic has no option {name!r}; it has {', '.join(accepted)}")

    def config(self) -> dict[str, Any]:
        """What config.yaml holds: the recipe, and the rest under `adversarial`."""
        return asdict(self.generator) | {
            "adversarial": {name: value for name, value in asdict(self).items() if name != "generator"}
        }


class Player(NamedTuple):
    """One of the two, with its optimiser."""

    network: nn.Module
    optimizer: torch.optim.Optimizer

    def state(self) -> dict[str, Any]:
        """What the checkpoint holds."""
        return {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict[str, Any]) -> None:
        """The inverse of `state`."""
        self.network.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def train_adversarial(run: Adversarial) -> Metrics | None:
    """Train both players; returns the metrics of the saved generator, None where there is no val split.

    On the CPU a resumed run ends as one that was never stopped. Raises UserError for anything the user can mend.
    """
    run = replace(run, generator=replace(run.generator, data=located(run.generator.data)))
    folder, device = Path(run.generator.out), where(run.generator)
    checked = check_before(run.generator)
    plan, dataset = open_training(run.generator)
    steps = plan.total_steps(dataset.count("train"))
    set_seed(plan.seed)
    model = build_model(plan, dataset.classes, levels=dataset.levels).to(device)
    crop = plan.augment.crop
    critic = Critic(image_size=(crop[0], crop[1]), in_channels=dataset.channels, **run.critic).to(device)
    judge = Optim(
        lr=plan.optim.lr if run.critic_lr is None else run.critic_lr, betas=plan.optim.betas, lr_mult={},
        weight_decay=plan.optim.weight_decay, decay_mult=plan.optim.decay_mult, clip=plan.optim.clip,
    )  # fmt: skip
    generator = Player(model, make_optimizer(parameter_rates(model.named_parameters(), plan.optim), plan.optim))
    judging = Player(critic, make_optimizer(parameter_rates(critic.named_parameters(), judge), judge))
    with locked(folder):
        claim(folder, run.config())
        write_environment(folder)
        write_json(folder / "data_report.json", describe(dataset, plan.data) | {"check": checked})
        progress = resumed(folder, generator, judging) if plan.resume else Progress()
        log = RunLog(folder, steps=steps, start=progress.step, batch_size=plan.images_a_step, main=True)
        try:
            with stop_requests() as stop:
                game = Game(replace(run, generator=plan), dataset, model, generator, judging, log=log, steps=steps)
                game.play(progress, stop)
            return finish(folder, dataset, plan, log=log)
        finally:
            log.close()


def where(plan: Experiment) -> torch.device:
    """The device. Raises UserError when CUDA is asked for and absent."""
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda but torch sees no GPU; use --device cpu, or see segvit doctor")
    return torch.device("cpu" if plan.device == "cpu" or not torch.cuda.is_available() else "cuda")


def resumed(folder: Path, generator: Player, critic: Player) -> Progress:
    """Take up the last checkpoint; where there is none yet, the run starts from the beginning."""
    places = [folder / place for place in (STATE, PREVIOUS_STATE)]
    if not any(place.is_file() for place in places):
        return Progress()
    state, _, _ = newest_state(places)
    generator.restore(state["generator"])
    critic.restore(state["critic"])
    restore_random(state["random"])
    return Progress(step=state["step"], best=state["best"], best_step=state["best_step"])


class Game:
    """The loop and what its two halves share."""

    def __init__(
        self, run: Adversarial, dataset: Dataset, model: Model, generator: Player, critic: Player, *, log: RunLog,
        steps: int,
    ) -> None:  # fmt: skip
        self.run, self.dataset, self.model, self.log, self.steps = run, dataset, model, log, steps
        self.generator, self.critic, self.plan = generator, critic, run.generator
        self.device = next(model.parameters()).device
        self.procedure = make_procedure(run.generator, dataset, device=self.device, steps=steps)
        self.ignore = dataset.classes.ignore_index
        self.see = partial(class_aware, mode=run.see)

    def play(self, progress: Progress, stop: StopRequest) -> None:
        """From `progress.step` to the end, with validations and checkpoints."""
        for player in (self.generator, self.critic):
            train_mode(player.network)
        batches = self.batches(progress.step)
        for step in range(progress.step, self.steps):
            started = time.perf_counter()
            row = self.step(batches, step)
            progress.step = step + 1
            self.log.row({"step": progress.step, **row, "seconds": time.perf_counter() - started})
            self.after(progress, stop)

    def batches(self, start: int) -> Iterator[Batch]:
        """The draws of the critic's steps, of which the last is also the generator's."""
        size, first = self.plan.images_a_step, start * self.run.critic_steps
        count = self.steps * self.run.critic_steps
        draws = [list(range(i * size, (i + 1) * size)) for i in range(first, count)]
        loader: Any = train_batches(
            self.dataset, spec=self.model.spec, augment=self.plan.augment, seed=self.plan.seed, draws=draws,
            workers=self.plan.workers,
        )  # fmt: skip
        return (to_device(batch, self.device) for batch in living(loader))

    def step(self, batches: Iterator[Batch], step: int) -> dict[str, Any]:
        """One step of the generator, and those of the critic before it; returns what is logged."""
        _, lr = set_rates(self.generator.optimizer, self.plan.schedule, step, self.steps)
        set_rates(self.critic.optimizer, self.plan.schedule, step, self.steps)
        judged: dict[str, float] = {}
        for number in range(self.run.critic_steps):
            batch = next(batches)
            valid = batch.masks != self.ignore
            with torch.set_grad_enabled(number == self.run.critic_steps - 1):
                out = self.generator.network(batch.images)
                scores = logits_at(out, batch.masks)
                fake = self.see(batch.images, scores.softmax(1), valid)
            truth = one_hot(batch.masks, scores.shape[1], ignore_index=self.ignore).to(scores.dtype)
            judged = self.judge(self.see(batch.images, truth, valid), fake.detach(), batch, step)
        self.critic.network.requires_grad_(False)
        terms = self.procedure.criterion(out, batch.masks, self.procedure.normalisers(batch.masks))
        terms["loss_adversarial"] = -self.run.weight * self.critic.network(fake).mean()
        norm = self.update(self.generator, terms, batch, step)
        self.critic.network.requires_grad_(True)
        values = {name: float(value.detach()) for name, value in terms.items()}
        return {"loss": sum(values.values()), **values, **judged, "lr": lr, "grad_norm": norm}

    def judge(self, real: Tensor, fake: Tensor, batch: Batch, step: int) -> dict[str, float]:
        """One step of the critic: it raises what it says of real pairs and lowers what it says of generated ones."""
        critic = self.critic.network
        gap = critic(real).mean() - critic(fake).mean()
        terms = {"critic": -gap}
        if self.run.penalty:
            terms["penalty"] = self.run.penalty * gradient_penalty(critic, real, fake)
        norm = self.update(self.critic, terms, batch, step)
        values = {f"critic_{name}": float(value.detach()) for name, value in terms.items() if name != "critic"}
        return {"critic_gap": float(gap.detach()), **values, "critic_grad_norm": norm}

    def update(self, player: Player, terms: dict[str, Tensor], batch: Batch, step: int) -> float:
        """One step of an optimiser; the norm of the gradient. Raises UserError for a loss that is not finite."""
        loss = torch.stack(list(terms.values())).sum()
        bad = [name for name, value in terms.items() if not math.isfinite(float(value.detach()))]
        if bad:
            raise NotFiniteError(
                f"the loss is {float(loss.detach())} at step {step + 1} ({', '.join(bad)}); the batch was "
                f"{', '.join(batch.names)}; look at these files or lower optim.lr; the last checkpoint is intact"
            )
        loss.backward()
        norm = float(clip_gradients(player.network.parameters(), self.procedure.clip))
        player.optimizer.step()
        player.optimizer.zero_grad(set_to_none=True)
        return norm

    def after(self, progress: Progress, stop: StopRequest) -> None:
        """Validate and save when it is time, at the end, and when asked to stop."""
        step, every = progress.step, self.plan.val_every
        last, best = step == self.steps, False
        if "val" in self.dataset.splits and (last or (every and step % every == 0)):
            miou = self.validate(step)
            best = miou > progress.best or (last and not progress.best_step)
            if best:
                progress.best, progress.best_step = miou, step
        if best or (last and "val" not in self.dataset.splits):
            save_model(self.model, Path(self.plan.out) / "model")
        stopping = 0 if last else stop.number
        if best or last or stopping or step % self.plan.checkpoint_every == 0:
            folder = Path(self.plan.out)
            state = {"generator": self.generator.state(), "critic": self.critic.state(), "random": random_state()}
            replace_state(folder / STATE, folder / PREVIOUS_STATE, state | asdict(progress))
        if stopping:
            self.log.message(f"stopped at step {step} as asked; everything is saved, go on with --resume")
            raise Stopped(stopping)

    def validate(self, step: int) -> float:
        """The generator's mIoU on the val split, or on `val_images` of it; leaves no trace on the training."""
        count, limit = self.dataset.count("val"), self.plan.val_images
        chosen = range(count) if limit is None or limit >= count else [i * count // limit for i in range(limit)]
        random = random_state()
        predictor = Predictor(self.model, device=self.device)
        found = evaluate(predictor, self.dataset, "val", indices=chosen, workers=self.plan.workers)
        metrics = found.confusion.metrics()
        restore_random(random)
        train_mode(self.model)
        self.log.row({"step": step, "val": {"miou": metrics.miou, "macc": metrics.macc, "aacc": metrics.aacc}})
        self.log.message(f"step {step}: validation mIoU {metrics.miou:.4f}")
        return metrics.miou
