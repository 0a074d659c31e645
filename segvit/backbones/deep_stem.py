"""The ResNet of few-shot segmentation: a stem of three 3x3 convolutions and stride 8, dilated from stage 3 on.

Source    semseg's ResNet (H. Zhao et al.), which PFENet and BAM use. The 3x3 convolutions of stages 3 and 4 have
          dilation 2 and 4 in all blocks; timm's `output_stride` keeps the dilation before in a stage's first block.
Checked   tests/golden/few_shot_segmentation__*, the features inside.

Shapes    B images, H W pixels; h = ceil(H / 8).
"""

from __future__ import annotations

from collections.abc import Sequence

from timm.models.resnet import Bottleneck
from torch import Tensor, nn

from segvit.backbones.weights import find_state
from segvit.contracts import UserError
from segvit.nn.rename import Rules, rename

DEPTHS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "tiny": (1, 1, 1, 1)}
WIDTHS = {"tiny": 16}  # of stem and first planes where they are not 64; the tiny one is ours, for quick runs
STAGES: Rules = (  # of the official ImageNet files, then of the few-shot checkpoints
    *((rf"^(conv|bn){i}\.", rf"stem.\g<1>{i}.") for i in (1, 2, 3)),
    *((rf"^stem\.conv{i}\.", f"stem.{3 * i - 3}.") for i in (1, 2, 3)),
    *((rf"^stem\.bn{i}\.", f"stem.{3 * i - 2}.") for i in (1, 2, 3)),
    (r"^layer0\.", "stem."),
)


class DeepStemResNet(nn.Module):
    """Images (B, 3, H, W) -> the stem's map and those of the four stages, the last three of them (B, C, h, w)."""

    def __init__(
        self, blocks: Sequence[int], *, stem: int = 64, planes: int = 64, dilations: tuple[int, int] = (2, 4)
    ) -> None:
        super().__init__()
        widths = [(3, stem, 2), (stem, stem, 1), (stem, 2 * stem, 1)]
        layers: list[nn.Module] = []
        for inputs, outputs, stride in widths:
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.stem = nn.Sequential(*layers, nn.MaxPool2d(3, 2, 1))
        self.dims = [2 * stem, *(planes * 2**i * Bottleneck.expansion for i in range(4))]
        steps = zip(blocks, (1, 2, 1, 1), (1, 1, *dilations), strict=True)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            stage(self.dims[i], planes * 2**i, count, stride, dilation)
            for i, (count, stride, dilation) in enumerate(steps)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = self.until_third(images)
        return [*maps, self.layer4(maps[-1])]

    def until_third(self, images: Tensor) -> list[Tensor]:
        """All maps but the last, which few-shot networks take of a masked third one."""
        maps = [self.stem(images)]
        for layer in (self.layer1, self.layer2, self.layer3):
            maps.append(layer(maps[-1]))
        return maps


def stage(inputs: int, planes: int, blocks: int, stride: int, dilation: int) -> nn.Sequential:
    """Bottlenecks to 4 * planes channels; the first has the stride and a projected shortcut."""
    outputs = planes * Bottleneck.expansion
    shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
    first = Bottleneck(inputs, planes, stride=stride, downsample=shortcut, dilation=dilation)
    return nn.Sequential(first, *(Bottleneck(outputs, planes, dilation=dilation) for _ in range(blocks - 1)))


def deep_stem_resnet(name: str, *, weights: str | None = None) -> DeepStemResNet:
    """`resnet50`, `resnet101` or `tiny`; `weights` is an official file (resnet50_v2.pth) or a hub name with such keys.

    Raises UserError for another name and for weights that do not fit.
    """
    if name not in DEPTHS:
        raise UserError(f"unknown few-shot backbone {name!r}; choose from {', '.join(DEPTHS)}")
    width = WIDTHS.get(name, 64)
    network = DeepStemResNet(DEPTHS[name], stem=width, planes=width)
    if weights is not None:
        state = rename(find_state(weights), STAGES, unused=r"^fc\.")
        try:
            network.load_state_dict(state)
        except RuntimeError as error:
            raise UserError(f"{weights} does not fit {name} with a deep stem ({str(error)[:200]})") from error
    return network
