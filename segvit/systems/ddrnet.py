"""DDRNet: two branches, one kept at 1/8, one down to 1/64, that exchange features; real-time segmentation.

Paper     Y. Hong, H. Pan, W. Sun, Y. Jia, "Deep Dual-resolution Networks for Real-time and Accurate Semantic
          Segmentation of Road Scenes", arXiv 2101.06085.
Idea      The high-resolution branch keeps places, the low-resolution one gathers context; both read each other's
          features after stages 3 and 4, and DAPPM pools the 1/64 map at five scales.
Differs   from the official code: images are padded to a multiple of 8 with zeros and the scores cropped, so that any
          size works (the original stops at others). BatchNorm instead of SyncBatchNorm; the engine synchronises it. The
          auxiliary head runs in training only.
Checked   tests/golden/ddrnet__* (ydhongHIT/DDRNet DDRNet_23_slim.py, DDRNet_39.py).

Shapes    B images, K classes, H W pixels, p planes. Feature maps before their ReLU unless said otherwise.
"""

from __future__ import annotations

import itertools
import re
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import adapt_input_conv
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from segvit.backbones.weights import read_state, unwrap
from segvit.contracts import Dense, Readout, Size, UserError
from segvit.losses.cross_entropy import logits_at, pixel_counts
from segvit.losses.pixel import pixel_losses
from segvit.nn.readout import logit_rows
from segvit.nn.rename import Rules, rename
from segvit.nn.tokens import pad_to_patches

STRIDE = 8  # of the high-resolution branch and of the logits
POOLS = ((5, 2, 2), (9, 4, 4), (17, 8, 8))  # DAPPM's average pools: kernel, stride, padding


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, *, bias: bool = False) -> nn.Conv2d:
    """A convolution that keeps the size up to its stride."""
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=bias)


def resize(x: Tensor, size: Size) -> Tensor:
    """Bilinear, corners not aligned, as the released weights want it."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut; the last block of a layer leaves its ReLU to whoever reads it."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, relu: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.downsample = shortcut(inputs, outputs, stride)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x))))) + self.downsample(x)
        return torch.relu_(y) if self.relu else y


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 to twice the middle width, with a shortcut and no final ReLU."""

    def __init__(self, inputs: int, middle: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, middle, 1), nn.BatchNorm2d(middle)
        self.conv2, self.bn2 = conv(middle, middle, stride=stride), nn.BatchNorm2d(middle)
        self.conv3, self.bn3 = conv(middle, 2 * middle, 1), nn.BatchNorm2d(2 * middle)
        self.downsample = shortcut(inputs, 2 * middle, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu_(self.bn2(self.conv2(torch.relu_(self.bn1(self.conv1(x))))))
        return self.bn3(self.conv3(y)) + self.downsample(x)


def shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    """The identity, or a 1x1 convolution where size or width change."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def layer(inputs: int, outputs: int, blocks: int, stride: int = 1) -> nn.Sequential:
    """Basic blocks; the last of several is without ReLU, a single one keeps it."""
    first = BasicBlock(inputs, outputs, stride, relu=True)
    return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, relu=i < blocks - 1) for i in range(1, blocks)))


def unit(inputs: int, outputs: int, size: int = 1) -> list[nn.Module]:
    """BatchNorm, ReLU, convolution."""
    return [nn.BatchNorm2d(inputs), nn.ReLU(inplace=True), conv(inputs, outputs, size)]


class DAPPM(nn.Module):
    """Deep aggregation pyramid pooling: each scale is refined on top of the finer one, then all are joined."""

    def __init__(self, inputs: int, branch: int, outputs: int) -> None:
        super().__init__()
        pools = [nn.AvgPool2d(*pool) for pool in POOLS]  # zeros of the padding count in the mean
        self.scale0 = nn.Sequential(*unit(inputs, branch))
        self.scale1, self.scale2, self.scale3, self.scale4 = (
            nn.Sequential(pool, *unit(inputs, branch)) for pool in [*pools, nn.AdaptiveAvgPool2d(1)]
        )
        self.process1, self.process2, self.process3, self.process4 = (
            nn.Sequential(*unit(branch, branch, 3)) for _ in range(4)
        )
        self.compression = nn.Sequential(*unit(5 * branch, outputs))
        self.shortcut = nn.Sequential(*unit(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[-2], x.shape[-1])
        scales = [self.scale0(x)]
        for pool, process in (
            (self.scale1, self.process1), (self.scale2, self.process2),
            (self.scale3, self.process3), (self.scale4, self.process4),
        ):  # fmt: skip
            scales.append(process(resize(pool(x), size) + scales[-1]))
        return self.compression(torch.cat(scales, 1)) + self.shortcut(x)


class Head(nn.Module):
    """Pre-activation classifier: (B, C, h, w) -> (B, K, h, w)."""

    def __init__(self, inputs: int, middle: int, num_classes: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, middle)
        self.bn2, self.conv2 = nn.BatchNorm2d(middle), conv(middle, num_classes, 1, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(torch.relu_(self.bn2(self.conv1(torch.relu_(self.bn1(x))))))


class DDRNet(nn.Module):
    """The 23-layer networks, and with `split` the 39-layer one, whose third stage exchanges features twice."""

    def __init__(
        self, *, num_classes: int, layers: tuple[int, int, int, int], planes: int, spp_planes: int, head_planes: int,
        aux: bool = True, aux_planes: int | None = None, split: bool = False, in_channels: int = 3,
    ) -> None:  # fmt: skip
        super().__init__()
        p, high = planes, 2 * planes
        self.split = split
        self.mean = IMAGENET_DEFAULT_MEAN if in_channels == 3 else (0.5,) * in_channels
        self.std = IMAGENET_DEFAULT_STD if in_channels == 3 else (0.5,) * in_channels
        self.conv1 = nn.Sequential(
            conv(in_channels, p, stride=2, bias=True), nn.BatchNorm2d(p), nn.ReLU(inplace=True),
            conv(p, p, stride=2, bias=True), nn.BatchNorm2d(p), nn.ReLU(inplace=True),
        )  # fmt: skip
        self.layer1, self.layer2 = layer(p, p, layers[0]), layer(p, 2 * p, layers[1], 2)
        if split:
            half = layers[2] // 2
            self.layer3_1, self.layer3_2 = layer(2 * p, 4 * p, half, 2), layer(4 * p, 4 * p, half)
            self.layer3_1_, self.layer3_2_ = layer(2 * p, high, half), layer(high, high, half)
            self.compression3_1, self.compression3_2 = compression(4 * p, high), compression(4 * p, high)
            self.down3_1, self.down3_2 = down(high, 4 * p), down(high, 4 * p)
        else:
            self.layer3, self.layer3_ = layer(2 * p, 4 * p, layers[2], 2), layer(2 * p, high, 2)
            self.compression3, self.down3 = compression(4 * p, high), down(high, 4 * p)
        self.layer4, self.layer4_ = layer(4 * p, 8 * p, layers[3], 2), layer(high, high, layers[3] if split else 2)
        self.compression4, self.down4 = compression(8 * p, high), down(high, 4 * p, 8 * p)
        self.layer5_, self.layer5 = nn.Sequential(Bottleneck(high, high, 1)), nn.Sequential(Bottleneck(8 * p, 8 * p, 2))
        self.spp = DAPPM(16 * p, spp_planes, 4 * p)
        self.seghead_extra = Head(high, aux_planes or head_planes, num_classes) if aux else None
        self.final_layer = Head(4 * p, head_planes, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Dense:
        norm = self.spp.scale4[1]
        if norm.training and isinstance(norm, nn.BatchNorm2d) and len(images) == 1:
            raise UserError(
                "DDRNet normalises over a batch what it has pooled over whole images, so it cannot train on single "
                "images; raise batch_size or lower accumulate until 2 or more go through at once"
            )
        images = pad_to_patches(images, (STRIDE, STRIDE))
        covers = (images.shape[-2], images.shape[-1])
        x = self.layer2(F.relu(self.layer1(self.conv1(images))))  # 1/8
        if self.split:
            low, high = self.layer3_1(F.relu(x)), self.layer3_1_(F.relu(x))
            low, high = exchange(low, high, self.compression3_1, self.down3_1)
            low, high = self.layer3_2(F.relu(low)), self.layer3_2_(F.relu(high))
            low, high = exchange(low, high, self.compression3_2, self.down3_2)
        else:
            low, high = self.layer3(F.relu(x)), self.layer3_(F.relu(x))
            low, high = exchange(low, high, self.compression3, self.down3)
        aux = self.seghead_extra if self.training else None
        extras = {} if aux is None else {"aux": aux(high)}
        low, high = self.layer4(F.relu(low)), self.layer4_(F.relu(high))
        low, high = exchange(low, high, self.compression4, self.down4)
        high, low = self.layer5_(F.relu(high)), self.layer5(F.relu(low))
        context = self.spp(low)
        logits = self.final_layer(resize(context, (high.shape[-2], high.shape[-1])) + high)
        extras |= {"high": high, "low": low, "context": context}
        return Dense(logits, extras, covers)


def exchange(low: Tensor, high: Tensor, squeeze: nn.Module, reduce: nn.Module) -> tuple[Tensor, Tensor]:
    """Both branches read the other as it was before the exchange."""
    lifted = resize(squeeze(F.relu(low)), (high.shape[-2], high.shape[-1]))
    return low + reduce(F.relu(high)), high + lifted


def compression(inputs: int, outputs: int) -> nn.Sequential:
    """1x1 convolution to the width of the high-resolution branch."""
    return nn.Sequential(conv(inputs, outputs, 1), nn.BatchNorm2d(outputs))


def down(*widths: int) -> nn.Sequential:
    """3x3 convolutions of stride 2 through the given widths, ReLU between them."""
    parts: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        parts += [conv(inputs, outputs, stride=2), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*parts[:-1])


def fold_batch_norm(model: DDRNet) -> DDRNet:
    """The same network for inference, in place: every BatchNorm that follows a convolution becomes part of it.

    The pre-activation norms of DAPPM and the heads stay, the auxiliary head goes, and the weights are laid out channels
    last, which is what CPUs and tensor cores are fast at. The result neither trains nor saves as a model: fold what is
    loaded. Raises UserError for a model in training mode.
    """
    if model.training:
        raise UserError("only a network in evaluation mode can be folded; call model.eval() first")
    model.seghead_extra = None
    for module in list(model.modules()):
        parts = list(module.named_children())  # registered in the order in which they run
        for (name, first), (norm_name, second) in itertools.pairwise(parts):
            if isinstance(first, nn.Conv2d) and isinstance(second, nn.BatchNorm2d):
                module.add_module(name, fuse_conv_bn_eval(first, second))
                module.add_module(norm_name, nn.Identity())
    return model.to(memory_format=torch.channels_last)


READOUT = Readout(logit_rows)
normalisers = pixel_counts


def criterion(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int = 255,
    class_weights: Tensor | None = None, cross_entropy: float = 0.0, focal: float = 0.0, dice: float = 0.0,
    lovasz: float = 0.0, ohem: float = 1.0, gamma: float = 2.0, ohem_threshold: float = 0.9,
    ohem_min_kept: int = 131_072, aux_weight: float = 0.4,
) -> dict[str, Tensor]:  # fmt: skip
    """OHEM cross entropy of the main and the auxiliary logits (the recipe of the Cityscapes models), or other losses.

    OHEM chooses among the pixels of one process and micro-batch: it is not the same for one big batch.
    """
    losses: dict[str, Tensor] = {}
    parts = {"loss_": (out.logits, 1.0)}
    if "aux" in out.extras and aux_weight:
        parts["loss_aux_"] = (out.extras["aux"], aux_weight)
    for prefix, (logits, weight) in parts.items():
        terms = pixel_losses(
            logits_at(out._replace(logits=logits), masks), masks, totals, ignore_index=ignore_index,
            class_weights=class_weights, cross_entropy=cross_entropy, focal=focal, dice=dice, lovasz=lovasz, ohem=ohem,
            gamma=gamma, ohem_threshold=ohem_threshold, ohem_min_kept=ohem_min_kept,
        )  # fmt: skip
        losses |= {name.replace("loss_", prefix): weight * value for name, value in terms.items()}
    return losses


def ddrnet(
    *,
    num_classes: int,
    layers: tuple[int, int, int, int] = (2, 2, 2, 2),
    planes: int = 64,
    spp_planes: int = 128,
    head_planes: int = 128,
    aux_planes: int | None = None,
    aux: bool = True,
    split: bool = False,
    in_channels: int = 3,
    weights: str | None = None,
) -> DDRNet:
    """Any DDRNet; the named ones are the rows of the paper's table 1.

    `aux` is the auxiliary head, of width `aux_planes` (None = `head_planes`); `split` exchanges twice in stage 3, whose
    blocks are then halved. `weights` is a local checkpoint of the authors, of ImageNet or a segmentation model; its
    heads are left out. Raises UserError when it does not fit.
    """
    if split and layers[2] % 2:
        raise UserError(f"split halves the third stage, so its {layers[2]} blocks must be an even number")
    model = DDRNet(
        num_classes=num_classes, layers=layers, planes=planes, spp_planes=spp_planes, head_planes=head_planes,
        aux_planes=aux_planes, aux=aux, split=split, in_channels=in_channels,
    )  # fmt: skip
    if weights is not None:
        load_trunk(model, weights)
    return model


def load_trunk(model: DDRNet, weights: str) -> None:
    """Load all but the heads from a local checkpoint in the official layout, in place.

    Raises UserError when a part is missing (except of what an image classifier has not) or of another shape.
    """
    own = model.state_dict()
    found = convert(unwrap(read_state(Path(weights).expanduser())))
    state = {key: value for key, value in found.items() if key in own and not HEADS.match(key)}
    first = "conv1.0.weight"
    if first in state and state[first].shape[1] == 3:
        state[first] = adapt_input_conv(own[first].shape[1], state[first])
    missing = [
        key for key in own if key not in state and not OPTIONAL.match(key) and not key.endswith("batches_tracked")
    ]
    wrong = [key for key, value in state.items() if value.shape != own[key].shape]
    if missing or wrong:
        raise UserError(
            f"{weights} does not fit: {len(missing)} keys missing {missing[:2]}, {len(wrong)} of another shape "
            f"{wrong[:2]}; choose the matching network"
        )
    model.load_state_dict(state, strict=False)


ddrnet_23_slim = partial(ddrnet, planes=32, head_planes=64)
ddrnet_23 = partial(ddrnet)
ddrnet_39 = partial(ddrnet, layers=(3, 4, 6, 3), head_planes=256, split=True)

OFFICIAL: Rules = ((r"^(module\.)?model\.", ""), (r"^module\.", ""))
UNUSED = r"^(module\.)?loss\."  # the trainer's wrapper saves its class weights, too
HEADS = re.compile(r"(final_layer|seghead_extra)\.")
OPTIONAL = re.compile(r"(final_layer|seghead_extra|spp|layer5_?)\.")  # what an image classifier has not, or otherwise


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official checkpoints (ydhongHIT/DDRNet), bare or as HRNet's trainer wraps them, into ours."""
    return rename(state, OFFICIAL, unused=UNUSED)
