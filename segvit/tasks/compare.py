"""Several models, one data set, one budget: train each, then set accuracy against parameters, GFLOPs and latency.

Every model is trained from nothing, with the same crops and batches. A budget of minutes is for each model's training;
it becomes a number of steps by timing a few, once: a resumed comparison goes on with the same number. What is compared
may also be tuning methods of one model, see compare_adapters.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from segvit import __version__
from segvit.adapters.places import backbone_of
from segvit.contracts import Size, UserError
from segvit.data.dataset import Dataset, open_dataset
from segvit.data.loading import train_batches
from segvit.engine.fit import Progress, fit
from segvit.engine.freeze import freeze
from segvit.engine.history import read_history
from segvit.engine.interrupt import Stopped
from segvit.engine.optim import make_optimizer, parameter_rates
from segvit.engine.run import changes, locked, plain
from segvit.engine.settings import Optim
from segvit.files import write_json
from segvit.inference.predictor import TorchRuntime
from segvit.model_folder import load_model
from segvit.nn.flops import count_gflops, count_parameters
from segvit.tasks.compare_report import MODELS, Row, View, table_text, write_comparison
from segvit.tasks.data_bench import read_experiment
from segvit.tasks.dense import build_model, check_loss, located, train
from segvit.tasks.experiment import Experiment
from segvit.tasks.procedure import make_procedure
from segvit.tasks.run import draw_lists, grouped, make_accelerator
from segvit.zoo import find_system

if TYPE_CHECKING:
    from segvit.contracts import Model

# Without a recipe: what learns from nothing in a short time. The first beginning of a name that fits counts.
CONVOLUTIONAL = Optim(name="sgd", lr=0.02, weight_decay=5e-4, lr_mult={}, clip=5.0)
TRANSFORMER = Optim(name="adamw", lr=1e-3, weight_decay=0.05, lr_mult={}, clip=5.0)
OPTIMS = {
    "ddrnet": CONVOLUTIONAL, "fcn": CONVOLUTIONAL, "unet": CONVOLUTIONAL, "pspnet": CONVOLUTIONAL,
    "fpn": CONVOLUTIONAL, "deeplabv3": CONVOLUTIONAL, "lraspp": CONVOLUTIONAL, "upernet": CONVOLUTIONAL,
    "": TRANSFORMER,
}  # fmt: skip
WARMUP = 0.05  # of the steps, at most
UNTIMED, TIMED = 2, 5  # steps before and while the clock runs
ROUNDS = 11  # of the latency, all models in turn


@dataclass(frozen=True)
class Compared:
    """What `segvit compare` prints, for machines and for people, and whether every candidate came through."""

    report: dict[str, Any]
    text: str
    complete: bool


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How long each candidate trains: steps, or minutes that become steps."""

    steps: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise UserError(f"give --minutes or --steps, exactly one; got {self.minutes} and {self.steps}")
        if (self.steps or self.minutes or 0) <= 0:
            raise UserError(f"the budget must be positive, got {self.steps or self.minutes}")

    @property
    def words(self) -> str:
        """For people."""
        return f"{self.steps} steps" if self.steps is not None else f"{self.minutes:g} minutes of training"


def compare(
    data: str, models: Sequence[str], out: str, budget: Budget, *, config: str | None = None, crop: Size | None = None,
    batch_size: int | None = None, workers: int | None = None, device: str | None = None,
) -> Compared:  # fmt: skip
    """Train, evaluate and measure each model; a second call with the same settings does what is left.

    A model that fails is recorded with its error and does not stop the others. Raises UserError for what would fail for
    all of them: names, data, options, or a folder that holds another comparison.
    """
    names = list(dict.fromkeys(models))
    if not names:
        raise UserError("give --models, names with commas between them; see segvit models list")
    for name in names:
        find_system(name)
    base = shared_experiment(data, config, crop=crop, batch_size=batch_size, workers=workers, device=device)
    wanted = settings(base, budget, config)
    return carry_out(Path(out), names, lambda name: of_model(base, name, config), base, budget, wanted, view=MODELS)


def carry_out(
    folder: Path, names: Sequence[str], experiment_of: Callable[[str], Experiment], base: Experiment, budget: Budget,
    wanted: dict[str, Any], *, view: View,
) -> Compared:  # fmt: skip
    """Train, evaluate and measure the candidates called `names`, or what is left of them, and write the comparison.

    `wanted` is what an earlier call must have had too. Raises UserError for data without a train or a val split, and
    for a folder that holds another comparison.
    """
    dataset = open_dataset(base.data)
    for split in ("train", "val"):
        if split not in dataset.splits or not dataset.count(split):
            raise UserError(f"{base.data} has no {split} images; a comparison needs a train and a val split")
    with locked(folder):
        record = open_record(folder, wanted)
        rows = [row(folder, name, experiment_of, dataset, budget, record) for name in names]
        measured = with_latencies(folder, rows, base)
        facts = machine(base) | {
            "data": Path(base.data).name or base.data, "date": date.today().isoformat(),
            "budget": f"{budget.words} {view.each}", "start": view.start,
            "training images": dataset.count("train"), "validation images": dataset.count("val"),
            "classes": len(dataset.classes), "crop": list(base.augment.crop), "batch size": base.batch_size,
        }  # fmt: skip
        record |= {"facts": facts, "models": record["models"] | {one.name: one._asdict() for one in measured}}
        write_json(folder / "compare.json", record)
        write_comparison(folder, measured, facts, view)
    shown = {"facts": facts, "models": [one._asdict() for one in measured]}
    text = f"{table_text(measured, view)}\n\n{folder / 'index.html'}"
    return Compared(shown, text, not any(one.error for one in measured))


def shared_experiment(
    data: str, config: str | None, *, crop: Size | None, batch_size: int | None, workers: int | None,
    device: str | None,
) -> Experiment:  # fmt: skip
    """What all runs have in common; model, optimiser and length come later."""
    given: dict[str, Any] = {"data": located(data), "batch_size": batch_size, "workers": workers, "device": device}
    if config is None:
        given["batch_size"] = batch_size or 8
        given["augment"] = {"crop": list(crop or (256, 256))}
    elif crop is not None:
        given["augment"] = {"crop": list(crop)}
    return replace(read_experiment(config, given), val_every=0)


def settings(base: Experiment, budget: Budget, config: str | None) -> dict[str, Any]:
    """What must not change between two calls."""
    ways = {"out", "workers", "cache", "steps", "epochs", "resume", "overwrite", "checkpoint_every"}
    shared = {key: value for key, value in asdict(base).items() if key not in ways}
    return plain({"recipe": bool(config), "minutes": budget.minutes, "steps": budget.steps, **shared})


def open_record(folder: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """compare.json of an earlier call, or a new one. Raises UserError when that call had other settings."""
    path = folder / "compare.json"
    if not path.is_file():
        return {"settings": wanted, "models": {}}
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        differences = list(changes({"settings": record["settings"]}, {"settings": wanted}))
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove it or choose another --out") from error
    if differences:
        raise UserError(
            f"{folder} holds a comparison with other settings ({'; '.join(differences[:3])}); go on with the same "
            "ones, or choose another --out"
        )
    return record


def row(
    folder: Path, name: str, experiment_of: Callable[[str], Experiment], dataset: Dataset, budget: Budget,
    record: dict[str, Any],
) -> Row:  # fmt: skip
    """The result of one candidate: read from the record where it is there, else trained."""
    known = record["models"].get(name, {})
    if known.get("miou") is not None and (folder / name / "model" / "model.safetensors").is_file():
        return Row(**known)
    try:
        experiment = experiment_of(name)
        planned = Row(name=name, steps=known.get("steps") or steps_for(experiment, dataset, budget))
        keep(folder, record, planned)  # before the training: a resumed one has the same number of steps
        done = trained(folder, experiment, planned)
        keep(folder, record, done)
        return done
    except (KeyboardInterrupt, Stopped):
        raise
    except Exception as error:  # whatever goes wrong with one, the others are to be compared
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        line = " ".join(str(error).split())[:300]
        return Row(name=name, steps=record["models"].get(name, {}).get("steps") or 0, error=f"{kind}{line}")


def keep(folder: Path, record: dict[str, Any], found: Row) -> None:
    """Write a candidate's row into the record."""
    record["models"][found.name] = found._asdict()
    write_json(folder / "compare.json", record)


def of_model(base: Experiment, name: str, config: str | None) -> Experiment:
    """The run of one model, from nothing. A recipe's options and loss are for the model that it names."""
    own = config is not None and base.model == name
    options = dict(base.options) if own else {}
    parameters = inspect.signature(find_system(name).build).parameters
    if "image_size" in parameters and "image_size" not in options:
        options["image_size"] = list(base.augment.crop)
    loss = base.loss if own else {}
    nothing: dict[str, Any] = {"weights": None, "init": None, "adapter": None, "adapter_options": {}}
    changed = replace(base, model=name, options=options, loss=loss, **nothing)
    if config is not None:
        return changed
    optim = next(optim for start, optim in OPTIMS.items() if name.startswith(start))
    return replace(changed, optim=optim)


def steps_for(experiment: Experiment, dataset: Dataset, budget: Budget) -> int:
    """The budget in steps; minutes are divided by the time of a step, loading included."""
    if budget.steps is not None:
        return budget.steps
    assert budget.minutes is not None  # __post_init__ saw to it
    return max(1, round(60 * budget.minutes / seconds_a_step(experiment, dataset)))


def seconds_a_step(experiment: Experiment, dataset: Dataset) -> float:
    """The median time of a training step with its loading."""
    accelerator = make_accelerator(experiment)
    experiment = experiment.for_channels(dataset.channels)
    check_loss(experiment)
    model = build_model(experiment, dataset.classes, levels=dataset.levels).to(accelerator.device)
    procedure = make_procedure(experiment, dataset, device=accelerator.device, steps=UNTIMED + TIMED)
    rates = parameter_rates(model.named_parameters(), experiment.optim)
    network, optimizer = accelerator.prepare(model, make_optimizer(rates, experiment.optim))
    loader = train_batches(
        dataset, spec=model.spec, augment=experiment.augment, seed=experiment.seed, workers=experiment.workers,
        draws=draw_lists(experiment, accelerator, 0, procedure.steps), rarity=None,
    )  # fmt: skip
    taken: list[float] = []
    fit(
        network, optimizer, grouped(iter(loader), experiment.accumulate), procedure=procedure, accelerator=accelerator,
        progress=Progress(), average=None, report=lambda line: taken.append(line["seconds"]), after=lambda step: None,
    )  # fmt: skip
    return statistics.median(taken[UNTIMED:])


def trained(folder: Path, experiment: Experiment, planned: Row) -> Row:
    """The row with what training and evaluating in a run folder of its own gave."""
    out = folder / planned.name
    schedule = replace(experiment.schedule, warmup=min(experiment.schedule.warmup, round(WARMUP * planned.steps)))
    result = train(
        replace(
            experiment, out=str(out), steps=planned.steps, epochs=None, schedule=schedule,
            resume=(out / "config.yaml").is_file(),
            checkpoint_every=max(1, min(experiment.checkpoint_every, planned.steps // 5)),
        )
    )  # fmt: skip
    assert result.metrics is not None  # there is a val split
    if not math.isfinite(result.metrics.miou):
        raise UserError("mIoU is not defined: no validation mask has a labelled pixel; see segvit data check")
    size = experiment.augment.crop
    model = load_model(out)
    freeze(model, experiment.optim.freeze)  # of which the model folder does not know
    place = f"{backbone_of(model)[0]}." if experiment.adapter is not None else None
    tuned = {name: item.numel() for name, item in model.named_parameters() if item.requires_grad}
    inside = None if place is None else sum(count for name, count in tuned.items() if name.startswith(place))
    return planned._replace(
        miou=float(result.metrics.miou), macc=float(result.metrics.macc), aacc=float(result.metrics.aacc),
        parameters=count_parameters(model), trained=sum(tuned.values()), inside=inside,
        gflops=count_gflops(model, (size[0], size[1])),
        seconds=sum(line.get("seconds", 0.0) for line in read_history(out)),
    )  # fmt: skip


def with_latencies(folder: Path, rows: Sequence[Row], base: Experiment) -> list[Row]:
    """The rows with the median time from one image of the crop's size to its labels, the models taking turns."""
    device = "cuda" if base.device != "cpu" and torch.cuda.is_available() else "cpu"
    models = {one.name: load_model(folder / one.name, device=device) for one in rows if one.error is None}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for number in range(ROUNDS + 1):
        for name, model in models.items():
            seconds = seconds_an_image(model, base.augment.crop)
            if number:  # the first is for memory and kernels
                taken[name].append(seconds)
    middle = {name: 1e3 * statistics.median(values) for name, values in taken.items()}
    return [one._replace(latency=middle.get(one.name)) for one in rows]


def seconds_an_image(model: Model, crop: tuple[int, int]) -> float:
    """The time of network and readout on one image, up to the label map."""
    run = TorchRuntime(model)
    images = torch.zeros(1, model.spec.channels, *crop, device=run.device)
    with torch.inference_mode():
        started = time.perf_counter()
        labels = run.readout(run(images), (crop[0], crop[1]), range(crop[0])).argmax(1)
        labels.cpu()  # waits for the device
        return time.perf_counter() - started


def machine(base: Experiment) -> dict[str, Any]:
    """What the figures were measured on, without names of hosts or folders."""
    on_gpu = base.device != "cpu" and torch.cuda.is_available()
    names = {
        line.partition(":")[2].strip() for line in read_lines(Path("/proc/cpuinfo")) if line.startswith("model name")
    }  # fmt: skip
    processor = ", ".join(sorted(names)) or platform.processor() or platform.machine()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU", "processor": processor, "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "segvit": __version__,
    }  # fmt: skip


def read_lines(path: Path) -> list[str]:
    """The lines of a file of the system; none where there is no such file."""
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
