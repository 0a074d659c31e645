"""Model folders: saving, loading whole or as an adapter over base weights, and starting from another class table."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from segvit import __version__
from segvit.adapters.files import CONFIG, base_source, copy_backbone, read_config, restore
from segvit.contracts import InputSpec, ModelConfig, UserError
from segvit.files import open_atomic, write_json, write_text
from segvit.zoo import adapt, build_network, create_model

if TYPE_CHECKING:
    from segvit.contracts import Model

T = TypeVar("T")


def save_model(model: Model, folder: str | Path, *, card: str | None = None) -> None:
    """Write a folder that `load_model` reads: config.json, model.safetensors, preprocessor_config.json, README.md."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_json(folder / "config.json", model.config.to_json(__version__))
    write_json(folder / "preprocessor_config.json", model.spec.to_json())
    with open_atomic(folder / "model.safetensors") as file:
        file.write(serialize(tensors, metadata={"format": "pt"}))
    if card is not None:
        write_text(folder / "README.md", card)


def load_model(
    source: str | Path, *, base: str | Path | None = None, device: str | torch.device = "cpu"
) -> Model:  # fmt: skip
    """A model from a run folder, a model folder, an adapter folder or a hub id, ready for inference.

    `base` says where the base weights of an adapter folder are now, if not where it says itself. Raises UserError when
    the folder is incomplete or its weights do not fit its configuration.
    """
    folder = _model_folder(source)
    if not (folder / "config.json").is_file():
        return load_adapted(folder, base).to(device).eval()
    if base is not None:
        raise UserError(f"{folder} is a whole model, which needs no base; leave it out")
    config = _parse(folder / "config.json", ModelConfig.from_json)
    spec = _parse(folder / "preprocessor_config.json", InputSpec.from_json)
    model = create_model(config.name, classes=config.classes, spec=spec, **config.options)
    try:
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}/model.safetensors cannot be read ({error}); copy the model folder again") from error
    for name in config.added:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(torch.empty_like(state[name])))
    model.config = replace(model.config, added=config.added, words=config.words)
    if config.adapter is not None:
        adapt(model, config.adapter["method"], **config.adapter["options"])
    load_state(model, state, source=str(folder))
    return model.to(device).eval()


def load_adapted(folder: Path, base: str | Path | None) -> Model:
    """The model of an adapter folder over its base weights, verified."""
    config = read_config(folder)
    source, whole = base_source(folder, config, base)
    weights: dict[str, Any] = {} if whole else {"weights": source}
    parts = config.model
    model = create_model(parts.name, classes=parts.classes, spec=config.spec, **weights, **parts.options)
    if whole:
        copy_backbone(load_model(source), model)
    adapt(model, config.method, **config.options)
    restore(model, folder, config)
    return model


def load_state(model: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Load weights of which every key and shape must fit. Raises UserError that names the first that do not."""
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [key for key in sorted(own.keys() & state.keys()) if own[key].shape != state[key].shape]
    if missing or unknown:
        raise UserError(f"{source} does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}")
    if wrong:
        key = wrong[0]
        raise UserError(
            f"{source}: {key} is {tuple(state[key].shape)}, the model's is {tuple(own[key].shape)}; "
            "is the number of classes or the image size another one?"
        )
    model.load_state_dict(state)


def _model_folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    for place in (folder / "config.json", folder / "model" / "config.json", folder / CONFIG):
        if place.is_file():
            return place.parent
    if folder.exists():
        raise UserError(f"{folder} holds no model (no config.json, no model/config.json); give a run or model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub client raises many kinds: offline, gated, unknown, malformed id
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{source} is neither a folder nor a model to be had from the hub ({reason})") from error


def _parse(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy the model folder again") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a segvit model's, {error} is missing or of another kind") from error


def match_classes(model: Model, source: Model) -> None:
    """Initialise `model` from `source`, a model of the same architecture with another class table, in place.

    Rows of the head that belong to classes (found by building the network for one class more) are copied by class name;
    new classes keep their fresh initialisation. Raises UserError when anything else differs in shape.
    """
    state, given = model.state_dict(), source.state_dict()
    if state.keys() != given.keys():
        raise UserError(
            f"{source.config.name} and {model.config.name} have different parts; use --init with the same model"
        )
    names = source.classes.names
    pairs = [(new, names.index(name)) for new, name in enumerate(model.classes.names) if name in names]
    axes = _class_axes(model)
    for key, value in given.items():
        axis = axes.get(key)
        same = [place == axis or a == b for place, (a, b) in enumerate(zip(state[key].shape, value.shape, strict=True))]
        if not all(same):
            raise UserError(
                f"{key} is {tuple(value.shape)} in the run to start from and {tuple(state[key].shape)} here; "
                "use the same options, image_size included"
            )
        if axis is None:
            state[key] = value
            continue
        extra = state[key].shape[axis] - len(model.classes)  # e.g. the row of "no object"
        rows = pairs + [(len(model.classes) + i, len(names) + i) for i in range(extra)]
        target, origin = (
            (torch.tensor(part, dtype=torch.long) for part in zip(*rows, strict=True)) if rows else (None, None)
        )
        if target is not None and origin is not None:
            state[key] = state[key].index_copy(axis, target, value.index_select(axis, origin))
    model.load_state_dict(state)


def _class_axes(model: Model) -> dict[str, int]:
    """The axis that belongs to classes, for every tensor that has one."""
    shapes = []
    for count in (len(model.classes), len(model.classes) + 1):
        with torch.device("meta"):
            network = build_network(model.config.name, num_classes=count, **model.config.options)
        shapes.append({key: value.shape for key, value in network.state_dict().items()})
    differing = {key: [a != b for a, b in zip(shapes[0][key], shapes[1][key], strict=True)] for key in shapes[0]}
    return {key: different.index(True) for key, different in differing.items() if any(different)}
