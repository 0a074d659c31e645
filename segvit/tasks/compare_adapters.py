"""Several tuning methods, one model, one data set, one budget: accuracy against the parameters that train.

Every method starts from the same base weights and trains the head at the same rate; only what it tunes in the backbone
differs, and the rate there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from segvit.adapters.catalogue import find_adapter
from segvit.contracts import ModelConfig, Size, UserError
from segvit.engine.settings import Optim
from segvit.model_folder import load_model
from segvit.tasks.compare import Budget, Compared, carry_out, settings, shared_experiment
from segvit.tasks.compare_report import COST, QUALITY, Chart, Column, Row, View
from segvit.tasks.experiment import Experiment
from segvit.zoo import find_system

SHORT = {"head": "head_only"}
# AdamW's rates: ours, not those of the papers, which search them for each data set. What starts at the identity or has
# few numbers bears more than the whole backbone does.
HEAD_RATE = 1e-3
BACKBONE_RATES = {
    "full": 2e-4, "bitfit": 1e-3, "norm_only": 1e-3, "head_only": 1e-3, "ssf": 2e-3, "svf": 5e-3, "lora": 1e-3,
    "vpt_deep": 5e-3, "vpt_shallow": 5e-3, "cavpt": 5e-3, "conv_adapter": 1e-3, "spm": 1e-3,
    "pro_tuning": 1e-3,
}  # fmt: skip
ANY_RATE = 1e-3  # of a method that is not in the table
PLACES = ("backbone.", "encoder.")  # how systems call their backbones


def compare_adapters(
    data: str, adapters: Sequence[str], out: str, budget: Budget, *, model: str | None = None, init: str | None = None,
    weights: str | None = None, config: str | None = None, crop: Size | None = None, batch_size: int | None = None,
    workers: int | None = None, device: str | None = None,
) -> Compared:  # fmt: skip
    """Tune one model by each method, evaluate and measure; a second call with the same settings does what is left.

    The base weights are those of another run (`init`, which also says the model, its options and the crop), or
    pretrained ones (`weights`), or what the recipe `config` names. With a recipe its optimiser is that of full tuning,
    and the other methods have as many times its rate in the backbone as they have without one.

    A method that fails, such as one that does not fit the backbone, is recorded with its error. Raises UserError for
    what would fail for all of them.
    """
    names = list(dict.fromkeys(SHORT.get(name, name) for name in adapters))
    for name in names:
        find_adapter(name)
    given = based(init)
    if crop is None and config is None and given is not None and "image_size" in given.options:
        side = given.options["image_size"]
        crop = (side, side) if isinstance(side, int) else (side[0], side[1])
    base = shared_experiment(data, config, crop=crop, batch_size=batch_size, workers=workers, device=device)
    if init or weights:
        base = replace(base, init=init, weights=weights)
    if model is None and init is None and config is None:
        raise UserError("give --models NAME, see segvit models list, or --init RUN, which says it")
    base = with_base(base, given or based(base.init), model)
    wanted = settings(base, budget, config) | {"adapters": True}
    experiment_of = partial(of_method, base, recipe=config is not None)
    return carry_out(Path(out), names, experiment_of, base, budget, wanted, view=methods_view(base))


def based(init: str | None) -> ModelConfig | None:
    """The configuration of the model to start from. Raises UserError for one that is tuned itself."""
    if init is None:
        return None
    found: ModelConfig = load_model(init).config
    if found.adapter is not None:
        raise UserError(f"{init} holds a {found.adapter['method']} adapter itself; merge it (segvit adapters merge)")
    return found


def with_base(base: Experiment, given: ModelConfig | None, model: str | None) -> Experiment:
    """The experiment with its model. Raises UserError where it has no base weights, or two kinds of them."""
    init, weights = base.init, base.weights
    if (init is None) == (weights in (None, "none")):
        raise UserError(
            f"tuning needs base weights: give --init RUN or --weights NAME, exactly one; got {init}, {weights}"
        )
    if given is not None and init is not None:
        if model not in (None, given.name):
            raise UserError(f"{init} holds a {given.name}, not a {model}; leave --models out, or give another --init")
        path = Path(init).expanduser()
        init = str(path.resolve()) if path.exists() else init
        return replace(base, init=init, weights=None, model=given.name, options=given.options)
    name = model or base.model
    find_system(name)
    return replace(base, model=name, options=base.options if name == base.model else {})


def of_method(base: Experiment, name: str, *, recipe: bool) -> Experiment:
    """The run of one method. A recipe's options of an adapter are for the method that it names."""
    options = base.adapter_options if base.adapter == name else {}
    rate = BACKBONE_RATES.get(name, ANY_RATE)
    if not recipe:
        optim = Optim(name="adamw", lr=HEAD_RATE, weight_decay=0.05, lr_mult={}, clip=5.0)
        factor = rate / HEAD_RATE
    else:
        optim, factor = base.optim, rate / BACKBONE_RATES["full"]
    if not recipe or name != "full":
        # No decay: it would pull what is tuned to 0, and not to where it started.
        optim = replace(
            optim, lr_mult=optim.lr_mult | dict.fromkeys(PLACES, factor),
            decay_mult=optim.decay_mult | dict.fromkeys(PLACES, 0.0),
        )  # fmt: skip
    return replace(base, adapter=name, adapter_options=options, optim=optim)


def methods_view(base: Experiment) -> View:
    """How the comparison is shown."""
    start = Path(base.init or base.weights or "").name
    return View(
        "tuning methods", "a method", f"{base.model} {json.dumps(base.options)} from {start}",
        (
            Column("method", lambda row: row.name), *QUALITY, Column("trained", lambda row: f"{row.trained or 0:,}"),
            Column("in the backbone", in_backbone), *COST,
        ),
        (Chart("trained parameters", "trained parameters", lambda row: float(row.trained or 0)),),
    )  # fmt: skip


def in_backbone(row: Row) -> str:
    """What trains in the backbone, and its part of all parameters."""
    inside = row.inside or 0
    return f"{inside:,} ({100 * inside / (row.parameters or 1):.2f} %)"
