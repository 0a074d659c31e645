"""RetinaNet on PVT: dense boxes from a pyramid transformer, the detector of the PVT papers.

Paper     T.-Y. Lin, P. Goyal, R. Girshick, K. He, P. Dollar, "Focal Loss for Dense Object Detection", ICCV 2017; on
          PVT: W. Wang et al., ICCV 2021, arXiv 2102.12122.
Idea      An FPN from stride 8 on with two extra levels; at each place nine anchors, classified with the focal loss.
Differs   from the mmdetection code behind the paper: the network, its losses and its boxes are torchvision's, which
          divides the losses by each image's own matched anchors and puts a ReLU between the two extra levels.
Checked   parameters against the paper's tables; learning in tests/tasks/test_detect.py.

Shapes    B images, K classes, level i of P channels at stride s_i = 8 ... 128.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from segvit.backbones.pvt import DEPTHS, PVT, pvt
from segvit.backbones.pyramid import Pyramid, pyramid
from segvit.contracts import UserError

OCTAVES = tuple(2 ** (i / 3) for i in range(3))  # of the anchors at each place, each in three shapes
RATIOS = (0.5, 1.0, 2.0)  # height : width
STRIDES = (8, 16, 32, 64, 128)


class Neck(nn.Module):
    """A backbone and its FPN: images (B, 3, H, W) -> levels p3 to p7; the extra ones start at the last raw map."""

    def __init__(self, backbone: PVT | Pyramid, dim: int) -> None:
        from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

        super().__init__()
        dims = list(backbone.dims[-3:])
        extra = LastLevelP6P7(dims[-1], dim)
        extra.use_P5 = False  # it would guess from equal widths
        self.backbone, self.fpn = backbone, FeaturePyramidNetwork(dims, dim, extra_blocks=extra)
        self.out_channels = dim  # what torchvision asks for

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        maps = self.backbone(images).maps[-3:]
        levels: OrderedDict[str, Tensor] = self.fpn(OrderedDict((f"p{i}", x) for i, x in enumerate(maps, start=3)))
        return levels


def retinanet(
    *,
    num_classes: int,
    backbone: str = "pvt_tiny",
    weights: str | None = None,
    size: tuple[int, int] = (800, 1333),
    fpn_dim: int = 256,
    anchor_scale: float = 4.0,
    drop_path: float = 0.1,
    depths: Sequence[int] | None = None,
    dims: Sequence[int] | None = None,
) -> nn.Module:
    """torchvision's RetinaNet over PVT v1 (`pvt_tiny` ... `pvt_large`) or a pyramid of timm such as `pvt_v2_b2`.

    In training it takes a list of images (3, H, W) in 0..1 and a list of {"boxes": (N, 4) left top right bottom in
    pixels, "labels": (N,)} and returns named losses; in evaluation it takes the images and returns a list of {"boxes",
    "labels", "scores"}, the best first. Images are normalised and resized inside: short side to size[0], long side at
    most size[1]. The smallest anchor has `anchor_scale` times the stride as its side. `depths` and `dims` change PVT v1
    for training from nothing. Raises UserError for a backbone whose last strides are not 8, 16 and 32.
    """
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    trunk: PVT | Pyramid
    if backbone in DEPTHS:
        trunk = pvt(backbone, weights=weights, drop_path=drop_path, depths=depths, dims=dims)
    elif depths is not None or dims is not None:
        raise UserError(f"depths and dims are for PVT v1, not for {backbone}; leave them out")
    else:
        trunk = pyramid(backbone, weights=weights, drop_path=drop_path)
        if list(trunk.strides[-3:]) != list(STRIDES[:3]):
            raise UserError(f"{backbone} has strides {trunk.strides}; RetinaNet reads maps at 8, 16 and 32")
    sizes = tuple(tuple(anchor_scale * stride * octave for octave in OCTAVES) for stride in STRIDES)
    network: nn.Module = RetinaNet(
        Neck(trunk, fpn_dim), num_classes, min_size=size[0], max_size=size[1], image_mean=list(IMAGENET_DEFAULT_MEAN),
        image_std=list(IMAGENET_DEFAULT_STD), anchor_generator=AnchorGenerator(sizes, (RATIOS,) * len(sizes)),
        detections_per_img=100,
    )  # fmt: skip
    return network


DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "retinanet_pvt_tiny": retinanet,
    "retinanet_pvt_small": partial(retinanet, backbone="pvt_small"),
    "retinanet_pvt_medium": partial(retinanet, backbone="pvt_medium"),
    "retinanet_pvt_large": partial(retinanet, backbone="pvt_large"),
    "retinanet_pvt_v2_b0": partial(retinanet, backbone="pvt_v2_b0"),
    "retinanet_pvt_v2_b2": partial(retinanet, backbone="pvt_v2_b2"),
}
