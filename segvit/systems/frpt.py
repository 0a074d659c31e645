"""FRPT: a frozen network retrieves fine-grained classes after a learned zoom into its input and a gated head.

Paper     S. Wang et al., "Fine-grained Retrieval Prompt Tuning", AAAI 2023, arXiv 2207.14465.
Idea      The perturbation prompt samples the image anew, densely where the frozen features are telling. The awareness
          head mixes the deepest map with its instance norm, channel by channel, which takes off what species share.
          Prompt, head and classifier train, the backbone never.
Forms     `paper`: content parsing by a 31 x 31 kernel on the first stage, gate with r = 8, mean, linear classifier.
          `released`: 1 x 1 kernel on the third stage, a grid of 31 cells, a trained Gaussian, gate with r = 1 and two
          convolutions, GeM, batch norm, classifier without bias.
Found     in the released code: all of that form. Proposed, as the paper is silent: its Gaussian is the released one in
          shares of the map, and the attention is repeated beyond the border, so that an even one changes nothing; the
          kernel starts at 0. With a mean behind it the norm of the equation's gate leaves no trace (its mean is 0). The
          paper counts 2.62M for a head whose equation has 1.05M; `bottleneck_dim=384` is one of the fits.
Differs   from the released code: timm's backbones (no IBN-a, no stride 1 in the last stage, another first pooling).
Checked   tests/golden/frpt__* (Pual2013/FRPT).

Shapes    B images, H W pixels, h w cells of the map that the prompt reads, C channels of the deepest map, K classes.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, cast

import torch
import torch.nn.functional as F
from timm.models import FeatureListNet
from torch import Tensor, nn

from segvit.backbones.pyramid import Pyramid, pyramid
from segvit.contracts import Dense, Readout, Size, UserError
from segvit.nn.readout import logit_rows
from segvit.nn.rename import Rules, rename
from segvit.nn.tokens import pad_to_patches

KERNEL = 31  # sigma of the paper; also the cells of a side of the released grid
WIDTH = 13 / 31  # of the Gaussian at half its height, in sides of the map

Form = Literal["paper", "released"]


class ParsingPrompt(nn.Module):
    """The paper's prompt, equations 1 to 3: (images, map (B, c, h, w)) -> images, grid and attention."""

    def __init__(self, dim: int, *, kernel: int = KERNEL) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise UserError(f"kernel is {kernel}; an odd one keeps the size of the map")
        self.parse = nn.Conv2d(dim, 1, kernel, padding=kernel // 2, bias=False)
        nn.init.zeros_(self.parse.weight)  # even attention: training starts from the image as it is

    def forward(self, images: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attention = spatial_softmax(self.parse(features))
        height, width = attention.shape[-2:]
        reach = (height - 1, width - 1)  # every cell sees all others
        distance = gaussian(reach, (WIDTH * height, WIDTH * width))
        grid = sampling_grid(attention, *(kernel.to(attention) for kernel in distance))
        sampled, grid = resample(images, grid, (images.shape[-2], images.shape[-1]))
        return sampled, grid, attention


class SaliencySampler(nn.Module):
    """The released prompt, with the same call; images come out with `size` x `size` pixels, of any size before.

    `cells` are those of a side of the grid, `reach` the cells that the Gaussian sees to each side, `width` its own at
    half the height, in cells. The Gaussian trains too.
    """

    def __init__(
        self, dim: int, *, size: int = 224, cells: int = KERNEL, reach: int = KERNEL - 1, width: float = 13
    ) -> None:
        super().__init__()
        if cells < 2:
            raise UserError(f"a grid of {cells} cells; 2 or more are needed to place samples between them")
        self.parse, self.size, self.cells = nn.Conv2d(dim, 1, 1), size, cells
        column, row = gaussian((reach, reach), (width, width))
        self.distance = nn.Parameter(column * row)

    def forward(self, images: Tensor, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = self.parse(features.relu())
        side = (self.cells, self.cells)
        attention = spatial_softmax(F.interpolate(scores, size=side, mode="bilinear", align_corners=True))
        sampled, grid = resample(images, sampling_grid(attention, self.distance), (self.size, self.size))
        return sampled, grid, attention


def spatial_softmax(scores: Tensor) -> Tensor:
    """Softmax over all cells of maps (B, 1, h, w), in fp32."""
    return scores.float().flatten(1).softmax(1).view_as(scores)


def gaussian(reach: Size, width: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """A column (1, 1, 2 reach + 1, 1) and a row, both with peak 1; `width` is that at half the height, in cells."""
    column, row = (
        torch.exp(-4 * math.log(2) * (torch.arange(-cells, cells + 1) / full).square())
        for cells, full in zip(reach, width, strict=True)
    )
    return column[None, None, :, None], row[None, None, None]


def sampling_grid(attention: Tensor, *kernels: Tensor) -> Tensor:
    """Where each cell looks, (B, 2, h, w) as x, y in -1..1: the mean place under attention (B, 1, h, w) times distance.

    The distance is what the `kernels` make one after the other. Attention beyond the border is that of the border.
    """
    reach_y, reach_x = (sum(kernel.shape[axis] // 2 for kernel in kernels) for axis in (-2, -1))
    padded = F.pad(attention, (reach_x, reach_x, reach_y, reach_y), mode="replicate")
    height, width = attention.shape[-2:]
    y = torch.arange(-reach_y, height + reach_y, device=attention.device) / max(height - 1, 1)
    x = torch.arange(-reach_x, width + reach_x, device=attention.device) / max(width - 1, 1)
    sums = torch.cat([padded, padded * x, padded * y[:, None]])
    with torch.autocast(attention.device.type, enabled=False):  # places in half precision are off by whole pixels
        for kernel in kernels:
            sums = F.conv2d(sums, kernel.float())
    total, sum_x, sum_y = sums.chunk(3)
    return (2 * torch.cat([sum_x / total, sum_y / total], 1) - 1).clamp(-1, 1)


def resample(images: Tensor, grid: Tensor, size: Size) -> tuple[Tensor, Tensor]:
    """The images at the places of the enlarged grid, (B, 3, *size) in fp32, and that grid (B, *size, 2)."""
    grid = F.interpolate(grid, size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    sampled = F.grid_sample(images.float(), grid, align_corners=True)
    return sampled.to(images.dtype), grid


class StyleGate(nn.Module):
    """The gate of the awareness head: g x + (1 - g) IN(x) for maps x (B, C, h, w) of more than one cell."""

    def __init__(self, dim: int, reduction: int = 8) -> None:
        super().__init__()
        if not 1 <= reduction <= dim:
            raise UserError(f"reduction is {reduction}; choose 1 ... {dim}, the channels of the map")
        hidden = dim // reduction
        self.attention = nn.Sequential(
            nn.Conv2d(dim, hidden, 1, bias=False), nn.ReLU(), nn.Conv2d(hidden, dim, 1, bias=False), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2:].numel() == 1:
            raise UserError("the deepest map has one cell, which has no instance norm; give larger images")
        gate = self.attention(x.mean((2, 3), keepdim=True))
        return gate * x + (1 - gate) * F.instance_norm(x)


def paper_head(dim: int, *, reduction: int = 8, bottleneck_dim: int | None = None) -> nn.Sequential:
    """The gate of the equation, and behind it 1 x 1 convolutions to `bottleneck_dim` and back where one is given."""
    layers: list[nn.Module] = [StyleGate(dim, reduction)]
    if bottleneck_dim is not None:
        down, up = nn.Conv2d(dim, bottleneck_dim, 1, bias=False), nn.Conv2d(bottleneck_dim, dim, 1, bias=False)
        layers += [down, nn.ReLU(), up]
    return nn.Sequential(*layers)


def released_head(dim: int, *, reduction: int = 1, stride: int = 1) -> nn.Sequential:
    """The released head: gate, 1 x 1 convolution to half the channels, 3 x 3 back, each with batch norm and ReLU."""
    half, norm = dim // 2, partial(nn.BatchNorm2d, momentum=0.01)
    return nn.Sequential(
        StyleGate(dim, reduction),
        nn.Conv2d(dim, half, 1, bias=False), norm(half), nn.ReLU(),
        nn.Conv2d(half, dim, 3, stride, 1, bias=False), norm(dim), nn.ReLU(),
    )  # fmt: skip


class GeM(nn.Module):
    """Generalised mean over the cells, (B, C, h, w) -> (B, C)."""

    def __init__(self, power: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        self.power, self.eps = power, eps

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=self.eps).pow(self.power).mean((2, 3)).pow(1 / self.power)


class FRPT(nn.Module):
    """Images (B, 3, H, W) -> logits (B, K, 1, 1); what retrieval compares is `extras["embedding"]` (B, C).

    `extras` add the sampled images, the grid and the attention of the prompt. `stage` is the map that it reads, from 1.
    """

    def __init__(
        self, backbone: Pyramid, prompt: ParsingPrompt | SaliencySampler, head: nn.Module, *, neck: nn.Module,
        classifier: nn.Linear, stage: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.prompt, self.head, self.neck, self.classifier = prompt, head, neck, classifier
        self.stage = stage

    def train(self, mode: bool = True) -> FRPT:
        """The backbone's norms keep their statistics."""
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Dense:
        with torch.no_grad():
            seen = shallow_map(self.backbone, images, self.stage)
        sampled, grid, attention = self.prompt(images, seen)
        embedding = self.neck(self.head(self.backbone(sampled).maps[-1]))
        extras = {"embedding": embedding, "sampled": sampled, "grid": grid, "attention": attention}
        return Dense(self.classifier(embedding)[..., None, None], extras, (images.shape[-2], images.shape[-1]))


def shallow_map(backbone: Pyramid, images: Tensor, stage: int) -> Tensor:
    """The map of one stage, counted from 1, of the cells over the images; later stages do not run."""
    cell, stride = backbone.strides[-1], backbone.strides[stage - 1]
    x, found = pad_to_patches(images, (cell, cell)), 0
    network = cast(FeatureListNet, backbone.network)
    for name, part in network.items():
        x = part(x)
        found += name in network.return_layers
        if found == stage:
            break
    x = x.permute(0, 3, 1, 2) if backbone.channels_last else x
    return x[..., : -(-images.shape[-2] // stride), : -(-images.shape[-1] // stride)]


READOUT = Readout(logit_rows)


def criterion(
    out: Dense, labels: Tensor, totals: dict[str, Tensor], *, label_smoothing: float = 0.0
) -> dict[str, Tensor]:  # fmt: skip
    """Cross entropy of the labels (B,), a mean over the images of the whole batch.

    `label_smoothing` is fast-reid's: that share goes to the other classes alone, not to all as torch's.
    """
    logits = out.logits.flatten(1).float()
    classes = logits.shape[1]
    share = label_smoothing * classes / max(classes - 1, 1)
    total = F.cross_entropy(logits, labels.long(), reduction="sum", label_smoothing=share)
    return {"loss_class": total / totals["images"]}


def normalisers(labels: Tensor) -> dict[str, Tensor]:
    """The number of images."""
    return {"images": labels.new_tensor(len(labels))}


def frpt(
    *, num_classes: int, form: Form = "paper", backbone: str = "resnet50", weights: str | None = None,
    bottleneck_dim: int | None = None, kernel: int | None = None, size: int | None = None,
) -> FRPT:  # fmt: skip
    """FRPT on any feature pyramid of timm that is made of stages; `weights` are the backbone's, see `pyramid`.

    `bottleneck_dim` belongs to the paper's head and `kernel` to its prompt, None = 31; at least half the width of the
    first map, says the paper. `size` is the side of the released sampler's images, None = 224; the paper's keep theirs.
    Raises UserError for an option of the other form and for what `pyramid` refuses.
    """
    other = {"size": size} if form == "paper" else {"bottleneck_dim": bottleneck_dim, "kernel": kernel}
    for name, value in other.items():
        if value is not None:
            raise UserError(f"{name} is no option of the {form} form; leave it out")
    trunk = pyramid(backbone, weights=weights)
    dim = trunk.dims[-1]
    if form == "paper":
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        prompt = ParsingPrompt(trunk.dims[0], kernel=KERNEL if kernel is None else kernel)
        return FRPT(
            trunk, prompt, paper_head(dim, bottleneck_dim=bottleneck_dim), neck=pool,
            classifier=nn.Linear(dim, num_classes), stage=1,
        )  # fmt: skip
    norm, last = nn.BatchNorm1d(dim), nn.Linear(dim, num_classes, bias=False)
    norm.bias.requires_grad_(False)
    nn.init.normal_(last.weight, std=0.01)
    sampler = SaliencySampler(trunk.dims[2], size=224 if size is None else size)
    return FRPT(trunk, sampler, released_head(dim), neck=nn.Sequential(GeM(), norm), classifier=last, stage=3)


frpt_resnet50 = partial(frpt, backbone="resnet50")
frpt_resnet101 = partial(frpt, backbone="resnet101")
frpt_released_resnet50 = partial(frpt, form="released", backbone="resnet50")
frpt_released_resnet101 = partial(frpt, form="released", backbone="resnet101")

RULES: Rules = (
    (r"^sample\.conv_last\.", "prompt.parse."),
    (r"^sample\.filter\.weight$", "prompt.distance"),
    (r"^retrieval_head\.mam\.channel_attention\.", "head.0.attention."),
    *((rf"^retrieval_head\.conv_block3\.{i}\.conv\.", f"head.{3 * i + 1}.") for i in (0, 1)),
    *((rf"^retrieval_head\.conv_block3\.{i}\.bn\.", f"head.{3 * i + 2}.") for i in (0, 1)),
    (r"^heads\.bottleneck\.0\.", "neck.1."),
    (r"^heads\.weight$", "classifier.weight"),
    (r"^backbone\.", "backbone.network."),
)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the released code -> ours, of the whole or of its parts by the names that they have in it."""
    return rename(state, RULES, unused=r"^pixel_(mean|std)$")
