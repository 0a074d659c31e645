"""Adapter folders and adapted runs, as the command line offers them: what there is, what one holds, and merging."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from segvit.adapters.catalogue import ADAPTERS
from segvit.adapters.files import CONFIG, TENSORS, read_config
from segvit.contracts import UserError
from segvit.model_folder import load_model, save_model
from segvit.zoo import build_network

if TYPE_CHECKING:
    from segvit.contracts import Model


def list_adapters() -> list[dict[str, Any]]:
    """Every tuning method, what it does, and its options with their defaults; None also for what the model tells."""
    rows = []
    for name, method in ADAPTERS.items():
        parameters = inspect.signature(method).parameters
        options = {key: None if item.default is item.empty else item.default for key, item in parameters.items()}
        options.pop("backbone")
        rows.append({"name": name, "what": (method.__doc__ or "").strip().splitlines()[0], "options": options})
    return rows


def inspect_adapter(source: str) -> dict[str, Any]:
    """What an adapter folder, or that of a run, holds; nothing is loaded. Raises UserError where there is none."""
    folder = next((place for place in (Path(source), Path(source) / "adapter") if (place / CONFIG).is_file()), None)
    if folder is None:
        raise UserError(f"{source} holds no adapter (no {CONFIG}, no adapter/{CONFIG}); give a run or adapter folder")
    config = read_config(folder)
    return {
        "method": config.method, "options": config.options, "model": config.model.name,
        "classes": list(config.model.classes.names), "base": config.base, "base_hash": config.base_hash,
        "tensors": len(config.tensors), "bytes": (folder / TENSORS).stat().st_size,
    }  # fmt: skip


def merge_adapter(source: str, out: str, *, base: str | None = None) -> None:
    """Write the plain model folder of an adapted run, model or adapter folder.

    Raises UserError where there is nothing to merge, where the method cannot be merged, and where `out` is in use.
    """
    if (Path(out) / "config.json").exists():
        raise UserError(f"{out} holds a model already; choose another --out")
    model = load_model(source, base=base)
    merge(model)
    save_model(model, out)


def merge(model: Model) -> None:
    """Fold the adapter of a model into its weights, in place.

    Raises UserError for a model without one, and for a method that cannot be merged.
    """
    if model.adapter is None:
        raise UserError("the model has no adapter, so there is nothing to merge")
    model.adapter.merge()
    with torch.device("meta"):
        plain = build_network(model.config.name, num_classes=len(model.classes), **model.config.options).state_dict()
    added = tuple(name for name in model.state_dict() if name not in plain)
    model.config, model.adapter = replace(model.config, adapter=None, added=added), None
