"""The catalogue: every model's name in one literal dict, and the ways to create, save and load them.

Adding a system touches this dict, the system's file and its test.
"""

from __future__ import annotations

import difflib
import inspect
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints

from torch import Tensor, nn

from segvit.adapters.catalogue import attach
from segvit.contracts import Classes, InputSpec, ModelConfig, Readout, UserError
from segvit.palette import generate_palette
from segvit.systems import (
    castformer,
    classic,
    classifier,
    ddrnet,
    denseclip,
    dpt_clip,
    duat,
    frpt,
    ftn,
    rsseg,
    segmenter,
    segvit,
    semantic_fpn,
    setr,
    zegclip,
    zsseg,
)

if TYPE_CHECKING:
    from segvit.contracts import Model


T = TypeVar("T")
SOURCES = ("weights", "text_weights", "vectors")  # options that say where the first weights come from


class System(NamedTuple):
    """All that the rest of the library needs to know of a model."""

    build: Callable[..., nn.Module]  # keyword-only options -> the module
    criterion: Callable[..., dict[str, Tensor]]  # (out, masks, totals, *, ignore_index, ...) -> weighted terms
    normalisers: Callable[..., dict[str, Tensor]]  # (masks, *, num_classes, ignore_index) -> sums over the batch
    readout: Readout
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # official state dict -> ours
    task: Literal["dense", "classify", "retrieve"] = "dense"


def _segvit(build: Callable[..., nn.Module]) -> System:
    return System(build, segvit.criterion, segvit.normalisers, segvit.READOUT, segvit.convert)


def _segmenter(build: Callable[..., nn.Module]) -> System:
    return System(build, segmenter.criterion, segmenter.normalisers, segmenter.READOUT, segmenter.convert)


def _semantic_fpn(build: Callable[..., nn.Module]) -> System:
    parts = semantic_fpn
    return System(build, parts.criterion, parts.normalisers, parts.READOUT, parts.convert)


def _setr(build: Callable[..., nn.Module]) -> System:
    return System(build, setr.criterion, setr.normalisers, setr.READOUT, setr.convert)


def _ftn(build: Callable[..., nn.Module]) -> System:
    return System(build, ftn.criterion, ftn.normalisers, ftn.READOUT, ftn.convert)


def _rsseg(build: Callable[..., nn.Module]) -> System:
    return System(build, rsseg.criterion, rsseg.normalisers, rsseg.READOUT, rsseg.convert)


def _ddrnet(build: Callable[..., nn.Module]) -> System:
    return System(build, ddrnet.criterion, ddrnet.normalisers, ddrnet.READOUT, ddrnet.convert)


def _denseclip(build: Callable[..., nn.Module]) -> System:
    return System(build, denseclip.criterion, denseclip.normalisers, denseclip.READOUT, denseclip.convert)


def _zegclip(build: Callable[..., nn.Module]) -> System:
    return System(build, zegclip.criterion, zegclip.normalisers, zegclip.READOUT, zegclip.convert)


def _zsseg(build: Callable[..., nn.Module]) -> System:
    return System(build, zsseg.criterion, zsseg.normalisers, zsseg.READOUT, zsseg.convert)


def _duat(build: Callable[..., nn.Module]) -> System:
    return System(build, duat.criterion, duat.normalisers, duat.READOUT, duat.convert)


def _castformer(build: Callable[..., nn.Module]) -> System:
    parts = castformer
    return System(build, parts.criterion, parts.normalisers, parts.READOUT, parts.convert)


def _classic(build: Callable[..., nn.Module]) -> System:
    return System(build, classic.criterion, classic.normalisers, classic.READOUT, classic.convert)


def _classifier(build: Callable[..., nn.Module]) -> System:
    parts = classifier
    return System(build, parts.criterion, parts.normalisers, parts.READOUT, parts.convert, task="classify")


def _dpt_clip(build: Callable[..., nn.Module]) -> System:
    parts = dpt_clip
    return System(build, parts.criterion, parts.normalisers, parts.READOUT, parts.convert, task="classify")


def _frpt(build: Callable[..., nn.Module]) -> System:
    return System(build, frpt.criterion, frpt.normalisers, frpt.READOUT, frpt.convert, task="retrieve")


MODELS: dict[str, System] = {
    "segvit_vit_tiny": _segvit(segvit.segvit_vit_tiny),
    "segvit_vit_small": _segvit(segvit.segvit_vit_small),
    "segvit_vit_base": _segvit(segvit.segvit_vit_base),
    "segvit_vit_large": _segvit(segvit.segvit_vit_large),
    "segvit_shrunk_vit_tiny": _segvit(segvit.segvit_shrunk_vit_tiny),
    "segvit_shrunk_vit_small": _segvit(segvit.segvit_shrunk_vit_small),
    "segvit_shrunk_vit_base": _segvit(segvit.segvit_shrunk_vit_base),
    "segvit_shrunk_vit_large": _segvit(segvit.segvit_shrunk_vit_large),
    "segmenter_vit_tiny": _segmenter(segmenter.segmenter_vit_tiny),
    "segmenter_vit_small": _segmenter(segmenter.segmenter_vit_small),
    "segmenter_vit_base": _segmenter(segmenter.segmenter_vit_base),
    "segmenter_vit_large": _segmenter(segmenter.segmenter_vit_large),
    "segmenter_linear_vit_base": _segmenter(segmenter.segmenter_linear_vit_base),
    "setr_naive_vit_tiny": _setr(setr.setr_naive_vit_tiny),
    "setr_naive_vit_small": _setr(setr.setr_naive_vit_small),
    "setr_naive_vit_base": _setr(setr.setr_naive_vit_base),
    "setr_naive_vit_large": _setr(setr.setr_naive_vit_large),
    "setr_naive_deit_base": _setr(setr.setr_naive_deit_base),
    "setr_pup_tiny": _setr(setr.setr_pup_vit_tiny),
    "setr_pup_vit_tiny": _setr(setr.setr_pup_vit_tiny),
    "setr_pup_vit_small": _setr(setr.setr_pup_vit_small),
    "setr_pup_vit_base": _setr(setr.setr_pup_vit_base),
    "setr_pup_vit_large": _setr(setr.setr_pup_vit_large),
    "setr_pup_deit_base": _setr(setr.setr_pup_deit_base),
    "setr_mla_vit_tiny": _setr(setr.setr_mla_vit_tiny),
    "setr_mla_vit_small": _setr(setr.setr_mla_vit_small),
    "setr_mla_vit_base": _setr(setr.setr_mla_vit_base),
    "setr_mla_vit_large": _setr(setr.setr_mla_vit_large),
    "setr_mla_deit_base": _setr(setr.setr_mla_deit_base),
    "setr_hlg_tiny": _setr(setr.setr_hlg_tiny),
    "setr_hlg_small": _setr(setr.setr_hlg_small),
    "setr_hlg_medium": _setr(setr.setr_hlg_medium),
    "setr_hlg_large": _setr(setr.setr_hlg_large),
    "semantic_fpn": _semantic_fpn(semantic_fpn.semantic_fpn),
    "semantic_fpn_pvt_tiny": _semantic_fpn(semantic_fpn.semantic_fpn_pvt_tiny),
    "semantic_fpn_pvt_small": _semantic_fpn(semantic_fpn.semantic_fpn_pvt_small),
    "semantic_fpn_pvt_medium": _semantic_fpn(semantic_fpn.semantic_fpn_pvt_medium),
    "semantic_fpn_pvt_large": _semantic_fpn(semantic_fpn.semantic_fpn_pvt_large),
    "semantic_fpn_pvt_v2_b0": _semantic_fpn(semantic_fpn.semantic_fpn_pvt_v2_b0),
    "semantic_fpn_pvt_v2_b2": _semantic_fpn(semantic_fpn.semantic_fpn_pvt_v2_b2),
    "ftn_tiny": _ftn(ftn.ftn_tiny),
    "ftn_small": _ftn(ftn.ftn_small),
    "ftn_base": _ftn(ftn.ftn_base),
    "ftn_large": _ftn(ftn.ftn_large),
    "ddrnet_23_slim": _ddrnet(ddrnet.ddrnet_23_slim),
    "ddrnet_23": _ddrnet(ddrnet.ddrnet_23),
    "ddrnet_39": _ddrnet(ddrnet.ddrnet_39),
    "denseclip": _denseclip(denseclip.denseclip),
    "denseclip_resnet50": _denseclip(denseclip.denseclip_resnet50),
    "denseclip_resnet101": _denseclip(denseclip.denseclip_resnet101),
    "denseclip_vit_base": _denseclip(denseclip.denseclip_vit_base),
    "zegclip_vit_base": _zegclip(zegclip.zegclip_vit_base),
    "zsseg_resnet50": _zsseg(zsseg.zsseg_resnet50),
    "zsseg_resnet101c": _zsseg(zsseg.zsseg_resnet101c),
    "duat_pvt_v2_b2": _duat(duat.duat_pvt_v2_b2),
    "castformer_r50": _castformer(castformer.castformer_r50),
    "castformer_r50_vit_base": _castformer(castformer.castformer_r50_vit_base),
    "rsseg_vit_tiny": _rsseg(rsseg.rsseg_vit_tiny),
    "rsseg_vit_small": _rsseg(rsseg.rsseg_vit_small),
    "rsseg_vit_base": _rsseg(rsseg.rsseg_vit_base),
    "rsseg_vit_large": _rsseg(rsseg.rsseg_vit_large),
    "rsseg_beit_large": _rsseg(rsseg.rsseg_beit_large),
    "rsseg_pyramid": _rsseg(rsseg.rsseg_pyramid),
    "fcn": _classic(classic.fcn),
    "unet": _classic(classic.unet),
    "unet_plus_plus": _classic(classic.unet_plus_plus),
    "pspnet": _classic(classic.pspnet),
    "fpn": _classic(classic.fpn),
    "deeplabv3": _classic(classic.deeplabv3),
    "deeplabv3_plus": _classic(classic.deeplabv3_plus),
    "lraspp": _classic(classic.lraspp),
    "upernet": _classic(classic.upernet),
    "segformer": _classic(classic.segformer),
    "dpt": _classic(classic.dpt),
}


CLASSIFIERS: dict[str, System] = {  # apart from the dense models, which every other command takes
    "classifier": _classifier(classifier.classifier),
    "classifier_vit_tiny": _classifier(classifier.classifier_vit_tiny),
    "classifier_vit_small": _classifier(classifier.classifier_vit_small),
    "classifier_vit_base": _classifier(classifier.classifier_vit_base),
    "classifier_vit_large": _classifier(classifier.classifier_vit_large),
    "classifier_resnet50": _classifier(classifier.classifier_resnet50),
    "classifier_convnext_base": _classifier(classifier.classifier_convnext_base),
    "classifier_swin_base": _classifier(classifier.classifier_swin_base),
    "dpt_clip_vit_base": _dpt_clip(dpt_clip.dpt_clip_vit_base),
    "dpt_clip_vit_base_patch32": _dpt_clip(dpt_clip.dpt_clip_vit_base_patch32),
}

RETRIEVERS: dict[str, System] = {  # apart too; trained on some classes to tell others apart
    "frpt": _frpt(frpt.frpt),
    "frpt_resnet50": _frpt(frpt.frpt_resnet50),
    "frpt_resnet101": _frpt(frpt.frpt_resnet101),
    "frpt_released_resnet50": _frpt(frpt.frpt_released_resnet50),
    "frpt_released_resnet101": _frpt(frpt.frpt_released_resnet101),
}


def find_system(name: str) -> System:
    """The system of that name. Raises UserError with the nearest names for an unknown one."""
    known = MODELS | CLASSIFIERS | RETRIEVERS
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        raise UserError(f"unknown model {name!r}; did you mean {', '.join(near) or 'one of segvit models list'}?")
    return known[name]


def build_network(name: str, **options: Any) -> nn.Module:
    """The bare module of a model, checked keyword by keyword. Raises UserError for an unknown or missing option."""
    build = find_system(name).build
    accepted = inspect.signature(build).parameters
    for option in options:
        if option not in accepted:
            near = difflib.get_close_matches(option, accepted, n=3, cutoff=0.4) or sorted(accepted)
            raise UserError(f"{name} has no option {option!r}; did you mean {', '.join(near)}?")
    choices = {
        option: get_args(hint)
        for option, hint in get_type_hints(_function(build)).items()
        if get_origin(hint) is Literal
    }
    for option in options.keys() & choices.keys():
        if options[option] not in choices[option]:
            raise UserError(f"{option} is {options[option]!r}; choose from {', '.join(map(str, choices[option]))}")
    return build(**options)


def _function(build: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The builder behind a named variant."""
    return build.func if isinstance(build, partial) else build


def create_model(
    name: str, *, num_classes: int | None = None, classes: Classes | None = None, spec: InputSpec | None = None,
    adapter: str | None = None, adapter_options: dict[str, Any] | None = None, **options: Any,
) -> Model:  # fmt: skip
    """A model by name, with `.spec`, `.classes`, `.readout` and `.config` attached.

    Give `classes` (names and colours) or just `num_classes`. `options` are the builder's keywords; `spec` defaults to
    the backbone's mean and standard deviation (0.5 for each channel unless `in_channels` is 3) at the image's own size.
    `adapter` is a tuning method, see `adapt`. Raises UserError for a `spec` of another number of channels.
    """
    if classes is None:
        if num_classes is None:
            raise UserError(f"{name} needs num_classes or classes")
        if num_classes < 1:
            raise UserError(f"num_classes must be 1 or more, got {num_classes}")
        classes = numbered_classes(num_classes)
    elif num_classes not in (None, len(classes)):
        raise UserError(f"num_classes is {num_classes} but the class table has {len(classes)} entries; leave one out")
    accepted = inspect.signature(find_system(name).build).parameters
    words = {"class_names": classes.names} if "class_names" in accepted else {}
    network = build_network(name, num_classes=len(classes), **(words | options))
    model = cast("Model", network)
    # What the options were built from is not needed to build them again: weights come with the model.
    kept = json.loads(json.dumps({key: value for key, value in options.items() if key not in SOURCES}))
    model.config = ModelConfig(name=name, options=kept, classes=classes)
    source = options.get("text_weights" if "text_weights" in accepted else "weights")
    if words and source is not None:  # but other words need the text tower again
        model.config = replace(model.config, words={"weights": find_again(source)})
    model.classes, model.readout = classes, find_system(name).readout
    levels = cast(Any, dict(network.named_children()).get("backbone", network))
    default = InputSpec(mean=levels.mean, std=levels.std)
    model.spec, model.adapter = spec or default, None
    check_channels(model.spec, default)
    if adapter is not None:
        adapt(model, adapter, **(adapter_options or {}))
    return model


def builder_options(config: ModelConfig) -> dict[str, Any]:
    """All options that a model was built with, defaults included."""
    accepted = inspect.signature(find_system(config.name).build).parameters
    return {name: option.default for name, option in accepted.items()} | config.options


def find_again(source: str) -> str:
    """Where weights are: a file as an absolute path, so that it is found from anywhere; a tag as it is."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def adapt(model: Model, method: str, **options: Any) -> None:
    """Freeze the backbone and attach a tuning method, in place; `model.adapter` is its handle.

    Do so when the base weights are loaded. Raises UserError for what the method or the backbone does not take.
    """
    model.adapter = attach(model, method, **options)
    chosen = {"method": method, "options": json.loads(json.dumps(options | model.adapter.recorded))}
    model.config = replace(model.config, adapter=chosen)


def check_channels(spec: InputSpec, built: InputSpec) -> None:
    """Raise UserError unless `spec` has a mean and a deviation for each channel that the model was built for."""
    if spec.channels != built.channels:
        raise UserError(
            f"mean and std have {spec.channels} values but the model takes {built.channels} channels; "
            f"give one value for each channel, or build the model with in_channels={spec.channels}"
        )


def numbered_classes(count: int) -> Classes:
    """A class table without names: class_0, class_1 ... in distinct colours."""
    return Classes(tuple(f"class_{i}" for i in range(count)), generate_palette(count))
