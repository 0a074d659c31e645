"""Many tasks on one backbone: shared storage, switching, and the common steps of a batch."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import segvit
from segvit.adapters.files import TENSORS, save_adapter
from segvit.contracts import UserError
from segvit.model_folder import load_model, save_model
from segvit.tasks.multi_task import MultiTask, load_tasks
from segvit.zoo import adapt, create_model

VIT: dict[str, Any] = {"image_size": 32, "patch_size": 8, "depth": 4, "embed_dim": 64, "layers": 1, "dropout": 0.0}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "head_a": ("head_only", {}),
    "head_b": ("head_only", {}),
    "deep": ("vpt_deep", {"num_prompts": 2}),
    "shallow": ("vpt_shallow", {"num_prompts": 3}),
    "ssf": ("ssf", {}),
    "lora": ("lora", {"rank": 2}),
    "biases": ("bitfit", {}),
    "norms": ("norm_only", {}),
    "spm": ("spm", {"width": 8}),
    "pro": ("pro_tuning", {}),
}


def images(count: int = 3, side: int = 40) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(2))


def shake(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


def write_task(folder: Path, base: str, method: str, options: dict[str, Any], *, classes: int, **model: Any) -> None:
    """An adapter folder as a run would write it; `model` are name and options of the network."""
    torch.manual_seed(classes)
    network = create_model(model.pop("name", "segmenter_vit_tiny"), num_classes=classes, **model)
    if Path(base).is_dir():
        network.backbone.load_state_dict(load_model(base).backbone.state_dict())
    adapt(network, method, **options)
    shake(network, classes)
    save_adapter(network, folder, base=base)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Ten adapters over one small ViT, each with another number of classes."""
    root = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(0)
    save_model(create_model("segmenter_vit_tiny", num_classes=2, **VIT), root / "base")
    for number, (name, (method, options)) in enumerate(METHODS.items()):
        write_task(root / name, str(root / "base"), method, options, classes=2 + number, **VIT)
    return {name: root / name for name in METHODS}


@pytest.fixture(scope="module")
def tasks(folders: dict[str, Path]) -> MultiTask:
    return load_tasks(folders)


def network(tasks: MultiTask, name: str) -> Any:
    return tasks.runtime(name).model


def test_every_task_is_the_model_loaded_by_itself(tasks: MultiTask, folders: dict[str, Path]) -> None:
    for number, (name, folder) in enumerate(folders.items()):
        expected = load_model(folder)(images())
        out = tasks(images(), task=name)
        torch.testing.assert_close(out.logits, expected.logits, rtol=0, atol=0)
        tasks.use(name)
        torch.testing.assert_close(tasks(images()).logits, expected.logits, rtol=0, atol=0)
        assert len(tasks.classes) == 2 + number


def test_the_backbone_is_in_memory_once(tasks: MultiTask, folders: dict[str, Path]) -> None:
    def weight(name: str) -> int:
        layer = network(tasks, name).backbone.blocks[1].mlp.fc1
        return dict(layer.named_parameters()).get("weight", dict(layer.named_parameters()).get("base_layer.weight"))

    assert len({weight(name).data_ptr() for name in METHODS}) == 1
    assert not any(parameter.requires_grad for name in METHODS for parameter in network(tasks, name).parameters())
    stored = sum((folder / TENSORS).stat().st_size for folder in folders.values())
    backbone = sum(item.nbytes for item in load_model(folders["head_a"]).backbone.state_dict().values())
    assert tasks.memory() <= backbone + stored


def test_a_switch_takes_less_than_a_millisecond_and_copies_nothing(tasks: MultiTask) -> None:
    before = {name: [item.data_ptr() for item in network(tasks, name).parameters()] for name in METHODS}
    values = {name: network(tasks, name).state_dict() for name in METHODS}
    versions = {name: [item._version for item in state.values()] for name, state in values.items()}
    names, taken = list(METHODS) * 10, []
    for name in names:
        started = time.perf_counter()
        tasks.use(name)
        taken.append(time.perf_counter() - started)
        assert tasks.current.model is network(tasks, name)
    assert statistics.median(taken) < 1e-3
    assert before == {name: [item.data_ptr() for item in network(tasks, name).parameters()] for name in METHODS}
    assert versions == {name: [item._version for item in state.values()] for name, state in values.items()}


@pytest.fixture
def ran(tasks: MultiTask) -> Any:
    """How often each block runs, over all tasks."""
    counts = [0] * 4
    hooks = []

    def count(number: int) -> Any:
        def hook(*_: Any) -> None:
            counts[number] += 1

        return hook

    for name in METHODS:
        for number, block in enumerate(network(tasks, name).backbone.blocks):
            hooks.append(block.register_forward_pre_hook(count(number)))
    yield counts
    for hook in hooks:
        hook.remove()


def test_tasks_with_only_a_head_share_the_whole_backbone(tasks: MultiTask, ran: list[int]) -> None:
    alone = {name: tasks(images(), task=name).logits for name in ("head_a", "head_b")}
    ran[:] = [0] * 4
    outputs = tasks.together(images(), ["head_a", "head_b"])
    assert ran == [1] * 4
    for name, expected in alone.items():
        torch.testing.assert_close(outputs[name].logits, expected, rtol=0, atol=0)
    assert tasks.shared_steps("head_a", "head_b") == 5


def test_the_shared_steps_end_where_an_adapter_begins(tasks: MultiTask, ran: list[int]) -> None:
    assert tasks.shared_steps("head_a", "deep") == 1  # the embedding
    assert tasks.shared_steps("head_a", "ssf") == 0
    assert tasks.shared_steps("head_a", "biases") == 0
    assert tasks.shared_steps("head_a", "lora", "deep") == 1
    alone = {name: tasks(images(), task=name).logits for name in METHODS}
    ran[:] = [0] * 4
    outputs = tasks.together(images())
    longer = [name for name in METHODS if tasks.shared_steps("head_a", name) > 1]
    assert ran[0] == 1 + len(METHODS) - len(longer)
    for name, expected in alone.items():
        torch.testing.assert_close(outputs[name].logits, expected, rtol=0, atol=0)
    assert all(network(tasks, name).backbone.past == () for name in METHODS)


def test_late_adapters_share_the_early_blocks(folders: dict[str, Path], tmp_path: Path) -> None:
    base = str(folders["head_a"].parent / "base")
    late = {"target_modules": ["blocks.3.attn.qkv"], "rank": 2}
    for number, name in enumerate(("roads", "defects")):
        write_task(tmp_path / name, base, "lora", late, classes=3 + number, **VIT)
    tasks = load_tasks({"roads": tmp_path / "roads", "defects": tmp_path / "defects", "plain": folders["head_a"]})
    assert tasks.shared_steps("roads", "defects", "plain") == 4
    counts = dict.fromkeys(tasks.runtimes, 0)
    for name in counts:

        def hook(*_: Any, name: str = name) -> None:
            counts[name] += 1

        network(tasks, name).backbone.blocks[0].register_forward_pre_hook(hook)
    outputs = tasks.together(images())
    assert sum(counts.values()) == 1
    for name, out in outputs.items():
        torch.testing.assert_close(out.logits, tasks(images(), task=name).logits, rtol=0, atol=0)


def test_each_image_may_ask_for_other_tasks(tasks: MultiTask, ran: list[int]) -> None:
    requests = [["head_a"], ["head_b", "lora"], [], ["lora", "head_a", "head_b"]]
    outputs = tasks.together(images(4), requests)
    assert ran == [2] * 4  # once for the two heads, once for lora
    rows = {"head_a": [0, 3], "head_b": [1, 3], "lora": [1, 3]}
    assert set(outputs) == set(rows)
    for name, chosen in rows.items():
        expected = tasks(images(4)[chosen], task=name).logits
        torch.testing.assert_close(outputs[name].logits, expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="4 images need 4 lists"):
        tasks.together(images(4), [["head_a"]])
    with pytest.raises(UserError, match="no task 'roofs'; there are head_a"):
        tasks.together(images(1), [["roofs"]])


def test_a_predictor_follows_the_task_in_use(tasks: MultiTask, folders: dict[str, Path]) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (37, 50, 3), dtype=np.uint8)
    predictor = segvit.Predictor(tasks)
    for name in ("deep", "head_b"):
        tasks.use(name)
        expected = segvit.Predictor(load_model(folders[name]))(picture)
        np.testing.assert_array_equal(predictor(picture).labels, expected.labels)
        assert predictor(picture).classes == expected.classes
        np.testing.assert_array_equal(segvit.Predictor(tasks.runtime(name))(picture).labels, expected.labels)
    with pytest.raises(UserError, match="no task"):
        tasks.use("roofs")


def test_other_systems_stand_on_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = tmp_path / "vit.safetensors"
    trunk = create_model("segmenter_vit_tiny", num_classes=2, image_size=64).backbone
    save_file({name: value.contiguous() for name, value in trunk.state_dict().items()}, weights)
    small = {"image_size": 64, "layers": 1}
    systems = {
        "scene": ("segmenter_vit_tiny", "vpt_deep", small),
        "parts": ("segvit_shrunk_vit_tiny", "head_only", small), "defects": ("segvit_vit_tiny", "head_only", small),
        "large": ("segvit_vit_tiny", "lora", {"image_size": 96, "layers": 1}),
    }  # fmt: skip
    for number, (name, (system, method, options)) in enumerate(systems.items()):
        write_task(tmp_path / name, str(weights), method, {}, classes=2 + number, name=system,
                   weights=str(weights), **options)  # fmt: skip
    tasks = load_tasks({name: tmp_path / name for name in systems})
    pointers = {network(tasks, name).backbone.blocks[0].mlp.fc1.weight.data_ptr() for name in systems}
    assert len(pointers) == 1
    outputs = tasks.together(images(2, 64))
    for name in systems:
        expected = load_model(tmp_path / name)(images(2, 64)).logits
        torch.testing.assert_close(outputs[name].logits, expected, rtol=1e-5, atol=1e-6)
    assert tasks.shared_steps("parts", "defects") == network(tasks, "parts").shrink_at + 1
    assert tasks.shared_steps("scene", "defects") == 0  # the norms of the systems have another epsilon
    assert tasks.shared_steps("defects", "large") == 0  # and other position embeddings


@pytest.mark.parametrize(("backbone", "late", "steps"), [("resnet10t", "ssf", 7), ("pvt_tiny", "lora", 1)])
def test_pyramids_share_too(backbone: str, late: str, steps: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"name": "semantic_fpn", "backbone": backbone, "fpn_dim": 8, "head_dim": 8}
    if backbone == "pvt_tiny":
        options |= {"name": "semantic_fpn_pvt_tiny", "depths": [1, 1, 1, 1], "dims": [16, 32, 40, 64]}
        options.pop("backbone")
    torch.manual_seed(0)
    save_model(create_model(num_classes=2, **options), tmp_path / "base")
    for number, method in enumerate(("head_only", "head_only", late, "spm")):
        write_task(tmp_path / str(number), str(tmp_path / "base"), method, {}, classes=2 + number, **options)
    tasks = load_tasks({name: tmp_path / name for name in "0123"})
    assert tasks.shared_steps("0", "1") >= steps
    outputs = tasks.together(images(2, 64))
    for name, out in outputs.items():
        expected = load_model(tmp_path / name)(images(2, 64)).logits
        torch.testing.assert_close(out.logits, expected, rtol=1e-5, atol=1e-6)
    mixed = tasks.together(images(2, 64), [["0"], ["0", "1", "3"]])
    torch.testing.assert_close(mixed["1"].logits, outputs["1"].logits[1:], rtol=1e-4, atol=1e-5)


def test_other_base_weights_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(5)
    save_model(create_model("segmenter_vit_tiny", num_classes=2, **VIT), tmp_path / "base")
    write_task(tmp_path / "other", str(tmp_path / "base"), "lora", {}, classes=3, **VIT)
    with pytest.raises(UserError, match="other base weights"):
        load_tasks({"a": folders["lora"], "b": tmp_path / "other"})
    with pytest.raises(UserError, match="other base weights"):
        load_tasks({"a": folders["biases"], "b": tmp_path / "other"})  # whose base is loaded whole
    with pytest.raises(UserError, match="second backbone"):
        load_tasks({"a": folders["lora"], "b": tmp_path / "base"})
    load_tasks({"a": folders["lora"], "b": folders["head_a"].parent / "base"})
    with pytest.raises(UserError, match="at least one"):
        load_tasks({})


def test_images_that_are_not_the_same_to_all_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    spec = segvit.InputSpec(mean=(0.1, 0.2, 0.3), std=(1, 1, 1))
    base = str(folders["head_a"].parent / "base")
    write_task(tmp_path / "odd", base, "head_only", {}, classes=3, spec=spec, **VIT)
    tasks = load_tasks({"even": folders["head_a"], "odd": tmp_path / "odd"})
    with pytest.raises(UserError, match="even and odd normalise images differently"):
        tasks.together(images())


MEASURE = """
import gc, json, resource, statistics, sys, time
from pathlib import Path
from segvit.tasks.multi_task import load_tasks

def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

small, *folders = sys.argv[1:]
load_tasks({"small": small})  # what the first use of the libraries takes is not counted
gc.collect()
before = rss()
tasks = load_tasks(dict(zip("0123456789", folders)))
gc.collect()
grown = rss() - before
taken = []
for name in "0123456789" * 10:
    started = time.perf_counter()
    tasks.use(name)
    taken.append(time.perf_counter() - started)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
print(json.dumps({"grown": grown, "tensors": tasks.memory(), "peak": peak, "switch": statistics.median(taken)}))
"""


@pytest.mark.slow
def test_ten_tasks_on_a_vit_base_take_one_backbone_and_ten_adapters(folders: dict[str, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = create_model("segmenter_linear_vit_base", num_classes=5, image_size=224)
    save_model(model, tmp_path / "base")
    methods = [("vpt_deep", {}), ("lora", {}), ("ssf", {}), ("vpt_shallow", {}), ("head_only", {})] * 2
    for number, (method, options) in enumerate(methods):
        adapt(model, method, **options)
        shake(model, number)
        save_adapter(model, tmp_path / str(number), base="../base")
        model.adapter.detach()
    files = [str(tmp_path / str(number)) for number in range(len(methods))]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(folders["lora"]), *files], check=True, capture_output=True, text=True
    )
    found = json.loads(done.stdout)
    backbone = (tmp_path / "base" / "model.safetensors").stat().st_size
    adapters = sum((Path(file) / TENSORS).stat().st_size for file in files)
    print({name: value / 2**20 for name, value in found.items()}, backbone / 2**20, adapters / 2**20)
    assert found["tensors"] <= backbone + adapters
    # The networks' Python objects, and what the allocator keeps for itself.
    assert found["grown"] <= backbone + adapters + 40 * 2**20
    assert found["switch"] < 1e-3
