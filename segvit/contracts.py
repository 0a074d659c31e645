"""The contracts: what the parts of the library hand to each other. All may import this; it imports nothing of ours.

Shapes    B images, K classes, H W pixels of the network's input, h w token or map grid, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:  # kept out of the import: the command line and the data tools use this file without torch
    from torch import Tensor, nn

Size = tuple[int, int]  # (height, width), always in this order
Color = tuple[int, int, int]  # red, green, blue in 0..255


class Features(NamedTuple):
    """What a backbone returns: feature maps from shallow to deep."""

    maps: list[Tensor]  # (B, C_i, h_i, w_i)
    strides: list[int]  # pixels per cell of each map
    grid: Size  # cells of the finest map; a plain ViT's token grid
    covers: Size  # pixels that the grid spans: the input, padded up to whole cells
    pooled: Tensor | None = None  # (B, C) the global token, where there is one
    extras: dict[str, Tensor] = {}  # what adapters and text-conditioned backbones hand on; never mutated in place


class Dense(NamedTuple):
    """What a dense system returns for normalised images (B, C, H, W)."""

    logits: Tensor  # (B, K, h, w) class scores at any stride, comparable by argmax
    extras: dict[str, Tensor]  # every tensor that the loss, the readout or a golden test looks at, by name
    covers: Size  # input area that the grid of `logits` spans; the readout interpolates over it and crops


class MaskScores(NamedTuple):
    """Class scores that are sums of masks: weights.T @ sigmoid(masks, resized over `covers`) - offset."""

    masks: Tensor  # (B, Q, h, w) logits
    weights: Tensor | None = None  # (B, Q, K) not negative; None = query k is class k
    offset: Tensor | None = None  # (B, K)


class Readout(NamedTuple):
    """How a system turns its output into class scores for a band of pixel rows.

    `scores(out, size, rows)` gives (B, K, len(rows), W) for the network's input size (H, W). Where these are sums of
    masks, `masks` says of which, so that classes that cannot win need not be computed (`inference.readout`).
    """

    scores: Callable[[Dense, Size, range], Tensor]
    keeps: tuple[str, ...] = ()  # the extras that `scores` reads; inference drops all others
    # How sure the winner is: its softmax, its share of all scores where those are sums of probabilities already, or its
    # score where each class has a probability of its own.
    confidence: Literal["softmax", "share", "score"] = "softmax"
    masks: Callable[[Dense], MaskScores | None] | None = None  # None, or giving None: the scores are something else

    def __call__(self, out: Dense, size: Size, rows: range) -> Tensor:
        return self.scores(out, size, rows)

    def trim(self, out: Dense) -> Dense:
        """The same output holding only what the readout needs."""
        return out._replace(extras={name: out.extras[name] for name in self.keeps if name in out.extras})


class Sample(NamedTuple):
    """One image and its mask on the way through the data pipeline."""

    image: NDArray[np.uint8]  # (H, W, C); three channels are red green blue
    mask: NDArray[Any]  # (H, W) class ids, uint8 (uint16 above 255 classes), with the ignore id
    name: str = ""  # where it came from, for messages


class Batch(NamedTuple):
    """What the loaders yield: normalised images, masks and where they came from."""

    images: Tensor  # (B, C, H, W) float32
    masks: Tensor  # (B, H, W) uint8, or int32 above 255 classes
    names: list[str]


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """How an image becomes the network's input and how it is read; travels with the weights.

    `mean` and `std` are for values in 0..1, one for each channel of the image. At most one size rule is set: `scale`
    (short side to min(scale), long side at most max(scale), the ratio kept; with `min_side` the short side is at least
    that and the long limit is dropped) or `exact` (height, width). With neither, images keep their size. `window`
    switches to sliding windows. `levels` are the raw levels that become 0 and 255 when an image file is read; None =
    the full range of its type.
    """

    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    scale: tuple[int, int] | None = None
    min_side: int | None = None
    exact: Size | None = None
    window: Size | None = None
    stride: Size | None = None
    levels: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std) or not self.mean:
            raise UserError(
                f"mean has {len(self.mean)} values and std {len(self.std)}; give both one for each channel of the image"
            )
        if self.scale and self.exact:
            raise UserError(f"scale {self.scale} and exact {self.exact} exclude each other; set one of them")
        if (self.window is None) != (self.stride is None):
            raise UserError("window and stride go together; set both for sliding windows or neither")
        pairs = zip(self.window or (), self.stride or (), strict=True)
        if not all(1 <= stride <= window for window, stride in pairs):  # a gap would have no scores at all
            raise UserError(
                f"stride {self.stride} must lie between 1 and the window {self.window}, or windows leave gaps"
            )

    @property
    def channels(self) -> int:
        """The number of channels of the images."""
        return len(self.mean)

    def to_json(self) -> dict[str, Any]:
        """The content of `preprocessor_config.json`, in the hub's keys where they exist."""
        short, long = (min(self.scale), max(self.scale)) if self.scale else (None, None)
        size = {"shortest_edge": short, "longest_edge": long} if self.scale else None
        if self.exact:
            size = {"height": self.exact[0], "width": self.exact[1]}
        return {
            "do_resize": size is not None, "size": size, "resample": 2, "min_side": self.min_side,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": list(self.mean), "image_std": list(self.std),
            "do_reduce_labels": False, "window": self.window, "stride": self.stride, "levels": self.levels,
        }  # fmt: skip

    @staticmethod
    def from_json(data: dict[str, Any]) -> InputSpec:
        """The inverse of `to_json`."""
        size = data.get("size") or {}
        return InputSpec(
            mean=tuple(data["image_mean"]), std=tuple(data["image_std"]), min_side=data.get("min_side"),
            scale=(size["longest_edge"], size["shortest_edge"]) if "shortest_edge" in size else None,
            exact=(size["height"], size["width"]) if "height" in size else None,
            window=_pair(data.get("window")), stride=_pair(data.get("stride")),
            levels=(data["levels"][0], data["levels"][1]) if data.get("levels") else None,
        )  # fmt: skip


def _pair(value: list[int] | None) -> Size | None:
    return (value[0], value[1]) if value else None


@dataclass(frozen=True)
class Classes:
    """The class table: names and colours in id order."""

    names: tuple[str, ...]
    palette: tuple[Color, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.palette):
            raise ValueError(f"{len(self.names)} class names but {len(self.palette)} colours; give one colour a class")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def ignore_index(self) -> int:
        """255 for up to 255 classes, 65535 above."""
        return 255 if len(self.names) <= 255 else 65535

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """The integer type of label maps."""
        return np.uint8 if len(self.names) <= 255 else np.uint16


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What `config.json` says of a model: the builder, its keywords and the class table.

    `adapter` holds `method` and `options` of the tuning method that is attached; `added` names the tensors, such as a
    bias, that a merged adapter gave to layers which the builder makes without. `words` is where a model that knows
    words has them from, see `segvit.tasks.open_vocabulary`.
    """

    name: str
    options: dict[str, Any]
    classes: Classes
    adapter: dict[str, Any] | None = None
    added: tuple[str, ...] = ()
    words: dict[str, Any] | None = None

    def to_json(self, version: str) -> dict[str, Any]:
        """The content of `config.json`."""
        names = self.classes.names
        tuned: dict[str, Any] = {"adapter": self.adapter} if self.adapter else {}
        tuned |= {"added": list(self.added)} if self.added else {}
        tuned |= {"words": self.words} if self.words else {}
        return {
            "model_type": "segvit", "name": self.name, "options": self.options, "num_labels": len(names),
            "id2label": {str(i): name for i, name in enumerate(names)},
            "label2id": {name: i for i, name in enumerate(names)},
            "palette": [list(color) for color in self.classes.palette],
            "ignore_index": self.classes.ignore_index, "segvit_version": version, **tuned,
        }  # fmt: skip

    @staticmethod
    def from_json(data: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_json`."""
        names = tuple(data["id2label"][str(i)] for i in range(len(data["id2label"])))
        palette = tuple((int(r), int(g), int(b)) for r, g, b in data["palette"])
        return ModelConfig(
            name=data["name"], options=data["options"], classes=Classes(names, palette), adapter=data.get("adapter"),
            added=tuple(data.get("added", ())), words=data.get("words"),
        )  # fmt: skip


class Runtime(Protocol):
    """What runs a network: torch here, ONNX Runtime or OpenVINO from `export`; inference does not care which."""

    spec: InputSpec
    classes: Classes
    readout: Readout

    def __call__(self, images: Tensor) -> Dense:
        """Normalised images (B, C, H, W) on the CPU -> the system's output."""
        ...


class UserError(ValueError):
    """Something the user can mend: the message says what was seen and what to do. The command line prints it alone."""


if TYPE_CHECKING:

    class Model(nn.Module):
        """The type of what `create_model` and `load` return: any system's module with these attributes attached.

        Only a name for the type checker and the reader: systems derive from `nn.Module`, never from this.
        """

        spec: InputSpec
        classes: Classes
        readout: Readout
        config: ModelConfig
        adapter: Any  # the handle of the tuning method that is attached, or None
