"""The classic families, from segmentation-models-pytorch and torchvision: the rivals that every new system meets.

Papers    FCN, J. Long et al., CVPR 2015; U-Net, O. Ronneberger et al., MICCAI 2015; U-Net++, Z. Zhou et al., DLMIA
          2018; PSPNet, H. Zhao et al., CVPR 2017; FPN, A. Kirillov et al., CVPR 2019; DeepLabV3 and V3+, L.-C. Chen et
          al., 2017 and ECCV 2018; LR-ASPP, A. Howard et al., ICCV 2019; UPerNet, T. Xiao et al., ECCV 2018; SegFormer,
          E. Xie et al., NeurIPS 2021; DPT, R. Ranftl et al., ICCV 2021. Surveyed by S. Minaee et al., TPAMI 2022.
Idea      Nothing of theirs is written again: the libraries build the network, this file gives it our contract.
Differs   from the libraries: any image size (padded to whole cells, scores cropped); the scores stay at the stride
          of the last convolution, and the readout resizes them with corners not aligned (DPT: doubled inside, aligned);
          stages that nothing reads are left out.
Checked   against the libraries' own outputs in tests/systems/test_classic.py.

Shapes    B images, K classes, h w logit grid.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import adapt_input_conv
from torch import Tensor, nn

from segvit.backbones.weights import SUFFIXES, load_weights, read_state, unwrap
from segvit.contracts import Dense, Readout, Size, UserError
from segvit.losses.cross_entropy import logits_at, pixel_counts
from segvit.losses.pixel import pixel_losses
from segvit.nn.readout import logit_rows
from segvit.nn.tokens import pad_to_patches

Library = Literal["unet", "unet_plus_plus", "pspnet", "fpn", "deeplabv3", "deeplabv3_plus", "upernet", "segformer"]
CLASSES: dict[Library, str] = {
    "unet": "Unet", "unet_plus_plus": "UnetPlusPlus", "pspnet": "PSPNet", "fpn": "FPN", "deeplabv3": "DeepLabV3",
    "deeplabv3_plus": "DeepLabV3Plus", "upernet": "UPerNet", "segformer": "Segformer",
}  # fmt: skip
UPSAMPLES = {"pspnet", "fpn", "deeplabv3", "deeplabv3_plus", "upernet", "segformer"}  # behind the last convolution
POOLS = {"deeplabv3", "deeplabv3_plus", "upernet"}  # the whole image to one cell before a BatchNorm
DPT_CELL = 32  # pixels; it reassembles the tokens at strides 4 to 32
HALF = ("inceptionresnetv2", "inceptionv4", "xception")  # encoders that were trained on -1..1


class Classic(nn.Module):
    """A network of another library; images are padded to multiples of `cell`, logits come as `read` finds them."""

    def __init__(
        self, network: nn.Module, read: Callable[[Any, Tensor], Tensor], *, cell: int, mean: tuple[float, ...],
        std: tuple[float, ...], pools: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.read = network, read
        self.cell, self.mean, self.std, self.pools = cell, mean, std, pools

    def forward(self, images: Tensor) -> Dense:
        if self.pools and self.training and len(images) == 1:
            raise UserError(
                "this network pools the whole image before a BatchNorm, so it trains with 2 images a process or more"
            )
        images = pad_to_patches(images, (self.cell, self.cell))
        covers: Size = (images.shape[-2], images.shape[-1])
        return Dense(self.read(self.network, images), {}, covers)


def whole(network: Any, images: Tensor) -> Tensor:
    """Logits of a network that returns just them."""
    return network(images)


def last_map(network: Any, images: Tensor) -> Tensor:
    """torchvision's FCN before it resizes the scores to the image."""
    return network.classifier(network.backbone(images)["out"])


def two_maps(network: Any, images: Tensor) -> Tensor:
    """torchvision's LR-ASPP before it resizes the scores to the image."""
    return network.classifier(network.backbone(images))


READOUT = Readout(logit_rows)
normalisers = pixel_counts


def criterion(
    out: Dense, masks: Tensor, totals: dict[str, Tensor], *, ignore_index: int = 255,
    class_weights: Tensor | None = None, cross_entropy: float = 1.0, focal: float = 0.0, dice: float = 0.0,
    lovasz: float = 0.0, ohem: float = 0.0,
) -> dict[str, Tensor]:  # fmt: skip
    """Mean cross entropy over the pixels that are not ignored; `pixel_losses` says what else there is."""
    return pixel_losses(
        logits_at(out, masks), masks, totals, ignore_index=ignore_index, class_weights=class_weights,
        cross_entropy=cross_entropy, focal=focal, dice=dice, lovasz=lovasz, ohem=ohem,
    )  # fmt: skip


def classic(
    *,
    num_classes: int,
    family: Library,
    backbone: str = "resnet34",
    weights: str | None = None,
    dropout: float | None = None,
    decoder: dict[str, Any] | None = None,
    in_channels: int = 3,
) -> Classic:
    """A family of segmentation-models-pytorch on any of its encoders, or one of timm's as `tu-NAME`.

    `weights` of the encoder is a tag that the library knows, such as "imagenet" (from the hub), or a local file in the
    layout of the library, torchvision or timm. `decoder` holds further keywords of the library's class, such as
    {"decoder_attention_type": "scse"}; `dropout` replaces its rates.

    Raises UserError without the library, for a name or keyword that it lacks, and for weights that cannot be had.
    """
    library = need_library()
    check_encoder(library, backbone)
    network_class = vars(library)[CLASSES[family]]
    known = [
        name for name, item in inspect.signature(network_class).parameters.items() if item.kind != item.VAR_KEYWORD
    ]
    unknown = [name for name in decoder or {} if name not in known]
    if unknown and not backbone.startswith("tu-"):  # timm takes the rest, the library's own encoders drop it
        raise UserError(f"decoder: {family} has no keyword {unknown[0]!r}; it has {', '.join(known)}")
    fixed = {"upsampling": 1} if family in UPSAMPLES else {}

    def build(tag: str | bool | None) -> Any:
        return network_class(
            encoder_name=backbone, encoder_weights=tag, in_channels=in_channels, classes=num_classes,
            **fixed, **(decoder or {}),
        )  # fmt: skip

    # MiT reads values of a tensor while it is built, which one on the meta device does not have.
    place = torch.device("cpu") if backbone.startswith("mit_") else nullcontext()
    # The library checks little: what does not fit comes to light somewhere inside, as any of these.
    try:
        with place:
            network = build(None)
    except (TypeError, ValueError, KeyError, RuntimeError, NotImplementedError, AttributeError) as error:
        raise UserError(
            f"{family} cannot be built on {backbone} ({error}); choose another, or other options"
        ) from error
    tag = weights if weights is not None and not is_file(weights) else None
    if tag is not None:
        network = downloaded(build, tag, backbone)
    elif weights is not None:
        load_encoder(network.encoder, weights)
    drop_unread_stages(network.encoder)
    set_dropout(network, dropout)
    mean, std = statistics(library, backbone, tag, in_channels)
    cell = int(network.encoder.output_stride)
    return Classic(network, whole, cell=cell, mean=mean, std=std, pools=family in POOLS)


def dpt(
    *,
    num_classes: int,
    backbone: str = "vit_base_patch16_384",
    weights: str | None = None,
    image_size: int | Size = 512,
    dropout: float | None = None,
    decoder: dict[str, Any] | None = None,
    in_channels: int = 3,
) -> Classic:
    """DPT on a plain ViT of timm; `decoder` and errors as for `classic`.

    `weights` is a hub name or a local file. `image_size` is that of the position embeddings, which are resized for
    images of other sizes.
    """
    library = need_library()
    if not timm.is_model(backbone.partition(".")[0]):
        raise UserError(f"timm has no model {backbone!r}; DPT needs a plain ViT, such as vit_base_patch16_384")
    try:
        network = library.DPT(
            encoder_name=f"tu-{backbone}", encoder_weights=None, in_channels=in_channels, classes=num_classes,
            img_size=image_size, dynamic_img_size=True, **(decoder or {}),
        )  # fmt: skip
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise UserError(f"dpt cannot be built on {backbone} ({error}); choose another, or other options") from error
    encoder = network.encoder
    if DPT_CELL % encoder.output_stride:
        raise UserError(f"{backbone} has patches of {encoder.output_stride}; DPT needs them to divide {DPT_CELL}")
    if weights is not None:
        load_weights(encoder.model, weights)
    encoder._output_indices = encoder.model.prune_intermediate_layers(
        encoder._output_indices, prune_norm=True, prune_head=True
    )
    set_dropout(network, dropout)
    mean, std = statistics(library, f"tu-{backbone}", None, in_channels)
    return Classic(network, whole, cell=DPT_CELL, mean=mean, std=std)


def fcn(
    *,
    num_classes: int,
    backbone: Literal["resnet50", "resnet101"] = "resnet50",
    weights: str | None = None,
    dropout: float | None = None,
    in_channels: int = 3,
) -> Classic:
    """torchvision's FCN on a dilated ResNet. `weights` is "imagenet" (from the web) or a local file of the ResNet."""
    from torchvision.models import segmentation

    build = {"resnet50": segmentation.fcn_resnet50, "resnet101": segmentation.fcn_resnet101}[backbone]
    network = build(weights=None, weights_backbone=None, num_classes=num_classes, aux_loss=False)
    return from_torchvision(network, last_map, backbone, weights, dropout=dropout, in_channels=in_channels, cell=8)


def lraspp(
    *,
    num_classes: int,
    backbone: Literal["mobilenet_v3_large"] = "mobilenet_v3_large",
    weights: str | None = None,
    dropout: float | None = None,
    in_channels: int = 3,
) -> Classic:
    """torchvision's LR-ASPP on MobileNetV3. `weights` is "imagenet" (from the web) or a local file of the encoder."""
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    network = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=num_classes)
    return from_torchvision(network, two_maps, backbone, weights, dropout=dropout, in_channels=in_channels, cell=16)


def from_torchvision(
    network: Any, read: Callable[[Any, Tensor], Tensor], backbone: str, weights: str | None, *,
    dropout: float | None, in_channels: int, cell: int,
) -> Classic:  # fmt: skip
    """A torchvision network with its encoder's weights, channels and dropout."""
    if in_channels != 3:
        parent, name = next(
            (module, name) for module in network.backbone.modules() for name, child in module.named_children()
            if isinstance(child, nn.Conv2d)
        )  # fmt: skip
        old = parent.get_submodule(name)
        kernel: Any = old.kernel_size
        new = nn.Conv2d(in_channels, old.out_channels, kernel, old.stride, old.padding, bias=False)
        nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")  # as both networks do
        parent.add_module(name, new)
    if weights == "imagenet":
        load_encoder(network.backbone, weights, state=torchvision_state(backbone))
    elif weights is not None:
        load_encoder(network.backbone, weights)
    set_dropout(network, dropout)
    rgb = in_channels == 3
    mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if rgb else ((0.5,) * in_channels,) * 2
    return Classic(network, read, cell=cell, mean=mean, std=std)


def need_library() -> Any:
    """segmentation-models-pytorch, or a UserError that says how to get it."""
    try:
        import segmentation_models_pytorch as library
    except ImportError as error:
        raise UserError(
            "this model comes from segmentation-models-pytorch, which is not installed; pip install segvit[classic]"
        ) from error
    return library


def check_encoder(library: Any, backbone: str) -> None:
    """Raises UserError with near names for an encoder that the library lacks."""
    known = library.encoders.get_encoder_names()
    if backbone in known or (backbone.startswith("tu-") and timm.is_model(backbone[3:].partition(".")[0])):
        return
    near = ", ".join(difflib.get_close_matches(backbone, known, n=3, cutoff=0.4)) or "resnet34, mit_b0"
    raise UserError(f"no encoder {backbone!r}; did you mean {near}? Networks of timm are named tu-NAME")


def is_file(weights: str) -> bool:
    """Whether weights are meant as a local file, not as a tag."""
    path = Path(weights).expanduser()
    return path.suffix in SUFFIXES or path.exists()


def downloaded(build: Callable[[str | bool | None], Any], tag: str, backbone: str) -> Any:
    """The network with its encoder's weights from the hub."""
    try:
        return build(True if backbone.startswith("tu-") else tag)
    except KeyError as error:  # tells the known tags
        raise UserError(f"weights: {error.args[0]}") from error
    except Exception as error:  # the hub client raises many kinds: offline, gated, interrupted
        raise UserError(unreachable(tag, backbone, error)) from error


def torchvision_state(backbone: str) -> dict[str, Tensor]:
    """ImageNet weights of torchvision, from its own place on the web."""
    from torchvision.models import get_model_weights

    try:
        return dict(get_model_weights(backbone)["IMAGENET1K_V1"].get_state_dict(progress=False))
    except (OSError, RuntimeError) as error:  # not to be reached; damaged on the way
        raise UserError(unreachable("imagenet", backbone, error)) from error


def unreachable(tag: str, backbone: str, error: Exception) -> str:
    """What to do where weights cannot be downloaded."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return (
        f"weights {tag!r} of {backbone} cannot be downloaded ({reason}); check the network, or download the file "
        "elsewhere and pass weights=PATH, or weights=none to start from nothing"
    )


def load_encoder(encoder: nn.Module, weights: str, *, state: dict[str, Tensor] | None = None) -> None:
    """Load an encoder's weights in place, from `state` or the file; what belongs to its classifier is left out.

    The first convolution is changed to the number of channels as timm does. Raises UserError for what does not fit.
    """
    own = encoder.state_dict()
    given = unwrap(read_state(Path(weights).expanduser())) if state is None else state
    used = {own_key(key, own): value for key, value in given.items() if own_key(key, own)}
    for key, value in used.items():
        if value.ndim == 4 and value.shape[1] == 3 != own[key].shape[1]:
            used[key] = adapt_input_conv(own[key].shape[1], value)
    missing = [key for key in own if key not in used and not key.endswith("num_batches_tracked")]
    wrong = [key for key, value in used.items() if value.shape != own[key].shape]
    if missing or wrong:
        raise UserError(
            f"{weights} does not fit the encoder: {len(missing)} keys missing {missing[:2]}, {len(wrong)} of another "
            f"shape {wrong[:2]}; choose the matching backbone"
        )
    encoder.load_state_dict(used, strict=False)


def own_key(key: str, own: dict[str, Tensor]) -> str:
    """The encoder's name for a key of a whole network, of torchvision or of timm; "" if it has none."""
    bare = key.removeprefix("encoder.").removeprefix("features.")
    flat = bare.replace(".", "_", 1)  # how timm names the stages of a network that returns them all
    return next((name for name in (key, bare, f"model.{bare}", f"model.{flat}") if name in own), "")


def drop_unread_stages(encoder: Any) -> None:
    """Replace the stages below an encoder's depth (PSPNet reads three of five), in place; timm drops its own."""
    from segmentation_models_pytorch.encoders import TimmUniversalEncoder

    if isinstance(encoder, TimmUniversalEncoder):
        return
    deepest = 2**encoder._depth
    try:
        stages = encoder.get_stages()
    except NotImplementedError:  # it cannot be dilated and does not name its stages; then all of them stay
        return
    unread = {id(module) for stride, modules in stages.items() if stride > deepest for module in modules}
    for parent in list(encoder.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in unread:
                parent.add_module(name, nn.Identity())


def set_dropout(network: nn.Module, rate: float | None) -> None:
    """Give every dropout layer of the network this rate. Raises UserError when it has none to give it to."""
    if rate is None:
        return
    layers = [module for module in network.modules() if isinstance(module, nn.Dropout | nn.Dropout2d)]
    if rate and not layers:
        raise UserError("this network has no dropout layer; leave dropout out")
    for layer in layers:
        layer.p = rate


def statistics(
    library: Any, backbone: str, tag: str | None, in_channels: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation that the encoder's weights want, for values in 0..1."""
    if in_channels != 3:
        return (0.5,) * in_channels, (0.5,) * in_channels
    if backbone.startswith("tu-"):
        known = timm.get_pretrained_cfg(backbone[3:])
        return (tuple(known.mean), tuple(known.std)) if known else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    if tag is not None:  # its record was downloaded with the weights
        told = library.encoders.get_preprocessing_params(backbone, tag)
        top = told["input_range"][1]
        return tuple(value / top for value in told["mean"]), tuple(value / top for value in told["std"])
    half = backbone in HALF
    return ((0.5,) * 3, (0.5,) * 3) if half else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


unet = partial(classic, family="unet")
unet_plus_plus = partial(classic, family="unet_plus_plus")
pspnet = partial(classic, family="pspnet")
fpn = partial(classic, family="fpn")
deeplabv3 = partial(classic, family="deeplabv3")
deeplabv3_plus = partial(classic, family="deeplabv3_plus")
upernet = partial(classic, family="upernet")
segformer = partial(classic, family="segformer", backbone="mit_b0")

UNUSED = ("aux_classifier.", "classification_head.")  # heads that help training, or another task


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoints of whole networks of either library into ours; auxiliary heads are left out."""
    return {f"network.{key}": value for key, value in state.items() if not key.startswith(UNUSED)}
