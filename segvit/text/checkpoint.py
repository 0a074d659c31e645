"""CLIP checkpoints: OpenAI's archives, open_clip's files, by a pretrained tag of open_clip or as a local file.

The quick-GELU trap: OpenAI's weights go with quick GELU whatever the name says, so tags and OpenAI's own files decide;
for other files it is the name (`ViT-B-16-quickgelu` or `ViT-B-16`), and an option that contradicts is an error.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from segvit.contracts import UserError
from segvit.text.architecture import ClipConfig, TextConfig, VisionConfig, clip_config, config_of, open_clip_library
from segvit.text.archive import is_script, read_script

OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")  # entries that only OpenAI's archives have
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


@dataclass(frozen=True)
class Checkpoint:
    """An architecture and, unless it starts from nothing, the tensors under their official names."""

    config: ClipConfig
    state: dict[str, Tensor] | None
    source: str  # for messages

    @property
    def vision(self) -> VisionConfig:
        """The image tower's configuration. Raises UserError when the weights have none."""
        if self.config.vision is None:
            raise UserError(f"{self.source} has no image tower of CLIP; give a whole checkpoint")
        return self.config.vision

    def text_config(self, context_length: int | None = None) -> TextConfig:
        """The text tower's configuration, for shorter texts if wanted. Raises UserError when the weights have none."""
        text = self.config.text
        if text is None:
            raise UserError(f"{self.source} has no text tower of CLIP; give a whole checkpoint")
        if context_length is None:
            return text
        if not 2 <= context_length <= text.context_length:
            raise UserError(f"context_length is {context_length}; choose 2 to {text.context_length}")
        return replace(text, context_length=context_length)

    def load(self, tower: nn.Module, state: dict[str, Tensor]) -> None:
        """Load a tower's converted part, every key used and none missing. Raises UserError where it does not fit."""
        own = tower.state_dict()
        missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        missing = [key for key in missing if not key.endswith("num_batches_tracked")]
        wrong = sorted(key for key in own.keys() & state.keys() if own[key].shape != state[key].shape)
        if missing or unknown or wrong:
            raise UserError(
                f"{self.source} does not fit {type(tower).__name__}: {len(missing)} keys missing {missing[:2]}, "
                f"{len(unknown)} unknown {unknown[:2]}, {len(wrong)} of another shape {wrong[:2]}; choose the matching "
                "model"
            )
        tower.load_state_dict(state, strict=False)


def find_clip(
    model: str | dict[str, Any] | None, weights: str | None, *, quick_gelu: bool | None = None
) -> Checkpoint:  # fmt: skip
    """The architecture of `model`, as `clip_config` takes it, with `weights`: a tag such as `openai`, a file, or None.

    Without `model` the architecture is read off the file, with heads of 64 channels and quick GELU unless
    `quick_gelu=False`. Files: .safetensors, or .pt of tensors, or OpenAI's TorchScript archive, from which only tensors
    are read. Raises UserError for unknown names, for what cannot be had, and where `quick_gelu` contradicts weights.
    """
    if weights is None:
        if model is None:
            raise UserError(
                "neither a CLIP model nor weights are given; name one, such as ViT-B-16 with weights openai"
            )
        return Checkpoint(_with_gelu(clip_config(model), quick_gelu), None, str(model))
    path = Path(weights).expanduser()
    if path.suffix in SUFFIXES or path.exists():
        state, openai = official(read_tensors(path))
        needed, cfg = (True if openai else None), dict[str, Any]()
    else:
        path, cfg = _download(model, weights)
        state, openai = official(read_tensors(path))
        needed = bool(cfg.get("quick_gelu", str(model).endswith("quickgelu")))
    if needed is not None and quick_gelu not in (None, needed):
        raise UserError(f"quick_gelu={quick_gelu} contradicts {weights}, which was trained with {needed}; leave it out")
    config = config_of(state) if model is None else clip_config(model)
    config = _with_gelu(config, needed if quick_gelu is None else quick_gelu)
    if config.vision is not None and "mean" in cfg:
        vision = replace(config.vision, mean=tuple(cfg["mean"]), std=tuple(cfg["std"]))
        config = replace(config, vision=vision)
    return Checkpoint(config, state, str(weights))


def named_clip(
    model: str, weights: str | None, *, embed_dim: int | None = None, vision: Mapping[str, Any] | None = None,
    text: Mapping[str, Any] | None = None,
) -> Checkpoint:  # fmt: skip
    """As `find_clip`, for models that are built again by the name alone; or, from nothing, with other sizes.

    `embed_dim`, `vision` and `text` replace fields of both configurations. Raises UserError where weights need the
    other GELU than the name has, where sizes come with weights, and for sizes that the towers do not have.
    """
    found, named = find_clip(model, weights), clip_config(model)
    if found.config.text and named.text and found.config.text.quick_gelu != named.text.quick_gelu:
        bare = model.removesuffix("-quickgelu")
        other = bare if bare != model else f"{model}-quickgelu"
        raise UserError(f"{weights} was trained with the other GELU than {model}; name the model {other}")
    if embed_dim is None and not vision and not text:
        return found
    if weights is not None:
        raise UserError(f"{weights} has its own sizes; leave embed_dim, vision and text out")
    joint: dict[str, Any] = {} if embed_dim is None else {"embed_dim": embed_dim}
    lists: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in (vision or {}).items()}
    try:
        config = ClipConfig(
            replace(found.vision, **lists, **joint), replace(found.text_config(), **(text or {}), **joint)
        )
    except TypeError as error:
        raise UserError(f"vision and text hold sizes of CLIP's towers ({error}); correct them") from error
    return replace(found, config=config)


def official(state: dict[str, Any]) -> tuple[dict[str, Tensor], bool]:
    """Tensors under OpenAI's names, in float32, without wrappers; and whether the file is OpenAI's own."""
    if isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    named = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    openai = all(key in named for key in OPENAI_NUMBERS)
    # open_clip keeps the text tower of some models under a name of its own.
    named = {key.removeprefix("text."): value for key, value in named.items() if not key.endswith("attn_mask")}
    kept = {key: value for key, value in named.items() if key not in OPENAI_NUMBERS}
    return {key: value.float() if value.is_floating_point() else value for key, value in kept.items()}, openai


def read_tensors(path: Path) -> dict[str, Any]:
    """The state dict in a file; never runs code from it. Raises UserError when it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"{path}: no such file of CLIP weights")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if is_script(path):
            return dict(read_script(path))
        found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, it holds more than tensors; save the state dict as .safetensors") from error
    except (SafetensorError, RuntimeError, EOFError, KeyError, zipfile.BadZipFile, OSError) as error:
        raise UserError(
            f"{path}: damaged or cut short, no CLIP weights can be read ({error}); copy it again"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds a {type(found).__name__} where a state dict was expected")
    return found


def _with_gelu(config: ClipConfig, quick_gelu: bool | None) -> ClipConfig:
    if quick_gelu is None:
        return config
    vision = None if config.vision is None else replace(config.vision, quick_gelu=quick_gelu)
    text = None if config.text is None else replace(config.text, quick_gelu=quick_gelu)
    return ClipConfig(vision, text)


def _download(model: str | dict[str, Any] | None, tag: str) -> tuple[Path, dict[str, Any]]:
    """The file of a pretrained tag, from the hub's cache or the network, and what open_clip knows of it."""
    if not isinstance(model, str):
        raise UserError(f"{tag!r} is no file, and a tag needs a model; name one, such as ViT-B-16")
    library = open_clip_library()
    bare = model.removesuffix("-quickgelu")
    cfg: dict[str, Any] = library.get_pretrained_cfg(model, tag) or library.get_pretrained_cfg(bare, tag)
    if not cfg:
        tags = library.list_pretrained_tags_by_model(bare) or library.list_pretrained_tags_by_model(model)
        raise UserError(
            f"weights {tag!r} are neither a file nor a tag of {model}; its tags are {', '.join(tags) or 'none'}"
        )
    try:
        return Path(library.download_pretrained(cfg)), cfg
    except Exception as error:  # the hub client raises many kinds: offline, gated, interrupted
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"weights {tag!r} of {model} are not on this machine and cannot be downloaded ({reason}); with a network "
            "try again, or copy the checkpoint (OpenAI's .pt, or open_clip's .safetensors) here and give its path"
        ) from error
