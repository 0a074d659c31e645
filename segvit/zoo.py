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

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from segvit import __version__
from segvit.adapters.catalogue import attach
from segvit.adapters.files import CONFIG, base_source, copy_backbone, read_config, restore
from segvit.contracts import Classes, InputSpec, ModelConfig, Readout, UserError
from segvit.files import open_atomic, write_json, write_text
from segvit.palette import generate_palette
from segvit.systems import classic, ddrnet, ftn, rsseg, segmenter, segvit, semantic_fpn, setr

if TYPE_CHECKING:
    from segvit.contracts import Model


T = TypeVar("T")


class System(NamedTuple):
    """All that the rest of the library needs to know of a model."""

    build: Callable[..., nn.Module]  # keyword-only options -> the module
    criterion: Callable[..., dict[str, Tensor]]  # (out, masks, totals, *, ignore_index, ...) -> weighted terms
    normalisers: Callable[..., dict[str, Tensor]]  # (masks, *, num_classes, ignore_index) -> sums over the batch
    readout: Readout
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]  # official state dict -> ours
    task: Literal["dense"] = "dense"


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


def _classic(build: Callable[..., nn.Module]) -> System:
    return System(build, classic.criterion, classic.normalisers, classic.READOUT, classic.convert)


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


def find_system(name: str) -> System:
    """The system of that name. Raises UserError with the nearest names for an unknown one."""
    if name not in MODELS:
        near = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.4)
        raise UserError(f"unknown model {name!r}; did you mean {', '.join(near) or 'one of segvit models list'}?")
    return MODELS[name]


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
    network = build_network(name, num_classes=len(classes), **options)
    model = cast("Model", network)
    # What the options were built from is not needed to build them again: weights come with the model.
    kept = json.loads(json.dumps({key: value for key, value in options.items() if key != "weights"}))
    model.config = ModelConfig(name=name, options=kept, classes=classes)
    model.classes, model.readout = classes, find_system(name).readout
    levels = cast(Any, dict(network.named_children()).get("backbone", network))
    default = InputSpec(mean=levels.mean, std=levels.std)
    model.spec, model.adapter = spec or default, None
    check_channels(model.spec, default)
    if adapter is not None:
        adapt(model, adapter, **(adapter_options or {}))
    return model


def adapt(model: Model, method: str, **options: Any) -> None:
    """Freeze the backbone and attach a tuning method, in place; `model.adapter` is its handle.

    Do so when the base weights are loaded. Raises UserError for what the method or the backbone does not take.
    """
    model.adapter = attach(model, method, **options)
    chosen = {"method": method, "options": json.loads(json.dumps(options))}
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


def save_model(model: Model, folder: str | Path, *, card: str | None = None) -> None:
    """Write a folder that `load_model` reads: config.json, model.safetensors, preprocessor_config.json, README.md."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    write_json(folder / "config.json", model.config.to_json(__version__))
    write_json(folder / "preprocessor_config.json", model.spec.to_json())
    with open_atomic(folder / "model.safetensors") as file:
        file.write(serialize(tensors, metadata={"format": "pt"}))
    if card is not None:
        write_text(folder / "README.md", card)


def load_model(
    source: str | Path, *, base: str | Path | None = None, device: str | torch.device = "cpu"
) -> Model:  # fmt: skip
    """A model from a run folder, a model folder, an adapter folder or a hub id, ready for inference.

    `base` says where the base weights of an adapter folder are now, if not where it says itself. Raises UserError when
    the folder is incomplete or its weights do not fit its configuration.
    """
    folder = _model_folder(source)
    if not (folder / "config.json").is_file():
        return load_adapted(folder, base).to(device).eval()
    if base is not None:
        raise UserError(f"{folder} is a whole model, which needs no base; leave it out")
    config = _parse(folder / "config.json", ModelConfig.from_json)
    spec = _parse(folder / "preprocessor_config.json", InputSpec.from_json)
    model = create_model(config.name, classes=config.classes, spec=spec, **config.options)
    try:
        state = load_file(folder / "model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder}/model.safetensors cannot be read ({error}); copy the model folder again") from error
    for name in config.added:
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_parameter(leaf, nn.Parameter(torch.empty_like(state[name])))
    model.config = replace(model.config, added=config.added)
    if config.adapter is not None:
        adapt(model, config.adapter["method"], **config.adapter["options"])
    load_state(model, state, source=str(folder))
    return model.to(device).eval()


def load_adapted(folder: Path, base: str | Path | None) -> Model:
    """The model of an adapter folder over its base weights, verified."""
    config = read_config(folder)
    source, whole = base_source(folder, config, base)
    weights: dict[str, Any] = {} if whole else {"weights": source}
    parts = config.model
    model = create_model(parts.name, classes=parts.classes, spec=config.spec, **weights, **parts.options)
    if whole:
        copy_backbone(load_model(source), model)
    adapt(model, config.method, **config.options)
    restore(model, folder, config)
    return model


def load_state(model: nn.Module, state: dict[str, Tensor], *, source: str) -> None:
    """Load weights of which every key and shape must fit. Raises UserError that names the first that do not."""
    own = model.state_dict()
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [key for key in sorted(own.keys() & state.keys()) if own[key].shape != state[key].shape]
    if missing or unknown:
        raise UserError(f"{source} does not fit the model: missing {missing[:3]}, unknown {unknown[:3]}")
    if wrong:
        key = wrong[0]
        raise UserError(
            f"{source}: {key} is {tuple(state[key].shape)}, the model's is {tuple(own[key].shape)}; "
            "is the number of classes or the image size another one?"
        )
    model.load_state_dict(state)


def _model_folder(source: str | Path) -> Path:
    folder = Path(source).expanduser()
    for place in (folder / "config.json", folder / "model" / "config.json", folder / CONFIG):
        if place.is_file():
            return place.parent
    if folder.exists():
        raise UserError(f"{folder} holds no model (no config.json, no model/config.json); give a run or model folder")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # the hub client raises many kinds: offline, gated, unknown, malformed id
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{source} is neither a folder nor a model to be had from the hub ({reason})") from error


def _parse(path: Path, parse: Callable[[dict[str, Any]], T]) -> T:
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy the model folder again") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a segvit model's, {error} is missing or of another kind") from error


def match_classes(model: Model, source: Model) -> None:
    """Initialise `model` from `source`, a model of the same architecture with another class table, in place.

    Rows of the head that belong to classes (found by building the network for one class more) are copied by class name;
    new classes keep their fresh initialisation. Raises UserError when anything else differs in shape.
    """
    state, given = model.state_dict(), source.state_dict()
    if state.keys() != given.keys():
        raise UserError(
            f"{source.config.name} and {model.config.name} have different parts; use --init with the same model"
        )
    names = source.classes.names
    pairs = [(new, names.index(name)) for new, name in enumerate(model.classes.names) if name in names]
    axes = _class_axes(model)
    for key, value in given.items():
        axis = axes.get(key)
        same = [place == axis or a == b for place, (a, b) in enumerate(zip(state[key].shape, value.shape, strict=True))]
        if not all(same):
            raise UserError(
                f"{key} is {tuple(value.shape)} in the run to start from and {tuple(state[key].shape)} here; "
                "use the same options, image_size included"
            )
        if axis is None:
            state[key] = value
            continue
        extra = state[key].shape[axis] - len(model.classes)  # e.g. the row of "no object"
        rows = pairs + [(len(model.classes) + i, len(names) + i) for i in range(extra)]
        target, origin = (
            (torch.tensor(part, dtype=torch.long) for part in zip(*rows, strict=True)) if rows else (None, None)
        )
        if target is not None and origin is not None:
            state[key] = state[key].index_copy(axis, target, value.index_select(axis, origin))
    model.load_state_dict(state)


def _class_axes(model: Model) -> dict[str, int]:
    """The axis that belongs to classes, for every tensor that has one."""
    shapes = []
    for count in (len(model.classes), len(model.classes) + 1):
        with torch.device("meta"):
            network = build_network(model.config.name, num_classes=count, **model.config.options)
        shapes.append({key: value.shape for key, value in network.state_dict().items()})
    differing = {key: [a != b for a, b in zip(shapes[0][key], shapes[1][key], strict=True)] for key in shapes[0]}
    return {key: different.index(True) for key, different in differing.items() if any(different)}
