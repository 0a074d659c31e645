"""The architectures of CLIP's two towers: by a name of open_clip, or read off a state dict.

Card      quick GELU is part of the weights, not of the name: OpenAI's weights need it, under whatever name they are
          asked for; `segvit.text.checkpoint` sees to that.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from segvit.contracts import UserError

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP's images
HEAD = 64  # channels of a head, unless a configuration says otherwise
CELL = 32  # stride of the last map of a ResNet
VISION_KEYS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
TEXT_KEYS = {"context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio"}


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image tower: a ViT with `layers` blocks, or a ResNet where `layers` has the depths of its four stages."""

    width: int
    layers: int | tuple[int, int, int, int]
    heads: int  # of the blocks, or of a ResNet's attention pool
    embed_dim: int
    image_size: int
    patch_size: int | None = None  # None for a ResNet
    mlp_ratio: float = 4.0
    quick_gelu: bool = True
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The text tower."""

    width: int
    layers: int
    heads: int
    embed_dim: int
    context_length: int = 77
    vocab_size: int = 49408
    mlp_ratio: float = 4.0
    quick_gelu: bool = True


@dataclass(frozen=True)
class ClipConfig:
    """Both towers; None for one that a file lacks."""

    vision: VisionConfig | None
    text: TextConfig | None


def open_clip_library() -> ModuleType:
    """The open_clip package, imported on first use, which takes seconds. Raises UserError without it."""
    try:
        import open_clip
    except ImportError as error:
        raise UserError(
            f"CLIP's tokenizer and model names come from open_clip_torch, which is not here ({error}); "
            "install it with: pip install 'segvit[clip]'"
        ) from error
    library: ModuleType = open_clip
    return library


def clip_config(model: str | dict[str, Any]) -> ClipConfig:
    """The architecture of a name of open_clip, such as `ViT-B-16-quickgelu` or `RN50`; needs no network.

    What `describe_config` made of one may stand in the place of a name; then open_clip is not asked. Raises UserError
    for an unknown name and for towers of other kinds (SigLIP, EVA, timm's, Hugging Face's).
    """
    if not isinstance(model, str):
        return _read_config(model)
    library = open_clip_library()
    names = library.list_models()
    if model not in names:
        near = difflib.get_close_matches(model, names, n=3, cutoff=0.4) or ["ViT-B-16", "RN50"]
        raise UserError(f"open_clip has no model {model!r}; did you mean {', '.join(near)}?")
    data: dict[str, Any] = library.get_model_config(model)
    vision, text = data["vision_cfg"], data["text_cfg"]
    odd = sorted(
        (data.keys() - {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"})
        | (vision.keys() - VISION_KEYS) | (text.keys() - TEXT_KEYS)
    )  # fmt: skip
    if odd:
        raise UserError(
            f"{model} is no CLIP as OpenAI built it (it has {', '.join(odd)}); choose a plain name such as ViT-B-16, "
            "ViT-L-14 or RN50"
        )
    quick = bool(data.get("quick_gelu", False))
    layers = vision["layers"]
    resnet = isinstance(layers, list)
    width = vision["width"]
    return ClipConfig(
        VisionConfig(
            width=width, layers=tuple(layers) if resnet else layers, embed_dim=data["embed_dim"],
            heads=(width * CELL if resnet else width) // vision.get("head_width", HEAD),
            image_size=vision["image_size"], patch_size=None if resnet else vision["patch_size"],
            mlp_ratio=vision.get("mlp_ratio", 4.0), quick_gelu=quick,
        ),
        TextConfig(
            width=text["width"], layers=text["layers"], heads=text["heads"], embed_dim=data["embed_dim"],
            context_length=text.get("context_length", 77), vocab_size=text.get("vocab_size", 49408),
            mlp_ratio=text.get("mlp_ratio", 4.0), quick_gelu=quick,
        ),
    )  # fmt: skip


def describe_config(config: ClipConfig) -> dict[str, Any]:
    """An architecture as JSON holds it, for models that are built again where open_clip is not installed."""
    data: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return data


def _read_config(data: dict[str, Any]) -> ClipConfig:
    try:
        vision, words = data["vision"], data["text"]
        if vision is not None:
            vision = {key: tuple(value) if isinstance(value, list) else value for key, value in vision.items()}
        return ClipConfig(vision and VisionConfig(**vision), words and TextConfig(**words))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{str(data)[:60]} is no architecture of CLIP ({error}); give a name of open_clip, such as ViT-B-16"
        ) from error


def config_of(state: dict[str, Tensor], *, quick_gelu: bool = True) -> ClipConfig:
    """The architecture of an official state dict, read off its shapes; heads of 64 channels, as OpenAI's have.

    Raises UserError when there is neither tower in it.
    """
    config = ClipConfig(_vision_config(state, quick_gelu), _text_config(state, quick_gelu))
    if config.vision is None and config.text is None:
        raise UserError(f"no tower of CLIP in these weights (keys such as {list(state)[:2]}); give a CLIP checkpoint")
    return config


def _text_config(state: dict[str, Tensor], quick_gelu: bool) -> TextConfig | None:
    if "text_projection" not in state:
        return None
    width, embed_dim = state["text_projection"].shape
    return TextConfig(
        width=width, heads=max(1, width // HEAD), embed_dim=embed_dim, quick_gelu=quick_gelu,
        layers=_numbers(state, r"transformer\.resblocks\.(\d+)\.ln_1\.weight"),
        context_length=len(state["positional_embedding"]), vocab_size=len(state["token_embedding.weight"]),
        mlp_ratio=len(state["transformer.resblocks.0.mlp.c_fc.weight"]) / width,
    )  # fmt: skip


def _vision_config(state: dict[str, Tensor], quick_gelu: bool) -> VisionConfig | None:
    if "visual.proj" in state:
        width, embed_dim = state["visual.proj"].shape
        patch = state["visual.conv1.weight"].shape[-1]
        return VisionConfig(
            width=width, heads=max(1, width // HEAD), embed_dim=embed_dim, patch_size=patch, quick_gelu=quick_gelu,
            layers=_numbers(state, r"visual\.transformer\.resblocks\.(\d+)\.ln_1\.weight"),
            image_size=patch * math.isqrt(len(state["visual.positional_embedding"]) - 1),
            mlp_ratio=len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]) / width,
        )  # fmt: skip
    if "visual.attnpool.c_proj.weight" in state:
        width = len(state["visual.layer1.0.conv1.weight"])
        first, second, third, last = (_numbers(state, rf"visual\.layer{i}\.(\d+)\.conv1\.weight") for i in range(1, 5))
        return VisionConfig(
            width=width, layers=(first, second, third, last), heads=max(1, width * CELL // HEAD),
            embed_dim=len(state["visual.attnpool.c_proj.weight"]), quick_gelu=quick_gelu,
            image_size=CELL * math.isqrt(len(state["visual.attnpool.positional_embedding"]) - 1),
        )  # fmt: skip
    return None


def _numbers(state: dict[str, Tensor], pattern: str) -> int:
    """How many different numbers stand at the group of the pattern."""
    return len({match[1] for key in state if (match := re.fullmatch(pattern, key))})
