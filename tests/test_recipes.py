"""Every recipe through the real command line, and the published parameter and FLOP counts through the catalogue."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from segvit.cli.parsing import make_parser, parse, with_values
from segvit.cli.run import train
from segvit.tasks.catalogue import LICENCES, model_info
from segvit.tasks.experiment import Experiment
from segvit.zoo import MODELS, create_model, find_system

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
NAMES = [str(path.relative_to(ROOT)) for path in RECIPES]

# (parameters, GFLOPs) measured on the official code at the crop; the official README rounds them to one digit.
PUBLISHED = {
    "ade20k_vit_base": (108_736_279, 120.883),
    "ade20k_vit_large": (344_305_303, 637.871),
    "ade20k_vit_large_shrunk": (344_598_679, 373.533),
    "coco_stuff10k_vit_large": (343_737_004, 383.899),
    "coco_stuff10k_vit_large_shrunk": (343_735_468, 224.848),
    "pascal_context60_vit_large": (343_496_253, 321.665),
    "pascal_context60_vit_large_shrunk": (343_431_229, 186.889),
}


def comments(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[: next(number for number, line in enumerate(lines) if not line.startswith("#"))]


def by_its_command(path: Path) -> Experiment:
    """The recipe as the command in its first lines runs it, through the real parser."""
    command = next(line for line in comments(path) if line.startswith("# Command: "))
    words = command.removeprefix("# Command: ").split()
    assert words[:4] == ["segvit", "train", "--config", str(path.relative_to(ROOT))]
    arguments = with_values(["--config", str(path), *words[4:]], "train", train)
    options: dict[str, Any] = parse(make_parser("train", train), arguments)
    run = Experiment(**options)
    assert words[words.index("--data") + 1] == run.data
    assert words[words.index("--out") + 1] == run.out
    return run


def test_there_are_recipes() -> None:
    assert {f"recipes/segvit/{name}.yaml" for name in PUBLISHED} <= set(NAMES)


def test_every_system_has_a_recipe() -> None:
    ready = {find_system(by_its_command(path).model).criterion.__module__ for path in RECIPES}
    assert ready == {system.criterion.__module__ for system in MODELS.values()}


def test_licences_of_the_weights_that_recipes_name_are_listed() -> None:
    named = {by_its_command(path).weights for path in RECIPES} - {None, "none", "imagenet"}
    assert named <= LICENCES.keys()


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_recipe(path: Path) -> None:
    run = by_its_command(path)
    with torch.device("meta"):
        model = create_model(run.model, num_classes=run.num_classes or 2, **run.options)
    assert model.config.options == run.options
    crop, size = run.augment.crop, run.options.get("image_size", 512)
    if crop is not None and "image_size" in inspect.signature(find_system(run.model).build).parameters:
        assert tuple(crop) == ((size, size) if isinstance(size, int) else tuple(size))
    if run.input.window is not None:
        assert tuple(run.input.window) == tuple(crop or ())
        assert run.input.stride is not None
        assert all(0 < step <= side for step, side in zip(run.input.stride, run.input.window, strict=True))


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_first_lines_name_the_figure_and_the_command(path: Path) -> None:
    assert len(comments(path)) >= 4
    assert [line.partition(":")[0] for line in comments(path)[1:4]] == ["# Paper", "# Command", "# Hardware"]
    assert re.search(r"mIoU \d+\.\d|none", comments(path)[1])


@pytest.mark.parametrize("path", RECIPES, ids=NAMES)
def test_the_batch_of_the_paper_is_reproduced_on_one_device(path: Path) -> None:
    line, batch = comments(path)[3], by_its_command(path).images_a_step
    official = re.search(r"(\d+) \w+ x (\d+) images", line)
    if official:
        assert int(official[1]) * int(official[2]) == batch
    else:
        assert re.search("unknown|no paper", line)
    parts = re.search(r"--accumulate (\d+) keeps the batch, (\d+) images? at once", line)
    assert parts
    assert int(parts[1]) * int(parts[2]) == batch


QUICK = ("ade20k_vit_base", "pascal_context60_vit_large_shrunk")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in PUBLISHED]
)
def test_published_counts(name: str) -> None:
    info = model_info(None, str(ROOT / "recipes" / "segvit" / f"{name}.yaml"))
    parameters, gflops = PUBLISHED[name]
    assert info["parameters"] == parameters
    assert info["gflops"] == pytest.approx(gflops, abs=0.05)
