"""Few-shot networks with their supports fixed: plain dense models of background and object, for any kind of inference.

Shapes    K supports, H W pixels of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from segvit.contracts import Classes, Dense, InputSpec, ModelConfig, Readout, Sample, UserError
from segvit.data.decode import LabelRule, read
from segvit.data.episodes import check_support, fit
from segvit.inference.prediction import Prediction
from segvit.inference.predictor import Predictor, as_image
from segvit.nn.readout import logit_rows
from segvit.systems.few_shot import Network, Supports, resize, size_of
from segvit.tasks.few_shot import tensors
from segvit.tasks.few_shot_models import SPEC, load_few_shot
from segvit.tasks.predict import Plan, Predicted, segment_files
from segvit.tasks.sources import default_device, default_folder, find_images

if TYPE_CHECKING:
    from segvit.contracts import Model

Source = str | Path | Image.Image | NDArray[Any] | Tensor


class Supported(nn.Module):
    """A few-shot network that knows its supports: images (B, 3, H, W) -> logits (B, 2, H, W), background and object.

    What it needs of the supports was computed once and is kept in buffers.
    """

    prototypes: Tensor  # (1, K, d)
    deepest: Tensor  # (1, K, C, h, w)
    grams: Tensor  # (1, K, C, C)

    def __init__(self, network: Network, supports: Supports) -> None:
        super().__init__()
        self.network = network
        for name, value in supports._asdict().items():
            self.register_buffer(name, value)

    def forward(self, images: Tensor) -> Dense:
        found = (self.prototypes, self.deepest, self.grams)
        supports = Supports(*(value.expand(len(images), *value.shape[1:]) for value in found))
        return self.network.segment(images, supports)


def set_support(
    network: Network, images: Sequence[Source], masks: Sequence[NDArray[Any]], *, size: int = 473, name: str = "object"
) -> Model:
    """A plain model that segments what the supports show, for `Predictor` and everything else that takes a model.

    K images (paths, pictures or uint8 arrays) and masks (H, W), every value but 0 the object. Supports are fitted into
    squares of `size` as in the test of few-shot networks, with which images to segment have their long side. Several
    supports are averaged, or weighed as the network was trained to.

    Raises UserError for no support, a mask of another size than its image, and an object that is missing or too small
    to be seen on the network's grid.
    """
    if not images or len(images) != len(masks):
        raise UserError(f"{len(images)} support images and {len(masks)} masks; give one mask an image, 1 or more")
    samples = []
    for number, (image, mask) in enumerate(zip(images, masks, strict=True)):
        pixels, path = as_image(image)
        where = path or f"support {number}"
        if mask.shape != pixels.shape[:2]:
            raise UserError(f"{where} is {pixels.shape[:2]} and its mask {mask.shape}; make the sizes equal")
        samples.append(Sample(pixels, (mask != 0).astype(np.uint8), where))
    return _with_support(network, samples, size=size, name=name)


@torch.no_grad()
def _with_support(network: Network, samples: list[Sample], *, size: int, name: str) -> Model:
    device = next(network.parameters()).device
    pixels, masks = (value.to(device) for value in tensors([fit(sample, size) for sample in samples]))
    supports = network.eval().matcher.describe(pixels[None], masks[None])
    grid = size_of(supports.deepest)
    for sample, mask in zip(samples, masks, strict=True):
        if not sample.mask.any():
            raise UserError(f"the mask of {sample.name} shows no object; paint it, or leave this support out")
        if not resize((mask == 1).float()[None, None], grid).any():
            raise UserError(
                f"the object in {sample.name} has {int(sample.mask.sum())} pixels, too few to be seen on the network's "
                f"grid of {grid[0]} x {grid[1]}; crop the image around it"
            )
    model = cast("Model", Supported(network, supports).eval())
    model.spec = InputSpec(mean=SPEC.mean, std=SPEC.std, scale=(size, size))
    model.classes, model.readout = Classes(("background", name), ((0, 0, 0), (231, 76, 60))), Readout(logit_rows)
    model.config = ModelConfig(name="few_shot_supported", options={"supports": len(samples)}, classes=model.classes)
    model.adapter = None
    return model


def read_supports(images: str, masks: str, *, label: int | None = None) -> list[Sample]:
    """Supports from files, the masks binary: a mask has its image's name, whatever the ending; or one of each.

    The object has the value `label`, or every value but 0. Raises UserError for an image without a mask or with
    several, and for another size.
    """
    pictures, found = find_images(images), find_images(masks)
    by_name: dict[str, list[Path]] = {}
    for path, name in found.items():
        by_name.setdefault(str(name.with_suffix("")), []).append(path)
    alone = len(pictures) == len(found) == 1
    table = (np.arange(65536) != 0 if label is None else np.arange(65536) == label).astype(np.int32)
    samples = []
    for path, name in pictures.items():
        fitting = list(found) if alone else by_name.get(str(name.with_suffix("")), [])
        if len(fitting) != 1:
            raise UserError(f"{path} has {len(fitting)} masks in {masks}; give one file of the same name")
        samples.append(read(path, fitting[0], LabelRule(ignore=255, table=table), str(path)))
    return samples


def predict_by_support(
    source: str, model: str, support: str, support_masks: str, *, label: int | None, name: str, out: str | None,
    overlay: bool, device: str | None,
) -> Predicted:  # fmt: skip
    """Segment files with the model of a run and supports from files; writes label maps as `segvit predict`.

    An image that equals a support is left out like one that cannot be read: its mask is known.
    """
    samples = read_supports(support, support_masks, label=label)

    def load() -> Callable[..., Prediction]:
        network, config = load_few_shot(model, device=device or default_device())
        segment = Predictor(_with_support(network, samples, size=config["size"], name=name))

        def new_only(image: Path, *, scores: bool) -> Prediction:
            query = Sample(as_image(image)[0], np.empty(0), str(image))
            for sample in samples:
                check_support(query, sample)
            return segment(image, scores=scores)

        return new_only

    extra = {"overlay": overlay, "scores": False, "areas": False}
    return segment_files(source, Path(out) if out else default_folder(model), Plan(extra=extra), load)
