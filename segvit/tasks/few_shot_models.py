"""Few-shot networks and base learners as folders: config.json and model.safetensors."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from segvit import __version__
from segvit.contracts import InputSpec, UserError
from segvit.files import open_atomic, write_json
from segvit.systems.few_shot import BAM, FEW_SHOT, Network

SPEC = InputSpec(mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
KIND, BASE_KIND = "segvit_few_shot", "segvit_few_shot_base"


def create_few_shot(config: dict[str, Any], *, weights: str | None = None) -> Network:
    """A network by the `name` and `options` of its config. Raises UserError for those that there are not."""
    name, options = config["name"], config["options"]
    if name not in FEW_SHOT:
        raise UserError(f"unknown few-shot network {name!r}; choose from {', '.join(FEW_SHOT)}")
    fixed = ("head", "backbone", "weights")
    accepted = [option for option in inspect.signature(FEW_SHOT[name]).parameters if option not in fixed]
    for option in options:
        if option not in accepted:
            raise UserError(f"{name} has no option {option!r}; it has {', '.join(accepted)}")
    return FEW_SHOT[name](weights=weights, **options)


def base_options(source: str, name: str, base: tuple[int, ...]) -> dict[str, Any]:
    """The options that BAM takes from its base learner's run; {} for the other networks.

    Raises UserError when the run is no base learner's, or one of another backbone or other base classes.
    """
    config = read_config(Path(source), BASE_KIND)
    if not name.endswith(f"_{config['backbone']}"):
        raise UserError(f"{source} trained {config['backbone']}, {name} has another backbone; choose the same one")
    if tuple(config["base"]) != base:
        raise UserError(f"{source} was trained on the base classes {config['base']}, this fold has {list(base)}")
    return {"base_classes": len(base), "base_hidden": config["hidden"]} if name.startswith("bam_") else {}


def take_base(network: Network, source: str) -> None:
    """Give a network the backbone of a base learner's run, and BAM the base learner too, in place."""
    state = read_state(Path(source))
    parts: dict[str, nn.Module] = {"backbone.": network.matcher.backbone}
    if isinstance(network, BAM):
        parts["head."] = network.base
    for prefix, part in parts.items():
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        try:
            part.load_state_dict(own)
        except RuntimeError as error:
            raise UserError(f"{source} does not fit the network ({str(error)[:200]}); train it again") from error


def save_few_shot(network: nn.Module, config: dict[str, Any], folder: Path, *, kind: str = KIND) -> None:
    """Write config.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"model_type": kind, "version": __version__, **config})
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    with open_atomic(folder / "model.safetensors") as file:
        file.write(serialize(state, metadata={"format": "pt"}))


def load_few_shot(source: str | Path, *, device: str | torch.device = "cpu") -> tuple[Network, dict[str, Any]]:
    """Network and config of a run or model folder. Raises UserError when there is none or it is damaged."""
    config = read_config(Path(source), KIND)
    try:
        network = create_few_shot(config)
        network.load_state_dict(read_state(Path(source)))
    except (KeyError, RuntimeError) as error:
        raise damaged(Path(source), error) from error
    return network.to(device).eval(), config


def read_config(source: Path, kind: str) -> dict[str, Any]:
    """The config of a run or model folder. Raises UserError where it is missing, damaged or of another kind."""
    words = "few-shot model" if kind == KIND else "base learner"
    try:
        config = json.loads((model_folder(source) / "config.json").read_text(encoding="utf-8"))
        found = config["model_type"]
    except FileNotFoundError:
        raise UserError(
            f"{source} holds no {words} (no config.json, no model/config.json); give a run folder"
        ) from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise damaged(source, error) from error
    if found != kind:
        raise UserError(f"{source} holds no {words} but a {found}; give another run folder")
    return dict(config)


def read_state(source: Path) -> dict[str, torch.Tensor]:
    """The weights of a run or model folder."""
    try:
        return dict(load_file(model_folder(source) / "model.safetensors"))
    except Exception as error:  # safetensors has errors of its own
        raise damaged(source, error) from error


def model_folder(source: Path) -> Path:
    """The folder itself where it has a config.json, else its model/."""
    return source if (source / "config.json").is_file() else source / "model"


def damaged(source: Path, error: Exception) -> UserError:
    """What to say of a folder that cannot be read."""
    return UserError(f"{source} cannot be read as a few-shot model ({str(error)[:200]}); copy it again")
