"""What a training run can be told about optimisation: plain frozen records, free of torch, that YAML and CLI fill."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from segvit.contracts import UserError


@dataclass(frozen=True, kw_only=True)
class Optim:
    """The optimiser and its parameter groups.

    `lr_mult` and `decay_mult` map substrings of parameter names to factors. As in mmseg, of all keys of both tables
    that occur in a name only the longest counts (of equally long ones the first in the alphabet).

    Args:
        name: AdamW, or SGD with momentum.
        lr: Learning rate of parameters that no key of `lr_mult` matches.
        betas: AdamW's moment decay.
        momentum: SGD's momentum.
        weight_decay: Decoupled weight decay (AdamW) or L2 (SGD).
        lr_mult: Factors on the learning rate by substring of the parameter's name.
        decay_mult: Factors on the weight decay by substring of the parameter's name.
        clip: Largest total L2 norm of the gradient; None = no clipping.
        layer_decay: Factor on the learning rate for each layer below the head: of the blocks of a plain ViT, of the
            stages of a pyramid; 0.65 to 0.9 when a pretrained ViT is fine-tuned. None = one rate.
        freeze: Regular expressions; parameters in whose names one is found do not train.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    lr: float = 2e-5
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    weight_decay: float = 0.01
    lr_mult: dict[str, float] = field(default_factory=lambda: {"head": 10.0})
    decay_mult: dict[str, float] = field(default_factory=lambda: {"norm": 0.0})
    clip: float | None = 35.0
    layer_decay: float | None = None
    freeze: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over the run; `steps` of the run is its length.

    Args:
        kind: Polynomial decay, half a cosine, or constant.
        power: Exponent of the polynomial decay.
        min_lr: Learning rate at the end (an absolute value).
        warmup: Steps of linear warm-up, multiplied onto the decayed rate.
        warmup_ratio: Factor at step 0.
    """

    kind: Literal["poly", "cosine", "constant"] = "poly"
    power: float = 1.0
    min_lr: float = 0.0
    warmup: int = 1500
    warmup_ratio: float = 1e-6


def check_counts(run: Any, *names: str) -> None:
    """Raise UserError unless these settings of a run are 1 or more, and its `workers` 0 or more."""
    for name, least in [*((name, 1) for name in names), ("workers", 0)]:
        if (value := getattr(run, name)) < least:
            raise UserError(f"{name} is {value}; it must be {least} or more")
