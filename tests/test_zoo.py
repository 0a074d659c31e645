"""The catalogue: names and options that do not exist, model folders, and heads matched by class name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from segvit import __version__
from segvit.contracts import Classes, InputSpec, UserError
from segvit.model_folder import load_model, load_state, match_classes, save_model
from segvit.nn.flops import count_gflops
from segvit.zoo import MODELS, create_model, find_system

TINY: dict[str, Any] = {"image_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 64, "out_indices": [0], "layers": 1}
ABC = Classes(("ape", "bee", "cat"), ((1, 1, 1), (2, 2, 2), (3, 3, 3)))


def tiny(name: str = "segvit_vit_tiny", *, classes: Classes = ABC, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    options = TINY | options
    if "shrunk" in name:
        options |= {"shrink_at": 0}
    elif name.startswith("segmenter"):
        del options["out_indices"]
    return create_model(name, classes=classes, **options).eval()


def test_every_entry_is_complete() -> None:
    for name, system in MODELS.items():
        assert system.task == "dense"
        assert callable(system.build)
        assert callable(system.convert)
        assert find_system(name) is system


def test_unknown_model() -> None:
    with pytest.raises(UserError, match=r"unknown model 'segvit_vit_bse'; did you mean segvit_vit_base"):
        create_model("segvit_vit_bse", num_classes=3)
    with pytest.raises(UserError, match="segvit models list"):
        find_system("????")


def test_unknown_option() -> None:
    with pytest.raises(UserError, match=r"segvit_vit_tiny has no option 'drop_pth'; did you mean drop_path"):
        tiny(drop_pth=0.1)
    with pytest.raises(UserError, match=r"has no option 'zzzzzz'; did you mean .*image_size"):
        tiny(zzzzzz=1)


def test_number_of_classes() -> None:
    with pytest.raises(UserError, match="segvit_vit_tiny needs num_classes or classes"):
        create_model("segvit_vit_tiny")
    with pytest.raises(UserError, match="num_classes is 4 but the class table has 3"):
        create_model("segvit_vit_tiny", num_classes=4, classes=ABC)
    model = create_model("segvit_vit_tiny", num_classes=2, **TINY)
    assert model.classes.names == ("class_0", "class_1")
    assert len(set(model.classes.palette)) == 2
    assert len(create_model("segvit_vit_tiny", num_classes=3, classes=ABC, **TINY).classes) == 3


def test_weights_are_not_part_of_the_configuration() -> None:
    assert tiny(weights=None).config.options == TINY


def test_model_folder(tmp_path: Path) -> None:
    model = tiny()
    model.spec = InputSpec(
        mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6), scale=(2048, 512), window=(32, 32), stride=(21, 21)
    )
    save_model(model, tmp_path, card="# A model\n")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {"0": "ape", "1": "bee", "2": "cat"}
    assert config["label2id"] == {"ape": 0, "bee": 1, "cat": 2}
    assert config["palette"] == [[1, 1, 1], [2, 2, 2], [3, 3, 3]]
    assert (config["name"], config["options"], config["ignore_index"]) == ("segvit_vit_tiny", TINY, 255)
    assert (config["segvit_version"], config["num_labels"], config["model_type"]) == (__version__, 3, "segvit")
    spec = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert (spec["image_mean"], spec["image_std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert spec["size"] == {"shortest_edge": 512, "longest_edge": 2048}
    assert (spec["window"], spec["stride"], spec["do_reduce_labels"]) == ([32, 32], [21, 21], False)
    assert (spec["do_resize"], spec["do_rescale"], spec["do_normalize"]) == (True, True, True)
    assert spec["rescale_factor"] == pytest.approx(1 / 255)
    again = load_model(tmp_path)
    assert (again.spec, again.config, again.classes) == (model.spec, model.config, model.classes)


@pytest.mark.parametrize(
    "spec",
    [
        InputSpec(),
        InputSpec(exact=(48, 64)),
        InputSpec(scale=(512, 512), min_side=512, window=(512, 512), stride=(341, 341)),
    ],
)
def test_input_rules_survive_the_folder(spec: InputSpec) -> None:
    assert InputSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_classes_beyond_one_byte(tmp_path: Path) -> None:
    model = create_model("segvit_vit_tiny", num_classes=300, **TINY)
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["ignore_index"] == 65535
    assert load_model(tmp_path).classes == model.classes


def test_folders_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model \(no config.json"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="neither a folder nor a model to be had from the hub"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a folder nor a model to be had from the hub"):
        load_model("someone/some-model")


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])
def test_incomplete_folder(name: str, tmp_path: Path) -> None:
    save_model(tiny(), tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=rf"{name} cannot be read.*copy the model folder again") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json", "config.json"])
@pytest.mark.parametrize("damage", ["short", "empty", "other"])
def test_damaged_folder(name: str, damage: str, tmp_path: Path) -> None:
    save_model(tiny(), tmp_path)
    whole = (tmp_path / name).read_bytes()
    content = {"short": whole[: len(whole) // 2], "empty": b"", "other": b"{}"}[damage]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_weights_of_another_model(tmp_path: Path) -> None:
    save_model(tiny(), tmp_path)
    wider, deeper = tiny(dim=64), tiny(layers=2)
    state = tiny().state_dict()
    with pytest.raises(UserError, match=r"head\.\S+ is \(.*32.*\), the model's is .*; is the number"):
        load_state(wider, state, source="x")
    with pytest.raises(UserError, match=r"x does not fit the model: missing \['head\.stages\.0\.layers\.1"):
        load_state(deeper, state, source="x")
    with pytest.raises(UserError, match="unknown"):
        load_state(tiny(), deeper.state_dict(), source="x")
    config = json.loads((tmp_path / "config.json").read_text())
    config["options"]["image_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"pos_embed is \(1, 17, 64\), the model's is \(1, 65, 64\).*image size"):
        load_model(tmp_path)


NEW = Classes(("cat", "dog", "ape", "emu"), ((3, 3, 3), (4, 4, 4), (1, 1, 1), (5, 5, 5)))


def test_rows_of_the_head_follow_class_names() -> None:
    source, model, fresh = tiny(seed=1), tiny(classes=NEW, seed=2), tiny(classes=NEW, seed=2)
    match_classes(model, source)
    old, new, untouched = source.state_dict(), model.state_dict(), fresh.state_dict()
    for key in ("head.queries", "head.class_embed.weight", "head.class_embed.bias"):
        assert torch.equal(new[key][0], old[key][2])  # cat
        assert torch.equal(new[key][2], old[key][0])  # ape
        assert torch.equal(new[key][1], untouched[key][1])  # dog and emu are new
        assert torch.equal(new[key][3], untouched[key][3])
        if key != "head.queries":
            assert torch.equal(new[key][4], old[key][3])  # "no object" stays the last
    rest = [key for key in new if key not in ("head.queries", "head.class_embed.weight", "head.class_embed.bias")]
    assert all(torch.equal(new[key], old[key]) for key in rest)


def test_reordered_classes_give_reordered_scores(seeded: torch.Generator) -> None:
    turned = Classes(ABC.names[::-1], ABC.palette[::-1])
    images = torch.randn(1, 3, 32, 32)
    for name in ("segvit_vit_tiny", "segvit_shrunk_vit_tiny", "segmenter_vit_tiny", "segmenter_linear_vit_base"):
        source, model = tiny(name, seed=1), tiny(name, classes=turned, seed=2)
        with torch.no_grad():
            for parameter in source.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            match_classes(model, source)
            torch.testing.assert_close(model(images).logits, source(images).logits.flip(1), atol=1e-5, rtol=1e-4)


def test_no_class_in_common() -> None:
    others = Classes(("x", "y"), ((1, 1, 1), (2, 2, 2)))
    source, model, fresh = tiny(seed=1), tiny(classes=others, seed=2), tiny(classes=others, seed=2)
    match_classes(model, source)
    assert torch.equal(model.head.queries, fresh.head.queries)
    assert torch.equal(model.head.class_embed.weight[-1], source.head.class_embed.weight[-1])
    assert torch.equal(model.backbone.pos_embed, source.backbone.pos_embed)


def test_models_that_cannot_be_matched() -> None:
    with pytest.raises(UserError, match="different parts; use --init with the same model"):
        match_classes(tiny("segmenter_vit_tiny"), tiny())
    with pytest.raises(UserError, match=r"pos_embed is \(1, 17, 64\) in the run to start from and \(1, 65, 64\) here"):
        match_classes(tiny(image_size=64), tiny())
    with pytest.raises(UserError, match="use the same options"):
        match_classes(tiny(dim=64), tiny())


@pytest.mark.parametrize("name", ["segvit_vit_tiny", "segvit_shrunk_vit_tiny", "segmenter_vit_tiny"])
@pytest.mark.parametrize("channels", [1, 5])
def test_channels_are_saved_and_loaded(name: str, channels: int, tmp_path: Path) -> None:
    spec = InputSpec(mean=(0.25,) * channels, std=(0.5,) * channels, levels=(0, 4095))
    model = tiny(name, in_channels=channels, spec=spec)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert (loaded.spec, loaded.config.options["in_channels"]) == (spec, channels)
    images = torch.randn(1, channels, 32, 32)
    assert torch.equal(loaded(images).logits, model(images).logits)
    assert count_gflops(loaded, (32, 32)) > 0


def test_the_spec_has_a_value_for_each_channel() -> None:
    assert tiny(in_channels=2).spec == InputSpec(mean=(0.5, 0.5), std=(0.5, 0.5))
    with pytest.raises(UserError, match=r"have 3 values but the model takes 2 channels; .* in_channels=3"):
        tiny(in_channels=2, spec=InputSpec())
