"""Image in, label map out: whole or sliding windows, several scales and flips, in bands of rows.

Shapes    K classes, H W the original image, R rows of a band.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from segvit.contracts import Classes, Dense, InputSpec, Readout, Runtime, Size, UserError
from segvit.data.arrays import Levels, eight_bits
from segvit.data.decode import from_picture, read_image
from segvit.data.prepare import prepare
from segvit.inference.prediction import Prediction
from segvit.inference.readout import best_class, prunable
from segvit.inference.windows import WindowedScores

if TYPE_CHECKING:
    from segvit.contracts import Model

BAND = 1_000_000  # scores held at once (classes x rows x columns): 4 MB; more is no faster, and ties cost a band each
Precision = Literal["fp32", "bf16", "fp16", "int8"]
Look = tuple[WindowedScores, bool]  # a view and whether it is mirrored


class TorchRuntime:
    """Runs a torch model: device, precision, no gradients."""

    def __init__(
        self, model: Model, *, device: str | torch.device | None = None, precision: Precision = "fp32"
    ) -> None:
        if precision == "int8":
            raise UserError("torch runs no int8 here; use --engine openvino or onnxruntime, see segvit export")
        self.device = torch.device(device) if device else next(model.parameters()).device
        self.model = model.to(self.device).eval()
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.spec: InputSpec = model.spec
        self.classes: Classes = model.classes
        self.readout: Readout = model.readout

    def __call__(self, images: Tensor) -> Dense:
        half = self.dtype != torch.float32
        with torch.inference_mode(), torch.autocast(self.device.type, self.dtype, enabled=half):
            out: Dense = self.model(images.to(self.device))
        if not half:
            return out
        return Dense(out.logits.float(), {name: value.float() for name, value in out.extras.items()}, out.covers)


@dataclass(frozen=True, kw_only=True)
class Views:
    """The looks at an image whose softmax scores are averaged. One view: raw scores, no softmax.

    Args:
        scales: Factors on the size rule of the model's input spec.
        flip: Whether each scale is also seen mirrored.
    """

    scales: tuple[float, ...] = (1.0,)
    flip: bool = False

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"scales must be positive numbers, got {list(self.scales)}")

    @property
    def count(self) -> int:
        """How many looks there are."""
        return len(self.scales) * (2 if self.flip else 1)

    def __iter__(self) -> Iterator[tuple[float, bool]]:
        return ((scale, flip) for scale in self.scales for flip in ((False, True) if self.flip else (False,)))


class Predictor:
    """Label maps from images: `Predictor(model)("street.jpg").save("street.png")`.

    Args:
        model: What `create_model` or `load` returns, or any Runtime.
        device: Where a torch model runs; None = where it is.
        precision: fp32, or bf16 / fp16 for the network (scores are always read in fp32).
        views: Scales and flips to average.
        windows_at_once: Sliding windows in one forward pass; more is faster on a GPU and takes more memory.
        prune: Leave out classes that cannot win, where that is faster; the labels are the same without.
    """

    def __init__(
        self, model: Model | Runtime, *, device: str | torch.device | None = None, precision: Precision = "fp32",
        views: Views = Views(), windows_at_once: int = 1, prune: bool = True,
    ) -> None:  # fmt: skip
        if isinstance(model, torch.nn.Module):
            model = TorchRuntime(model, device=device, precision=precision)
        self.run: Runtime = model
        self.views, self.windows_at_once, self.prune = views, windows_at_once, prune

    def __call__(self, source: str | Path | Image.Image | NDArray[Any] | Tensor, *, scores: bool = False) -> Prediction:
        """Segment one image: a path, a PIL image, a uint8 (H, W, C) array or a uint8 (C, H, W) tensor.

        C is the model's number of channels, 3 as a rule; see `as_image`. With `scores` the result also holds all class
        scores (K, H, W) as float16.
        """
        image, name = as_image(source, channels=self.run.spec.channels, levels=self.run.spec.levels)
        labels, values = self.segment(image, scores=scores)
        return Prediction(labels=labels, classes=self.run.classes, image=image, scores=values, name=name)

    @torch.inference_mode()
    def segment(self, image: NDArray[np.uint8], *, scores: bool = False) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """Labels (H, W), uint8 or uint16 above 255 classes, of a uint8 (H, W, C) image; on request scores (K, H, W)."""
        height, width = image.shape[:2]
        labels = np.empty((height, width), self.run.classes.dtype)
        kept = np.empty((len(self.run.classes), height, width), np.float16) if scores else None
        views, step = self._looks(image)
        single = self.prune and not scores and len(views) == 1
        pruned = prunable(views[0][0], (height, width), step) if single else None
        for rows, part in pruned or ():
            labels[rows.start : rows.stop] = part.numpy()
        if pruned is not None:
            return labels, None
        for rows, band in self._bands(views, (height, width), step):
            labels[rows.start : rows.stop] = best_class(band).cpu().numpy()
            if kept is not None:
                kept[:, rows.start : rows.stop] = band.cpu().numpy()
        return labels, kept

    @torch.inference_mode()
    def read(self, image: NDArray[np.uint8]) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """Labels (H, W) as `segment` gives them, and how sure each is (H, W), in 0..1.

        The winner's softmax, its share of the scores where these are sums of probabilities (SegViT), or its score where
        each class has a probability of its own (ZegCLIP). Averaged views are probabilities already.
        """
        labels = np.empty(image.shape[:2], self.run.classes.dtype)
        sure = np.empty(image.shape[:2], np.float32)
        for rows, band in self.bands(image):
            best = band.max(0)
            if self.views.count > 1 or self.run.readout.confidence == "score":
                share = best.values
            elif self.run.readout.confidence == "share":
                share = best.values / band.sum(0).clamp(min=1e-12)
            else:
                share = (best.values - band.logsumexp(0)).exp()
            labels[rows.start : rows.stop] = best.indices.cpu().numpy()
            sure[rows.start : rows.stop] = share.clamp(0, 1).cpu().numpy()
        return labels, sure

    @torch.inference_mode()
    def top(self, image: NDArray[np.uint8], count: int) -> tuple[NDArray[Any], NDArray[np.float32]]:
        """The `count` best classes of each pixel, best first (count, H, W), and their scores (count, H, W).

        The first are the labels of `segment`. Raises UserError for more classes than there are.
        """
        if not 1 <= count <= len(self.run.classes):
            raise UserError(f"count is {count}; the model has {len(self.run.classes)} classes")
        labels = np.empty((count, *image.shape[:2]), self.run.classes.dtype)
        values = np.empty((count, *image.shape[:2]), np.float32)
        for rows, band in self.bands(image):
            # Stable, so that of equal scores the first class comes first, as in the labels.
            best = band.sort(dim=0, descending=True, stable=True)
            labels[:, rows.start : rows.stop] = best.indices[:count].cpu().numpy()
            values[:, rows.start : rows.stop] = best.values[:count].cpu().numpy()
        return labels, values

    def bands(self, image: NDArray[np.uint8]) -> Iterator[tuple[range, Tensor]]:
        """Bands of class scores (K, R, W) at the image's own size, from top to bottom."""
        views, step = self._looks(image)
        yield from self._bands(views, (image.shape[0], image.shape[1]), step)

    def _looks(self, image: NDArray[np.uint8]) -> tuple[list[Look], int]:
        """The views of an image, and how many rows a band of scores may have."""
        views = []
        for scale, flip in self.views:
            prepared = prepare(image, self.run.spec, ratio=scale, flip=flip)
            views.append((WindowedScores(self.run, prepared, at_once=self.windows_at_once), flip))
        # The network's input may be larger than the image; its share of a band must not be larger than a band.
        largest = max(math.prod(image.shape[:2]), *(math.prod(view.size) for view, _ in views))
        return views, max(1, BAND * image.shape[0] // (len(self.run.classes) * largest))

    def _bands(self, views: list[Look], size: Size, step: int) -> Iterator[tuple[range, Tensor]]:
        for start in range(0, size[0], step):
            rows = range(start, min(start + step, size[0]))
            bands = (view.rows_at(size, rows).flip(-1) if flip else view.rows_at(size, rows) for view, flip in views)
            yield rows, next(bands) if len(views) == 1 else mean_softmax(bands, len(views))


def mean_softmax(bands: Iterator[Tensor], count: int) -> Tensor:
    """The mean over views of the softmax over classes, views added in order."""
    total: Tensor | None = None
    for band in bands:
        band = band.softmax(0)
        total = band if total is None else total.add_(band)
    assert total is not None  # there is at least one view
    return total.div_(count)


def as_image(
    source: str | Path | Image.Image | NDArray[Any] | Tensor, *, channels: int = 3, levels: Levels | None = None
) -> tuple[NDArray[np.uint8], str]:
    """A source as uint8 (H, W, channels) and its name.

    Files and PIL images become that as training images do. Arrays and tensors must have these channels (one may be left
    out) and be uint8; with `levels`, those that become 0 and 255, any other type will do.

    Raises UserError for other types, shapes or value ranges.
    """
    if isinstance(source, str | Path):
        return read_image(Path(source), channels=channels, levels=levels), str(source)
    if isinstance(source, Image.Image):
        return from_picture(ImageOps.exif_transpose(source), "the picture", channels=channels, levels=levels), ""
    array = source.cpu().numpy() if isinstance(source, Tensor) else np.asarray(source)
    if array.ndim == 2 and channels == 1:
        array = array[..., None]
    elif isinstance(source, Tensor) and array.ndim == 3:
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 and levels is not None:
        array = eight_bits(array, "the array", levels)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != channels or not array.size:
        kind = f"tensor ({channels}, H, W)" if isinstance(source, Tensor) else f"array (H, W, {channels})"
        raise UserError(
            f"an image {kind} must be uint8 with {channels} channels and not empty, got {array.dtype} of shape "
            f"{array.shape}"
        )
    return np.ascontiguousarray(array), ""
