"""A training run as data: what a recipe holds. Free of torch, so that the command line can read it at once."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from segvit.contracts import UserError
from segvit.data.balance import Balance
from segvit.data.transforms import Augment
from segvit.engine.settings import Optim, Schedule


@dataclass(frozen=True, kw_only=True)
class Input:
    """How images become the network's input in evaluation and prediction; saved with the model.

    Args:
        mean: Mean of values in 0..1 by channel; None = the backbone's, or 0.5 where images are not RGB.
        std: Standard deviation likewise.
        scale: Resize to this short side, long side at most the other number, the ratio kept.
        min_side: With scale: the short side is at least this and the long limit is dropped.
        exact: Resize to this (height, width) whatever the ratio.
        window: Sliding windows of this (height, width); None = the whole image at once.
        stride: Steps of the windows.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: tuple[int, int] | None = None
    min_side: int | None = None
    exact: tuple[int, int] | None = None
    window: tuple[int, int] | None = None
    stride: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run.

    Args:
        data: Dataset YAML, folder with images/ and masks/, or synthetic:shapes.
        out: Run folder to write.
        model: Name of the model, see `segvit models list`.
        options: Keywords of the model's builder.
        num_classes: How many classes the data must have; None = as many as it has.
        weights: Pretrained backbone weights: a hub name, a local file, or none.
        init: Start from another run's model; its head is matched by class name.
        adapter: Freeze the backbone and tune it by this method, see `segvit adapters list`; None = train everything.
        adapter_options: Options of the method.
        steps: Length in optimiser steps; give this or epochs.
        epochs: Length in passes over the training images; give this or steps.
        batch_size: Images in a step, over all processes and micro-batches; auto = as many as fit, 64 at most.
        accumulate: Micro-batches in a step.
        augment: Training augmentation.
        input: Input of evaluation and prediction.
        optim: Optimiser.
        schedule: Learning rate over the run.
        loss: Options of the system's criterion.
        class_balance: Weigh classes in the loss by their pixels in the train split; none = as the system's paper does.
        precision: Of the network in training; auto = bf16 where the device has it, else fp32.
        ema: Decay of an exponential moving average of the weights, which is then validated and saved; None = off.
        shard: Spread weights, gradients and optimiser over the processes (FSDP), for models too large for one device.
        seed: Of initialisation, dropout, order and augmentation.
        device: auto, cpu or cuda.
        workers: Processes that load data; 0 = in the main process.
        cache: Where decoded images and masks are kept: in memory, in the user's cache folder, or nowhere.
        overfit: Learn this many training images by heart, without augmentation, as a check of the whole; None = off.
        val_every: Steps between validations; 0 = only at the end.
        val_images: Validate on this many images during training, evenly spread; None = all. The end uses all.
        val_pictures: Draw this many validation images beside label and prediction at each validation; 0 = none.
        log: Tools that are told of each step besides the run folder's own files; needs segvit[logs].
        checkpoint_every: Steps between checkpoints that the run can be resumed from.
        skip_check: Train even where the dataset doctor (segvit data check) finds errors.
        resume: Go on with the run in out from its last checkpoint.
        overwrite: Replace the run in out.
    """

    data: str
    out: str
    model: str = "segvit_vit_small"
    options: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    weights: str | None = None
    init: str | None = None
    adapter: str | None = None
    adapter_options: dict[str, Any] = field(default_factory=dict)
    steps: int | None = None
    epochs: float | None = None
    batch_size: int | Literal["auto"] = 16
    accumulate: int = 1
    augment: Augment = Augment()
    input: Input = Input()
    optim: Optim = Optim()
    schedule: Schedule = Schedule()
    loss: dict[str, float | str] = field(default_factory=dict)
    class_balance: Balance = "none"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    ema: float | None = None
    shard: bool = False
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = 2
    cache: Literal["none", "ram", "disk"] = "none"
    overfit: int | None = None
    val_every: int = 1000
    val_images: int | None = None
    val_pictures: int = 0
    log: list[Literal["tensorboard", "wandb", "mlflow"]] = field(default_factory=list)
    checkpoint_every: int = 1000
    skip_check: bool = False
    resume: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"give steps or epochs, exactly one; got steps={self.steps}, epochs={self.epochs}")
        positive = {"steps": self.steps, "epochs": self.epochs, "accumulate": self.accumulate,
                    "checkpoint_every": self.checkpoint_every, "overfit": self.overfit,
                    "batch_size": None if self.batch_size == "auto" else self.batch_size}  # fmt: skip
        for name, value in positive.items():
            if value is not None and value <= 0:
                raise UserError(f"{name} must be positive, got {value}")
        counts = {"workers": self.workers, "val_every": self.val_every, "seed": self.seed,
                  "val_pictures": self.val_pictures}  # fmt: skip
        for name, value in counts.items():
            if value < 0:
                raise UserError(f"{name} must not be negative, got {value}")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise UserError(f"ema must be in [0, 1), such as 0.999, got {self.ema}")
        if min(self.augment.crop) < 1 or min(self.optim.lr, self.schedule.warmup) < 0:
            raise UserError(
                f"augment.crop must be positive and optim.lr and schedule.warmup not negative, got "
                f"{self.augment.crop}, {self.optim.lr} and {self.schedule.warmup}"
            )
        if self.optim.layer_decay is not None and not 0 < self.optim.layer_decay <= 1:
            raise UserError(f"optim.layer_decay must be in (0, 1], such as 0.75, got {self.optim.layer_decay}")
        if self.batch_size != "auto" and self.batch_size % self.accumulate:
            raise UserError(f"batch_size {self.batch_size} must be a multiple of accumulate {self.accumulate}")
        if self.adapter_options and self.adapter is None:
            raise UserError(f"adapter_options {self.adapter_options} belong to no adapter; set adapter too")
        if self.shard and self.ema is not None:
            raise UserError("ema keeps a whole copy of the weights on every device, which shard is to avoid; drop one")
        if self.resume and self.overwrite:
            raise UserError("resume and overwrite exclude each other; choose one")

    @property
    def images_a_step(self) -> int:
        """The batch size as a number. Raises UserError where it is still to be chosen."""
        if self.batch_size == "auto":
            raise UserError("batch_size auto is chosen by `segvit train`; give a number here")
        return self.batch_size

    def for_channels(self, channels: int) -> Experiment:
        """The run with a model for images of that many channels.

        Raises UserError when `options.in_channels` is another number.
        """
        given = self.options.get("in_channels", channels)
        if given != channels:
            raise UserError(
                f"options.in_channels is {given} but the images have {channels} channels; leave it out, or correct "
                "channels: in the dataset's YAML"
            )
        return self if channels == 3 else replace(self, options=self.options | {"in_channels": channels})

    def total_steps(self, images: int) -> int:
        """The number of optimiser steps for a training set of that many images, `augment.passes` for each batch."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None  # __post_init__ saw to it
        return max(1, round(self.epochs * images / self.images_a_step)) * max(1, len(self.augment.passes))
