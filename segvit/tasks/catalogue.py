"""What can be said of models without running them: the list, sizes and costs, and licences."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
import yaml

from segvit.contracts import UserError
from segvit.nn.flops import count_gflops, count_parameters
from segvit.zoo import MODELS, create_model, find_system

# (licence, how it is had) of the pretrained weights that our recipes name.
LICENCES = {
    "vit_tiny_patch16_384.augreg_in21k_ft_in1k": ("Apache-2.0", "open"),
    "vit_small_patch16_384.augreg_in21k_ft_in1k": ("Apache-2.0", "open"),
    "vit_base_patch16_384.augreg_in21k_ft_in1k": ("Apache-2.0", "open"),
    "vit_large_patch16_384.augreg_in21k_ft_in1k": ("Apache-2.0", "open"),
    "vit_base_patch8_224.augreg_in21k_ft_in1k": ("Apache-2.0", "open"),
    "deit_base_patch16_384.fb_in1k": ("Apache-2.0", "open"),
    "deit_base_distilled_patch16_384.fb_in1k": ("Apache-2.0", "open"),
    "beit_large_patch16_384.in22k_ft_in22k_in1k": ("Apache-2.0", "open"),
    "pvt_v2_b0.in1k": ("Apache-2.0", "open"),
    "pvt_v2_b2.in1k": ("Apache-2.0", "open"),
    "vit_small_patch14_reg4_dinov2.lvd142m": ("Apache-2.0", "open"),
    "vit_base_patch14_reg4_dinov2.lvd142m": ("Apache-2.0", "open"),
    "openai": ("MIT", "open"),
}


def list_models() -> list[dict[str, str]]:
    """Every model with its default backbone and task."""
    return [
        {"name": name, "backbone": str(_options(name).get("backbone", "its own")), "task": system.task}
        for name, system in MODELS.items()
    ]


def model_info(
    name: str | None, config: str | None, *, num_classes: int | None = None, image_size: int | None = None
) -> dict[str, Any]:
    """Parameters and GFLOPs of a model or a recipe, counted on the meta device."""
    if (name is None) == (config is None):
        raise UserError("give a model name or --config RECIPE, exactly one")
    recipe: dict[str, Any] = _recipe(config) if config else {"model": name}
    model_name: str = recipe.get("model", "segvit_vit_small")
    options: dict[str, Any] = dict(recipe.get("options") or {})
    crop = (recipe.get("augment") or {}).get("crop")
    if image_size is not None and "image_size" in _options(model_name):
        options["image_size"] = image_size
    with torch.device("meta"):
        classes: int = num_classes or recipe.get("num_classes") or 150
        model = create_model(model_name, num_classes=classes, **options)
    size = (image_size, image_size) if image_size else tuple(crop or _default_size(model_name, options))
    return {
        "model": model_name, "num_classes": classes, "input_size": list(size),
        "parameters": count_parameters(model), "gflops": round(count_gflops(model, (size[0], size[1])), 3),
    }  # fmt: skip


def _default_size(name: str, options: dict[str, Any]) -> tuple[int, int]:
    # Networks without position embeddings have no size of their own.
    defaults: dict[str, Any] = {"image_size": 512} | _options(name)
    size = options.get("image_size", defaults["image_size"])
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _options(name: str) -> dict[str, Any]:
    """The options of a model's builder with their defaults."""
    return {key: option.default for key, option in inspect.signature(find_system(name).build).parameters.items()}


def _recipe(path: str) -> dict[str, Any]:
    try:
        recipe = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as a recipe ({error})") from error
    if not isinstance(recipe, dict):
        raise UserError(f"{path} is not a recipe; it should hold names and values, see recipes/")
    return recipe
