"""Pretrained weights for timm trunks: from the hub, or from a local safetensors, pth or npz file.

Official layouts (timm, DeiT, MAE, DINOv2, DINOv3, BEiT, OpenAI CLIP, the JAX npz of AugReg) go through timm's own key
filters; position embeddings are resized bicubic, or bilinear where a paper did so, without antialias. For images of
other than three channels the patch embedding of RGB weights is changed as timm does: one channel takes the sum over
red, green and blue (a gray image then gives the very tokens of its RGB copy); more take red, green, blue, red ... in
turn, times 3 / channels.
"""

from __future__ import annotations

import inspect
import math
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import adapt_input_conv, load_state_dict_from_hf
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from segvit.contracts import UserError
from segvit.nn.tokens import resize_positions

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".npz")
PATCHES = "patch_embed.proj.weight"  # (D, C, p, p)
# A classifier, pooling and pretraining parts of published checkpoints that no token map passes through.
UNUSED = (
    r"^(head|head_dist|fc_norm|norm|attn_pool|mask_token|decoder|decoder_\w+|lm_head|rope|logit_\w+)(\.|$)"
    r"|relative_position_index"
)


def read_state(path: Path) -> dict[str, Any]:
    """The state dict in a .safetensors or torch file; never runs code from it.

    Raises UserError when the file is missing, damaged or a pickle of code.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: refused, the file holds more than tensors (pickled code, or it is damaged); "
            "save its state dict as .safetensors first"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, zipfile.BadZipFile, OSError) as error:
        raise UserError(f"{path}: cannot be read as weights, damaged or cut short ({error}); copy it again") from error
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a state dict")
    return state


def unwrap(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors inside the wrappers that training frameworks add (`state_dict`, `model`, `module.`)."""
    for key in ("state_dict", "model_ema", "model", "teacher", "module"):
        if isinstance(state.get(key), dict):
            state = state[key]
    tensors = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise UserError("the file holds no tensors; is it a state dict?")
    return tensors


def find_state(weights: str) -> dict[str, Tensor]:
    """The tensors of a local file, or of a hub name (a timm tag or `org/repo`). Raises UserError without any."""
    path = Path(weights).expanduser()
    local = path.suffix in SUFFIXES or path.exists()
    return unwrap(read_state(path) if local else _download(weights))


def load_weights(
    trunk: nn.Module, weights: str, *, needed: Collection[nn.Parameter] = (),
    position_mode: Literal["bicubic", "bilinear"] = "bicubic",
) -> None:  # fmt: skip
    """Load pretrained weights into a timm ViT, in place.

    All must be found but what no token map passes through; `needed` are parameters that must be found in any case.
    `position_mode` is how position embeddings of another grid are resized.

    Raises UserError when the file or hub name cannot be had or does not fit the architecture.
    """
    path = Path(weights).expanduser()
    if path.suffix == ".npz":
        _load_npz(trunk, path, position_mode)
        return
    state = find_state(weights)
    try:
        fitted = _filter(trunk, position_mode)(state, trunk)
    except (AttributeError, KeyError, ValueError, RuntimeError) as error:  # timm's filters trust what they are given
        raise UserError(
            f"{weights} does not fit {type(trunk).__name__} ({error}); choose the matching backbone"
        ) from error
    own = trunk.state_dict()
    _fit_channels(fitted, own)
    used = {key: value for key, value in fitted.items() if not re.search(UNUSED, key) or key in own}
    must = {id(parameter) for parameter in needed}
    missing = [
        key for key, value in trunk.named_parameters()
        if key not in used and (id(value) in must or not re.search(UNUSED, key))
    ]  # fmt: skip
    unknown = [key for key in used if key not in own]
    wrong = [key for key in used if key in own and used[key].shape != own[key].shape]
    if missing or unknown or wrong:
        raise UserError(
            f"{weights} does not fit {type(trunk).__name__}: {len(missing)} keys missing {missing[:2]}, "
            f"{len(unknown)} unknown {unknown[:2]}, {len(wrong)} of another shape {wrong[:2]}; "
            "choose the matching backbone"
        )
    trunk.load_state_dict(used, strict=False)


def _fit_channels(state: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    """Change the patch embedding of RGB weights to the trunk's number of channels, in place."""
    kernel, channels = state.get(PATCHES), own[PATCHES].shape[1]
    if kernel is not None and kernel.ndim == 4 and kernel.shape[1] == 3:
        state[PATCHES] = adapt_input_conv(channels, kernel)


def _load_npz(trunk: nn.Module, path: Path, position_mode: str) -> None:
    """AugReg's JAX archive through timm's reader, except for positions, which timm resizes bilinearly."""
    if not path.is_file():
        raise UserError(f"{path}: no such weights file")
    if not isinstance(trunk, VisionTransformer):
        raise UserError(f"{path}: .npz weights fit vit_ names only, not {type(trunk).__name__}; give another file")
    try:
        with path.open("rb") as file, np.load(file) as archive:
            positions = torch.from_numpy(archive[next(key for key in archive.files if key.endswith("pos_embedding"))])
        trunk.load_pretrained(str(path))
    except (StopIteration, EOFError, KeyError, ValueError, RuntimeError, OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} does not fit {type(trunk).__name__} or is damaged ({error}); choose the matching backbone"
        ) from error
    head = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
    side = math.isqrt(positions.shape[1] - head)
    grid = tuple(trunk.patch_embed.grid_size)
    patches = resize_positions(positions[:, head:], old=(side, side), new=grid, mode=position_mode)
    with torch.no_grad():
        trunk.pos_embed.copy_(torch.cat([positions[:, :head], patches], dim=1))


def _download(name: str) -> dict[str, Any]:
    repository = name if "/" in name else f"timm/{name}"
    try:
        return dict(load_state_dict_from_hf(repository.removeprefix("hf-hub:"), weights_only=True))
    except Exception as error:  # the hub client raises many kinds: offline, gated, unknown, interrupted
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"weights {name!r} are neither a local file nor to be had from the hub ({reason}); check the name and the "
            "network, or download the file elsewhere and pass weights=PATH, or weights=none to start from nothing"
        ) from error


def _filter(trunk: nn.Module, position_mode: str) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]]:
    """timm's own key filter for the trunk's family, without antialias where it can be chosen."""
    family = next(
        parent for parent in type(trunk).__mro__ if "checkpoint_filter_fn" in vars(sys.modules[parent.__module__])
    )
    function = vars(sys.modules[family.__module__])["checkpoint_filter_fn"]
    accepts = inspect.signature(function).parameters

    def apply(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        options: dict[str, Any] = {"antialias": False, "interpolation": position_mode}
        if "adapt_layer_scale" in accepts:
            options["adapt_layer_scale"] = any("gamma_" in key for key in state)
        return dict(function(state, model, **options))

    return apply
