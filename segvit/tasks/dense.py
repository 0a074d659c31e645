"""Dense segmentation from a recipe: build, train, validate, save, report. Where zoo, data and engine meet."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from accelerate.utils import set_seed

from segvit.contracts import Classes, InputSpec, UserError
from segvit.data.cache import cached
from segvit.data.dataset import Dataset, holds_volumes, is_generated, open_dataset
from segvit.data.sources import named_source
from segvit.engine.evaluate import Evaluation, evaluate
from segvit.engine.freeze import freeze
from segvit.engine.interrupt import stop_requests
from segvit.engine.memory import Footprint, is_out_of_memory
from segvit.engine.optim import parameter_rates
from segvit.engine.run import claim, locked, write_environment
from segvit.files import write_json
from segvit.inference.predictor import Predictor
from segvit.metrics.confusion import Metrics
from segvit.model_folder import load_model, match_classes
from segvit.tasks.console import progress_bar
from segvit.tasks.data_check import refuse_bad_data
from segvit.tasks.experiment import Experiment
from segvit.tasks.finish import finish
from segvit.tasks.memory import measure, memory_text, out_of_memory, settle_batch
from segvit.tasks.overfit import learn_by_heart, verdict
from segvit.tasks.run import Run, announce, has_checkpoint, make_accelerator
from segvit.zoo import adapt, check_channels, create_model, find_system

if TYPE_CHECKING:
    from segvit.contracts import Model


FROM_DATA = ("ignore_index", "class_weights")  # options of a criterion that the run fills in itself


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
    checked = check_before(experiment) if accelerator.is_main_process else None
    experiment, dataset = open_training(experiment)
    plan, dataset = learn_by_heart(experiment, dataset)
    set_seed(experiment.seed)
    resumes = experiment.resume and has_checkpoint(folder)  # then the checkpoint holds all weights
    starts = replace(plan, weights=None, init=None) if resumes else plan
    model = build_model(starts, dataset.classes, levels=dataset.levels).to(accelerator.device)
    plan, need, chosen = settle_batch(plan, folder, dataset, model, accelerator)
    with locked(folder) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            claim(folder, asdict(replace(experiment, batch_size=plan.batch_size)))
            write_environment(folder)
            write_json(folder / "data_report.json", describe(dataset, experiment.data) | {"check": checked})
        accelerator.wait_for_everyone()
        with progress_bar("decoding") as progress:
            dataset = cached(dataset, plan.cache, workers=plan.workers, progress=progress)
        need = need or measure(plan, dataset, model, accelerator)
        with stop_requests() as stop:
            run = Run(plan, folder, dataset, model, accelerator, stop)
            carry_out(run, need, chosen)
        try:
            metrics = finish(run.folder, dataset, plan, log=run.log) if accelerator.is_main_process else None
            if experiment.overfit and metrics is not None:
                run.log.message(verdict(metrics, experiment.overfit))
        finally:
            run.log.close()
    return Result(folder, metrics, run.progress.best_step)


def open_training(experiment: Experiment) -> tuple[Experiment, Dataset]:
    """The dataset and the experiment for its channels. Raises UserError where the two do not fit together."""
    dataset = open_dataset(experiment.data)
    if "train" not in dataset.splits or not dataset.count("train"):
        raise UserError(f"{experiment.data} has no training images; it has {', '.join(dataset.splits) or 'no splits'}")
    if experiment.num_classes not in (None, len(dataset.classes)):
        raise UserError(
            f"{experiment.data} has {len(dataset.classes)} classes, the recipe expects {experiment.num_classes}; "
            "correct the class table, or set num_classes to null"
        )
    experiment = experiment.for_channels(dataset.channels)
    check_loss(experiment)
    return experiment, dataset


def carry_out(run: Run, need: Footprint, chosen: str) -> None:
    """Train to the end; `chosen` says how the batch was, "" where it was given.

    Raises UserError that names what helps, and by how much, where memory runs out.
    """
    try:
        run.resume()
        if chosen:
            run.log.message(chosen)
        announce(run, memory_text(run.experiment, need, run.accelerator))
        run.fit()
        return
    except BaseException as error:
        if not is_out_of_memory(error):
            run.log.close()
            raise
    # Outside of the handler: there the traceback would keep the tensors of the failed step alive.
    run.log.close()
    run.optimizer.zero_grad(set_to_none=True)
    run.optimizer.state.clear()
    run.average = None
    model = run.accelerator.unwrap_model(run.model, keep_fp32_wrapper=False)
    raise out_of_memory(run.experiment, run.dataset, model, run.accelerator, need)


def located(data: str) -> str:
    """A data path as an absolute one, so that the run folder can be used from anywhere."""
    named = named_source(data)
    if named:
        return f"{named[0]}:{named[1].resolve()}"
    path = Path(data).expanduser()
    return str(path.resolve()) if path.exists() else data


def build_model(experiment: Experiment, classes: Classes, *, levels: tuple[float, float] | None = None) -> Model:
    """The experiment's model with its input spec; pretrained, initialised from another run, frozen where asked for.

    `levels` are the raw levels that become 0 and 255 in the images, where the data set has its own.
    """
    options = dict(experiment.options)
    if experiment.weights not in (None, "none"):
        options["weights"] = experiment.weights
    model = create_model(experiment.model, classes=classes, **options)
    model.spec = input_spec(experiment, replace(model.spec, levels=levels))
    if experiment.init is not None:
        match_classes(model, load_model(experiment.init))
    if experiment.adapter is not None:
        adapt(model, experiment.adapter, **experiment.adapter_options)
    freeze(model, experiment.optim.freeze)
    parameter_rates(model.named_parameters(), experiment.optim)  # refuses what it must before anything is written
    return model


def check_loss(experiment: Experiment) -> None:
    """Raises UserError for a loss option, or class weights, that the system's criterion does not have."""
    system = find_system(experiment.model)
    if system.task != "dense":
        does = "classifies" if system.task == "classify" else "compares"
        raise UserError(f"{experiment.model} {does} whole images and makes no masks; see segvit {system.task} train")
    criterion = system.criterion
    parameters = inspect.signature(criterion).parameters.values()
    named = [item.name for item in parameters if item.kind is item.KEYWORD_ONLY]
    if experiment.class_balance != "none" and "class_weights" not in named:
        raise UserError(f"the loss of {experiment.model} takes no class weights; set class_balance: none")
    accepted = [name for name in named if name not in FROM_DATA]
    hints = get_type_hints(criterion)
    for name, value in experiment.loss.items():
        if name not in accepted:
            raise UserError(f"{experiment.model} has no loss option {name!r}; it has {', '.join(accepted) or 'none'}")
        words = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        if (words and value not in words) or (isinstance(value, str) and not words):
            raise UserError(f"loss: {name} is {value!r}; give {'one of ' + ', '.join(words) if words else 'a number'}")


def input_spec(experiment: Experiment, default: InputSpec) -> InputSpec:
    """The experiment's input options over the backbone's mean and standard deviation."""
    given = {name: value for name, value in asdict(experiment.input).items() if value is not None}
    spec = replace(default, **given)
    check_channels(spec, default)
    return spec


def check_before(experiment: Experiment) -> dict[str, Any] | None:
    """The doctor's report on the data; None for generated images, volumes and where the check is switched off.

    Raises UserError with the doctor's first sentence when training would go wrong.
    """
    if experiment.skip_check or is_generated(experiment.data) or holds_volumes(experiment.data):
        return None
    return refuse_bad_data(experiment.data).report


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
