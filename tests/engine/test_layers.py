"""Layer-wise decay: the factor of each parameter, from the names of real models."""

import pytest
import torch

from segvit.contracts import UserError
from segvit.engine.layers import layer_factors, layer_number
from segvit.zoo import create_model


def factors(model, *, device="meta", **options):
    with torch.device(device):
        network = create_model(model, num_classes=3, **options)
    return layer_factors((name for name, _ in network.named_parameters()), 0.5)


def test_plain_vits_have_a_layer_for_each_block():
    found = factors("segvit_vit_tiny", image_size=32, depth=3, embed_dim=64, out_indices=[0, 2], layers=1)
    assert found["backbone.patch_embed.proj.weight"] == found["backbone.pos_embed"] == 0.5**4
    assert [found[f"backbone.blocks.{i}.norm1.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert {value for name, value in found.items() if name.startswith("head.")} == {1.0}


@pytest.mark.parametrize(
    "backbone", ["vit_small_patch14_reg4_dinov2", "eva02_tiny_patch14_336", "beit_base_patch16_224"]
)
def test_only_heads_and_the_last_norm_keep_the_full_rate(backbone):
    found = factors("segmenter_vit_tiny", backbone=backbone, image_size=112)
    full = {name for name, value in found.items() if value == 1.0 and name.startswith("backbone.")}
    assert full == {"backbone.norm.weight", "backbone.norm.bias"}


@pytest.mark.parametrize(
    ("options", "early", "first", "last"),
    [
        ({"model": "semantic_fpn_pvt_tiny", "device": "cpu"}, None, "patch_embed1.", "block4."),
        ({"model": "semantic_fpn_pvt_v2_b0"}, "network.patch_embed.", "network.stages_0.", "network.stages_3."),
        ({"model": "semantic_fpn", "backbone": "resnet18"}, "network.conv1.", "network.layer1.", "network.layer4."),
        ({"model": "semantic_fpn", "backbone": "convnext_atto"}, "network.stem_0.", "network.stages_0.",
         "network.stages_3."),
        ({"model": "setr_hlg_tiny"}, "stem.", "stages.0.", "norms.3."),
    ],
    ids=["pvt", "pvt_v2", "resnet", "convnext", "hlg"],
)  # fmt: skip
def test_pyramids_have_a_layer_for_each_stage(options, early, first, last):
    found = factors(**options)

    def of(prefix):
        return {value for name, value in found.items() if name.startswith(f"backbone.{prefix}")}

    assert of(first) == {0.5**4}
    assert of(last) == {0.5}
    assert early is None or of(early) == {0.5**5}
    assert {value for name, value in found.items() if not name.startswith("backbone.")} == {1.0}


def test_numbers_in_other_places_are_no_layers():
    assert layer_number("backbone.gaps.3.weight") is None
    assert layer_number("head.blocks.2.weight") is None
    assert layer_number("backbone.blocks.11.mlp.fc1.weight") == 11


def test_a_model_without_known_layers_is_refused():
    with pytest.raises(UserError, match=r"no backbone with layers that are known; set optim.layer_decay to null"):
        factors("ddrnet_23_slim")
