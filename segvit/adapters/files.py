"""Adapter folders: `adapter_config.json` and `adapter_model.safetensors`, named and keyed as peft does.

A folder of a few MB holds what a run trained (adapter, tuned parts of the backbone, head), the class table, the input
spec, a hash of the base weights it stands on, and a probe: the output for one fixed image. Loading verifies all of it.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from segvit import __version__
from segvit.adapters.places import backbone_of
from segvit.adapters.svf import verify_factors
from segvit.contracts import InputSpec, ModelConfig, UserError
from segvit.files import open_atomic, write_json

if TYPE_CHECKING:
    from segvit.contracts import Model

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX, PROBE = "base_model.model.", "probe.logits"
PROBE_SIDE = 64
PROBE_TOLERANCE = 1e-2  # of the largest logit: what TF32 on one machine and fp32 on another may differ by
# Resampled to the image size on loading, whose last bits differ from machine to machine; the probe covers them.
NOT_HASHED = ("pos_embed",)


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What `adapter_config.json` says."""

    method: str
    options: dict[str, Any]
    base: str  # hub name or file of backbone weights, or a model or run folder, relative ones to the adapter folder
    base_hash: str  # of the frozen weights
    tensors: dict[str, str]  # hash of every stored tensor by its name in the model
    model: ModelConfig
    spec: InputSpec

    def to_json(self) -> dict[str, Any]:
        """The content of the file, with peft's keys where they exist."""
        known = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "target_modules": "target_modules"}
        peft = {known[key]: value for key, value in self.options.items() if self.method == "lora" and key in known}
        return {
            "peft_type": self.method.upper(), "base_model_name_or_path": self.base, "inference_mode": True, **peft,
            "method": self.method, "options": self.options, "base_hash": self.base_hash, "tensors": self.tensors,
            "model": self.model.to_json(__version__), "preprocessor": self.spec.to_json(),
        }  # fmt: skip


def read_config(folder: Path) -> AdapterConfig:
    """The configuration of an adapter folder. Raises UserError where it is none of ours."""
    path = folder / CONFIG
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        return AdapterConfig(
            method=data["method"], options=data["options"], base=data["base_model_name_or_path"],
            base_hash=data["base_hash"], tensors=data["tensors"], model=ModelConfig.from_json(data["model"]),
            spec=InputSpec.from_json(data["preprocessor"]),
        )  # fmt: skip
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); copy the adapter folder again") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no segvit adapter's, {error} is missing or of another kind") from error


def save_adapter(model: Model, folder: str | Path, *, base: str) -> None:
    """Write the folder of an adapted model; `base` says where its frozen weights come from.

    Raises UserError for a model without an adapter.
    """
    if model.adapter is None or model.config.adapter is None:
        raise UserError("the model has no adapter to save; create it with adapter=..., or save the whole model")
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in trained_tensors(model).items()}
    config = AdapterConfig(
        **model.config.adapter, base=base, base_hash=base_hash(model), model=model.config, spec=model.spec,
        tensors={name: digest([tensor]) for name, tensor in tensors.items()},
    )  # fmt: skip
    stored = {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()} | {PROBE: probe(model)}
    with open_atomic(folder / TENSORS) as file:
        file.write(serialize(stored, metadata={"format": "pt"}))
    write_json(folder / CONFIG, config.to_json())


def restore(model: Model, folder: Path, config: AdapterConfig) -> None:
    """Load an adapter folder into a model with its base weights and the method attached; verify everything.

    Raises UserError where the base weights are others, a tensor is missing, unknown, damaged or of another shape, and
    where the probe does not give the stored output.
    """
    try:
        stored = load_file(folder / TENSORS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{folder / TENSORS} cannot be read ({error}); copy the adapter folder again") from error
    found = base_hash(model)
    if found != config.base_hash:
        raise UserError(
            f"{folder} was trained on other base weights (hash {config.base_hash}) than {config.base} (hash {found}); "
            "give the right ones with base"
        )
    expected = stored.pop(PROBE, None)
    given = {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}
    wanted = trained_tensors(model)
    odd = sorted((wanted.keys() ^ given.keys()) | (given.keys() ^ config.tensors.keys()))
    odd += [name for name in sorted(given.keys() & wanted.keys()) if given[name].shape != wanted[name].shape]
    odd += [name for name, code in config.tensors.items() if name in given and digest([given[name]]) != code]
    if odd or expected is None:
        raise UserError(
            f"{folder} is damaged or of another version: {odd[0] if odd else PROBE} is missing, unknown or changed; "
            "copy the adapter folder again"
        )
    model.load_state_dict(model.state_dict() | given)  # not tensor by tensor: a method may check its own on the way
    verify_factors(model)
    off = (probe(model) - expected).abs().max().item()
    if not off <= PROBE_TOLERANCE * expected.abs().max().item():  # written so that NaN fails
        raise UserError(
            f"{folder} gives another output than when it was saved (off by {off:.2g}); the base has other position "
            "embeddings, or timm and torch are of other versions than then"
        )


def base_source(folder: Path, config: AdapterConfig, given: str | Path | None) -> tuple[str, bool]:
    """Where the base weights are, and whether that is a model or run folder rather than weights of a backbone."""
    source = config.base if given is None else str(given)
    path = Path(source).expanduser()
    if given is None and source.startswith("."):
        path = folder / path
    if path.is_dir():
        return str(path), True
    if source.startswith((".", "/", "~")) and not path.exists():
        raise UserError(f"the base weights of {folder} were at {path}, which is gone; say where they are with base")
    return str(path) if path.exists() else source, False


def copy_backbone(source: Model, target: nn.Module) -> None:
    """Load the backbone of `source`, without its adapter, into a plain network.

    Raises UserError when they are of different architectures.
    """
    _, backbone = backbone_of(target)
    if source.adapter is not None:
        source.adapter.disable()
    state = backbone_of(source)[1].state_dict()
    own = {name: tensor.shape for name, tensor in backbone.state_dict().items()}
    if own != {name: tensor.shape for name, tensor in state.items()}:
        raise UserError(f"the base is a {source.config.name} with another backbone; give the model it was trained on")
    backbone.load_state_dict(state)


def trained_tensors(model: Model) -> dict[str, Tensor]:
    """What an adapter folder stores, by name in the model: the adapter's tensors and all that is not the backbone."""
    place, _ = backbone_of(model)
    inside = {f"{place}.{name}": tensor for name, tensor in model.adapter.tensors().items()}
    return {
        name: tensor for name, tensor in model.state_dict().items()
        if name in inside or not name.startswith(f"{place}.")
    }  # fmt: skip


def base_hash(model: Model) -> str:
    """Hash of the frozen weights of the backbone under their plain names."""
    state = model.adapter.base_state()
    names = sorted(name for name in state if not name.endswith(NOT_HASHED))
    return digest([state[name] for name in names], "\n".join(names))


def digest(tensors: list[Tensor], text: str = "") -> str:
    """Sixteen hexadecimal digits of SHA-256 over a text and the types, shapes and values of tensors."""
    code = hashlib.sha256(text.encode())
    for tensor in tensors:
        code.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        code.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return code.hexdigest()[:16]


@torch.no_grad()
def probe(model: Model) -> Tensor:
    """The logits for a fixed image, in evaluation mode and full precision, on the CPU."""
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    count = model.spec.channels * PROBE_SIDE**2
    image = (torch.arange(count, dtype=torch.float64) * 0.37).sin().float()
    model.eval()
    with torch.autocast(device.type, enabled=False):
        out = model(image.reshape(1, model.spec.channels, PROBE_SIDE, PROBE_SIDE).to(device))
    for module, training in modes:
        module.training = training
    logits: Tensor = out.logits.float().cpu().contiguous()
    return logits
