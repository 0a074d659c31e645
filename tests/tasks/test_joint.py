"""Several tasks that train one backbone together."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from segvit.cli import main
from segvit.contracts import UserError
from segvit.engine.settings import Optim
from segvit.model_folder import load_model
from segvit.tasks.detect import load_detector
from segvit.tasks.joint import Joint, JointRun, read_joint, train_tasks
from segvit.tasks.multi_task import load_tasks
from tests.tasks.tiny import DATA, OPTIONS, RECIPE, experiment, history, steps

OTHER = "synthetic:night?train=8&val=4&size=32"


def joint(out: Path, **changes: Any) -> Joint:
    """Two segmentations with other classes on one ViT of two blocks."""
    shared = {key: changes.pop(key) for key in list(changes) if key not in Joint.__dataclass_fields__}
    scene = experiment(out, **shared)
    tasks = {"scene": scene, "roads": replace(scene, data=OTHER, batch_size=2)}
    return Joint(out=str(out), **{"tasks": tasks} | changes)


def backbone(folder: Path) -> dict[str, torch.Tensor]:
    state = load_file(folder / "model" / "model.safetensors")
    return {name: value for name, value in state.items() if name.startswith("backbone.")}


def test_two_tasks_learn_on_one_backbone(tmp_path: Path) -> None:
    run = joint(tmp_path / "run", steps=30, optim=Optim(lr=0.002), weights={"roads": 0.5})
    figures = train_tasks(run)
    assert set(figures) == {"scene", "roads"}
    rows = steps(tmp_path / "run")
    terms = {key.partition("/")[0] for key in rows[0] if "/" in key}
    assert terms == {"scene", "roads"}
    for name in terms:
        first, last = ([sum(value for key, value in row.items() if key.startswith(f"{name}/")) for row in part]
                       for part in (rows[:3], rows[-3:]))  # fmt: skip
        assert sum(last) < 0.9 * sum(first)
    one, other = backbone(tmp_path / "run" / "scene"), backbone(tmp_path / "run" / "roads")
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    assert load_model(tmp_path / "run" / "roads").classes.names != load_model(tmp_path / "run" / "scene").classes.names
    for name, figure in figures.items():
        record = json.loads((tmp_path / "run" / name / "val.json").read_text())
        assert record["miou"] == pytest.approx(figure, nan_ok=True)
        assert (tmp_path / "run" / name / "report" / "index.html").is_file()
    validated = [row for row in history(tmp_path / "run") if "val" in row]
    assert set(validated[-1]["val"]) == {"miou", "scene", "roads"}
    tasks = load_tasks({name: tmp_path / "run" / name for name in figures})
    assert tasks.shared_steps("scene", "roads") == 3


def test_the_weight_of_a_task_scales_its_loss(tmp_path: Path) -> None:
    train_tasks(joint(tmp_path / "one", steps=1))
    train_tasks(joint(tmp_path / "two", steps=1, weights={"roads": 3.0}))
    one, two = steps(tmp_path / "one")[0], steps(tmp_path / "two")[0]
    for key, value in one.items():
        if "/" in key:
            assert two[key] == pytest.approx(value * (3 if key.startswith("roads/") else 1), rel=1e-5), key


def test_the_backbone_stands_still_in_the_adapt_stage(tmp_path: Path) -> None:
    seen: list[dict[str, torch.Tensor]] = []
    after = JointRun.after

    def look(self: JointRun, step: int) -> None:
        seen.append({name: value.clone() for name, value in self.parts["roads"].trunk.state_dict().items()})
        after(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JointRun, "after", look)
        train_tasks(joint(tmp_path / "run", adapt_steps=4))
    same = [all(torch.equal(seen[0][name], state[name]) for name in state) for state in seen]
    assert same == [True] * 4 + [False] * 2
    assert "the backbone trains from here on" in (tmp_path / "run" / "train.log").read_text()


def test_a_shared_adapter_trains_while_the_backbone_stands_still(tmp_path: Path) -> None:
    run = joint(tmp_path / "run", adapter="lora", adapter_options={"rank": 2}, adapt_steps=6)
    train_tasks(run)
    one, other = backbone(tmp_path / "run" / "scene"), backbone(tmp_path / "run" / "roads")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    key = "backbone.blocks.0.attn.qkv.lora_B.weight"
    assert one[key].abs().max() > 0
    assert load_model(tmp_path / "run" / "roads").adapter is not None
    train_tasks(joint(tmp_path / "longer", adapter="lora", adapter_options={"rank": 2}, adapt_steps=3))
    moved = backbone(tmp_path / "longer" / "scene")
    base = "backbone.blocks.0.attn.qkv.base_layer.weight"
    assert not torch.equal(moved[base], one[base])


def test_a_resumed_run_is_the_whole_run(tmp_path: Path) -> None:
    whole = joint(tmp_path / "whole", adapt_steps=2, checkpoint_every=3, val_every=2)
    train_tasks(whole)
    save = JointRun.save

    def stop(self: JointRun) -> None:
        save(self)
        raise KeyboardInterrupt

    parts = joint(tmp_path / "parts", adapt_steps=2, checkpoint_every=3, val_every=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JointRun, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            train_tasks(parts)
    with pytest.raises(UserError, match="--resume"):
        train_tasks(parts)
    with pytest.raises(UserError, match="adapt_steps: 2 -> 3"):
        train_tasks(replace(parts, adapt_steps=3, resume=True))
    train_tasks(replace(parts, resume=True))
    assert steps(tmp_path / "parts") == steps(tmp_path / "whole")
    for name in whole.tasks:
        place = Path(name) / "model" / "model.safetensors"
        assert (tmp_path / "parts" / place).read_bytes() == (tmp_path / "whole" / place).read_bytes()
    figures = train_tasks(replace(parts, resume=True))
    assert not math.isnan(figures["scene"])


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    scene = experiment(tmp_path)
    other = {**OPTIONS, "embed_dim": 128}
    for tasks, message in [
        ({"scene": scene}, "two tasks or more"),
        ({"scene": scene, "a.b": scene}, "cannot be called 'a.b'"),
        ({"scene": scene, "roads": replace(scene, seed=3)}, "seed of roads is not that of the first task"),
        ({"scene": scene, "roads": replace(scene, ema=0.9)}, "joint training has no ema"),
        ({"scene": scene, "roads": replace(scene, adapter="ssf")}, "adapter of roads"),
    ]:
        with pytest.raises(UserError, match=message):
            Joint(out=str(tmp_path), tasks=tasks)
    with pytest.raises(UserError, match="adapt_steps is 7"):
        joint(tmp_path, adapt_steps=7)
    with pytest.raises(UserError, match="weight 2 of 'roofs'"):
        joint(tmp_path, weights={"roofs": 2})
    unlike = {"scene": scene, "roads": replace(scene, options=other)}
    with pytest.raises(UserError, match="roads has another backbone than scene"):
        train_tasks(Joint(out=str(tmp_path / "run"), tasks=unlike))
    assert not (tmp_path / "run").exists()


def write_tasks(path: Path, **changes: Any) -> Path:
    recipe = {key: value for key, value in RECIPE.items() if key != "data"} | {"val_every": 0}
    tasks = {"scene": {"data": DATA}, "roads": {"data": OTHER, "batch_size": 2, "weight": 0.5}}
    path.write_text(yaml.safe_dump(recipe | {"tasks": tasks, "adapt_steps": 1} | changes, sort_keys=False))
    return path


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, run = write_tasks(tmp_path / "tasks.yaml"), tmp_path / "run"
    main(["multi", "train", "--config", str(config), "--out", str(run), "--steps", "2", "--json"])
    assert set(json.loads(capsys.readouterr().out)) == {"scene", "roads"}
    made = read_joint(str(config), {"out": str(run), "steps": 2})
    assert (made.weights, made.adapt_steps, made.steps) == ({"roads": 0.5}, 1, 2)
    (tmp_path / "images").mkdir()
    from PIL import Image

    Image.new("RGB", (40, 30), (90, 120, 60)).save(tmp_path / "images" / "a.png")
    named = f"scene={run / 'scene'},roads={run / 'roads'}"
    main(["multi", "predict", str(tmp_path / "images"), "--tasks", named, "--out", str(tmp_path / "maps")])
    for name in ("scene", "roads"):
        with Image.open(tmp_path / "maps" / name / "a.png") as labels:
            assert labels.size == (40, 30)
    for wrong, message in [({"tasks": None}, "names no tasks"), ({"colour": 1}, "colour")]:
        with pytest.raises(SystemExit):
            main(["multi", "train", "--config", str(write_tasks(tmp_path / "w.yaml", **wrong)), "--out", "x"])
        assert message in capsys.readouterr().err


def test_detection_shares_the_backbone(tmp_path: Path) -> None:
    pytest.importorskip("pycocotools")
    small = {"depths": [1, 1, 1, 1], "dims": [16, 32, 40, 64]}
    tasks = {
        "scene": {"data": DATA, "model": "semantic_fpn_pvt_tiny", "options": small | {"fpn_dim": 16, "head_dim": 16}},
        "objects": {"detector": "retinanet_pvt_tiny", "data": "synthetic:shapes?train=4&val=2&size=64",
                    "options": small | {"fpn_dim": 16}, "size": [64, 64], "batch_size": 2},
    }  # fmt: skip
    config = write_tasks(tmp_path / "tasks.yaml", tasks=tasks, options={}, out=str(tmp_path / "run"), steps=3)
    figures = train_tasks(read_joint(str(config), {}))
    assert set(figures) == {"scene", "objects"}
    assert {key for key in steps(tmp_path / "run")[0] if key.startswith("objects/")} == {
        "objects/loss_classification", "objects/loss_bbox_regression",
    }  # fmt: skip
    dense, detector = load_model(tmp_path / "run" / "scene"), load_detector(tmp_path / "run" / "objects")
    trunk = detector.network.get_submodule("backbone.backbone")
    for name, value in dense.backbone.state_dict().items():
        assert torch.equal(value, trunk.state_dict()[name]), name
    assert "AP" in json.loads((tmp_path / "run" / "objects" / "val.json").read_text())
