"""Many tasks on one backbone: every task has its head and its adapter, the backbone's weights are in memory once.

Each task is a network of its own whose frozen tensors are views of the same storage. So tasks are switched by name
alone: nothing is copied, put in or taken out, and each may be another system. What an adapter tunes of the backbone
(the biases of bitfit, for instance) is the task's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from segvit.adapters.files import CONFIG, NOT_HASHED, read_config, restore
from segvit.adapters.places import backbone_of
from segvit.contracts import Classes, Dense, InputSpec, Readout, UserError
from segvit.inference.predictor import Precision, Predictor, TorchRuntime
from segvit.model_folder import load_model
from segvit.tasks.prefix import Together, number_steps, resumed
from segvit.tasks.sources import default_device, find_images
from segvit.zoo import adapt, create_model

if TYPE_CHECKING:
    from segvit.contracts import Model


class MultiTask:
    """Several tasks by name, one of which is in use: a Runtime that `Predictor` takes, whose task `use` switches.

    Args:
        models: Evaluated networks by task; `load_tasks` makes them share their backbone.
        precision: fp32, or bf16 / fp16 for the networks.
    """

    def __init__(self, models: Mapping[str, Model], *, precision: Precision = "fp32") -> None:
        if not models:
            raise UserError("there is no task; give at least one name with its folder")
        self.runtimes = {name: TorchRuntime(model, precision=precision) for name, model in models.items()}
        self.numbers = number_steps(models)
        self.task = next(iter(models))
        self.current = self.runtimes[self.task]

    def use(self, task: str) -> None:
        """Switch to a task. Raises UserError for an unknown one."""
        self.current, self.task = self.runtime(task), task

    def runtime(self, task: str) -> TorchRuntime:
        """What runs one task whichever is in use; `Predictor` takes it. Raises UserError for an unknown one."""
        if task not in self.runtimes:
            raise UserError(f"there is no task {task!r}; there are {', '.join(self.runtimes)}")
        return self.runtimes[task]

    def __call__(self, images: Tensor, *, task: str | None = None) -> Dense:
        """The output of a task, by default of the one in use, for normalised images (B, C, H, W)."""
        return (self.current if task is None else self.runtime(task))(images)

    @property
    def spec(self) -> InputSpec:
        """How the task in use takes images."""
        return self.current.spec

    @property
    def classes(self) -> Classes:
        """The class table of the task in use."""
        return self.current.classes

    @property
    def readout(self) -> Readout:
        """How the task in use turns its output into scores."""
        return self.current.readout

    def together(
        self, images: Tensor, requests: Sequence[str] | Sequence[Sequence[str]] | None = None
    ) -> dict[str, Dense]:
        """The outputs of several tasks for one batch (B, C, H, W); what their backbones have in common runs once.

        `requests` are the tasks that all images are for (None = all tasks), or a list of tasks for each image; then a
        task's output holds the images that asked for it, in order. Not to be called from several threads at once.
        Raises UserError for unknown tasks, a wrong number of lists, and tasks whose mean or deviation differ: such
        images are not the same to them.
        """
        rows = self._rows(len(images), list(self.runtimes) if requests is None else requests)
        runtimes = {name: self.runtime(name) for name in rows}
        specs = {name: (runtime.spec.mean, runtime.spec.std) for name, runtime in runtimes.items()}
        first = next(iter(specs), "")
        for name, spec in specs.items():
            if spec != specs[first]:
                raise UserError(
                    f"{first} and {name} normalise images differently (mean and std {specs[first]} and {spec}); run "
                    "them one by one"
                )
        one = self.current
        shared = Together(images.to(one.device), rows, self.numbers)
        outputs = {}
        for name, runtime in runtimes.items():
            half = runtime.dtype != torch.float32
            with torch.inference_mode(), torch.autocast(one.device.type, runtime.dtype, enabled=half):
                past = shared.past(name, runtime.model)
            with resumed(runtime.model, past):
                outputs[name] = runtime(shared.own_images(name))
        return outputs

    def shared_steps(self, *tasks: str) -> int:
        """How many steps of the backbone (the embedding is one, each block another) these tasks have in common."""
        numbers = [set(self.numbers[name]) for name in tasks if self.runtime(name)]
        return len(set.intersection(*numbers)) if numbers else 0

    def memory(self) -> int:
        """Bytes that all tensors of all tasks take; what is shared counts once."""
        tensors = [item for runtime in self.runtimes.values() for item in tensors_of(runtime.model).values()]
        return sum({item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() for item in tensors}.values())

    def _rows(self, count: int, requests: Sequence[str] | Sequence[Sequence[str]]) -> dict[str, tuple[int, ...]]:
        """The images of each task that is asked for."""
        if all(isinstance(request, str) for request in requests):
            return {str(name): tuple(range(count)) for name in requests}
        if len(requests) != count:
            raise UserError(f"{count} images need {count} lists of tasks, got {len(requests)}")
        named = [name for name in self.runtimes if any(name in request for request in requests)]
        unknown = [name for request in requests for name in request if name not in self.runtimes]
        wanted = dict.fromkeys(named + unknown)  # `runtime` refuses the unknown ones
        return {name: tuple(i for i, request in enumerate(requests) if name in request) for name in wanted}


def load_tasks(
    folders: Mapping[str, str | Path], *, base: str | Path | None = None, device: str | torch.device = "cpu",
    precision: Precision = "fp32",
) -> MultiTask:  # fmt: skip
    """Tasks from adapter or run folders, all over the same base weights, each verified as `load_model` does.

    The first is loaded whole; later ones are built without weights and stand on its backbone, so that the memory in
    use is that of one backbone, the adapters and the heads. SVF also keeps its factors, about as large as what it
    tunes. Whole models (from `segvit multi train`, or a run without an adapter) share the tensors that are equal.

    `base` says where the base weights are now, if not where the first adapter says itself. Raises UserError when a
    folder is damaged, stands on other base weights, or has a backbone of its own through and through.
    """
    pool: dict[str, Tensor] = {}
    models: dict[str, Model] = {}
    for name, source in folders.items():
        folder = adapter_folder(Path(source))
        model = over_pool(folder, pool, source=str(base or next(iter(folders.values())))) if folder and pool else None
        if model is None:
            model = load_model(folder or source, base=base if folder else None, device=device)
            share(model, pool, source=str(source), must=folder is not None)
        models[name] = model.requires_grad_(False)  # training one would change all
    return MultiTask(models, precision=precision)


def adapter_folder(source: Path) -> Path | None:
    """The adapter folder that a source is or holds."""
    return next((place for place in (source, source / "adapter") if (place / CONFIG).is_file()), None)


def over_pool(folder: Path, pool: Mapping[str, Tensor], *, source: str) -> Model | None:
    """The model of an adapter folder over tensors that are there; None where not all are.

    Raises UserError as `restore` does; `source` is what it calls the base.
    """
    config = read_config(folder)
    parts = config.model
    with torch.device("meta"):
        model = create_model(parts.name, classes=parts.classes, spec=config.spec, **parts.options)
    place, backbone = backbone_of(model)
    inside = tensors_of(backbone)
    if any(name not in pool or pool[name].shape != tensor.shape for name, tensor in inside.items()):
        return None
    device = next(iter(pool.values())).device
    own = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{place}.")}
    state = {name: torch.empty_like(tensor, device=device) for name, tensor in own.items()}
    # Views, so that what one task does to its tensor objects does not reach the others.
    state |= {f"{place}.{name}": pool[name].detach() for name in backbone.state_dict()}
    model.load_state_dict(state, assign=True)
    for name, _ in backbone.named_buffers():
        owner, _, leaf = name.rpartition(".")
        backbone.get_submodule(owner)._buffers[leaf] = pool[name].detach()
    if any(tensor.is_meta for tensor in tensors_of(model).values()):  # computed when the network is built
        return None
    adapt(model, config.method, **config.options)
    for tensor, _ in model.adapter.tuned:
        tensor.data = tensor.data.clone()
    restore(model, folder, replace(config, base=source))
    return model.eval()


def share(model: Model, pool: dict[str, Tensor], *, source: str, must: bool) -> None:
    """Let the frozen tensors of a backbone be views of equal ones in the pool, which takes up the names it lacks.

    Raises UserError where one differs that `must` be the same, and where all differ.
    """
    state = frozen(model)
    known = {name: tensor for name, tensor in state.items() if name in pool}
    same = [name for name, tensor in known.items()
            if tensor.shape == pool[name].shape and torch.equal(tensor, pool[name])]  # fmt: skip
    # Position embeddings are resampled to each task's image size.
    others = [name for name in known if name not in same and not name.endswith(NOT_HASHED)]
    if others and (must or all(known[name].ndim < 2 for name in same)):  # fresh norms are equal everywhere
        raise UserError(
            f"{source} stands on other base weights than the tasks before it ({others[0]} differs), so that it would "
            "be a second backbone in memory; load it by itself"
        )
    for name in same:
        known[name].data = pool[name].data
    pool |= {name: tensor.detach() for name, tensor in state.items() if name not in pool}


def frozen(model: Model) -> dict[str, Tensor]:
    """The tensors of a backbone that its adapter leaves as they are, by their plain names."""
    _, backbone = backbone_of(model)
    if model.adapter is None:
        return tensors_of(backbone)
    tuned = {id(tensor) for tensor, _ in model.adapter.tuned}
    model.adapter.disable()
    state = {name: tensor for name, tensor in tensors_of(backbone).items() if id(tensor) not in tuned}
    model.adapter.enable()
    return state


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def predict_tasks(source: str, tasks: str, out: Path, *, base: str | None, device: str | None) -> list[dict[str, str]]:
    """Write out/TASK/NAME.png for every image and task; `tasks` is NAME=FOLDER with commas between.

    Raises UserError where `tasks` is not that, and as `load_tasks` does.
    """
    pairs = [item.strip().partition("=") for item in tasks.split(",") if item.strip()]
    if not pairs or not all(name and folder for name, _, folder in pairs):
        raise UserError(f"tasks is {tasks!r}; give names with folders, such as roads=runs/roads,defects=runs/defects")
    images = find_images(source)
    model = load_tasks({name: folder for name, _, folder in pairs}, base=base, device=device or default_device())
    written = []
    for name in model.runtimes:
        predictor = Predictor(model.runtime(name))
        for path, place in images.items():
            target = out / name / place.with_suffix(".png")
            predictor(path).save(target)
            written.append({"image": str(path), "task": name, "labels": str(target)})
    return written
