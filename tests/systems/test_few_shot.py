"""Few-shot networks: sizes of the card, any image size, gradients of SVF, frozen parts, losses."""

import math

import pytest
import torch
from torch import Tensor, nn

from segvit.adapters.svf import svf
from segvit.backbones.deep_stem import DeepStemResNet, deep_stem_resnet
from segvit.contracts import UserError
from segvit.systems.few_shot import (
    BAM,
    BaseLearner,
    Matcher,
    MetaLearner,
    PFENet,
    ShotWeights,
    convert,
    criterion,
    few_shot,
    normalisers,
    prior,
)


def matcher() -> Matcher:
    torch.manual_seed(0)
    return Matcher(DeepStemResNet((1, 1, 1, 1), stem=4, planes=4).requires_grad_(False), 8)


def episode(batch: int, shots: int, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    masks = torch.zeros(batch, shots, *size)
    masks[..., : size[0] // 2, : size[1] // 3] = 1
    masks[..., -5:, :] = 255
    query = torch.randn(batch, 3, *size, generator=generator)
    return query, torch.randn(batch, shots, 3, *size, generator=generator), masks


def numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_sizes_are_those_of_the_paper():
    with torch.device("meta"):
        model = few_shot(head="baseline")
    assert numbers(model) - numbers(model.matcher.backbone) == 4_917_250
    assert round(numbers(model.matcher.backbone) / 1e6, 2) == 23.63


def test_svf_trains_the_singular_values_of_stages_two_to_four():
    handle = svf(deep_stem_resnet("resnet50").requires_grad_(False))
    assert sum(change.new.singular_values.numel() for change in handle.changes) == 12_544


@pytest.mark.parametrize("size", [(65, 65), (50, 81)])
@pytest.mark.parametrize("head", [MetaLearner, PFENet])
def test_any_size_and_number_of_supports(head, size):
    model = head(matcher(), 8).eval()
    for shots in (1, 3):
        out = model(*episode(2, shots, size))
        assert out.logits.shape == (2, 2, *size)
        assert out.covers == size


def test_ignored_support_pixels_are_no_object():
    model = MetaLearner(matcher(), 8).eval()
    query, supports, masks = episode(1, 1, (65, 65))
    without = torch.where(masks == 255, 0, masks)
    assert torch.equal(model(query, supports, masks).logits, model(query, supports, without).logits)
    assert not torch.allclose(model(query, supports, masks).logits, model(query, supports, 1 - without).logits)


def test_an_empty_support_mask_gives_zeros_and_no_nan():
    model = MetaLearner(matcher(), 8).eval()
    query, supports, masks = episode(1, 1, (65, 65))
    out = model(query, supports, torch.zeros_like(masks))
    assert out.extras["prior"].abs().max() == 0
    assert out.logits.isfinite().all()


def test_the_prior_finds_the_like_of_the_support():
    query, support = torch.zeros(1, 2, 2, 3), torch.zeros(1, 2, 2, 3)
    query[0, 0], query[0, 1, 1, 2] = 1, 5.0
    support[0, 0, 0, 0] = 2.0
    expected = torch.ones(1, 2, 3)
    expected[0, 1, 2] = 0
    torch.testing.assert_close(prior(query, support), expected, atol=1e-5, rtol=0)


def test_shot_weights_follow_the_distances_and_not_the_order():
    weights = ShotWeights(3, 2)
    distances = torch.tensor([[0.3, 0.1, 0.2]])
    found = weights(distances)
    torch.testing.assert_close(weights(distances[:, [2, 0, 1]]), found[:, [2, 0, 1]])
    assert found.sum().item() == pytest.approx(1)
    with pytest.raises(UserError, match="weighs 3 supports and got 2"):
        weights(distances[:, :2])


def test_official_shot_weights_convert_in_both_forms():
    one = torch.zeros(1)
    assert set(convert({"kshot_rw.weight": one, "cls_merge.weight": one})) == {"weights.layers.0.weight"}
    found = convert({"kshot_rw.0.bias": one, "kshot_rw.2.weight": one, "cls_merge.weight": one}, ensemble=True)
    assert set(found) == {"meta.weights.layers.0.bias", "meta.weights.layers.2.weight", "base_merge.weight"}


def test_only_the_head_and_singular_values_learn_and_the_norms_stay():
    model = PFENet(matcher(), 8, bins=(1.0, 0.5)).train()
    handle = svf(model.matcher.backbone)
    before = {name: value.clone() for name, value in model.matcher.backbone.named_buffers()}
    query, supports, masks = episode(2, 1, (65, 65))
    target = masks[:, 0].to(torch.uint8)
    losses = criterion(model(query, supports, masks), target, normalisers(target, ignore_index=255))
    assert set(losses) == {"loss_ce", "loss_inner"}
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        learns = not name.startswith("matcher.backbone.") or name.endswith("singular_values")
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == learns, name
    assert all(torch.equal(value, before[name]) for name, value in model.matcher.backbone.named_buffers())
    model.eval()
    tuned = model(query, supports, masks).logits
    handle.disable()  # untouched singular values are the network without them
    torch.testing.assert_close(model(query, supports, masks).logits, tuned)


def test_bam_takes_off_base_classes():
    meta = MetaLearner(matcher(), 8)
    model = BAM(meta, BaseLearner(meta.matcher.backbone.dims[-1], 4, hidden=8, bins=(1, 2))).eval()
    query, supports, masks = episode(2, 1, (65, 65))
    out = model(query, supports, masks)
    scores = out.extras["meta"].softmax(1)
    assert out.logits.shape == scores.shape
    # As built it is the meta learner on the grid of the features.
    small = meta(query, supports, masks).extras["meta"].softmax(1)
    torch.testing.assert_close(out.logits[:, :, ::8, ::8], small, atol=1e-5, rtol=1e-5)
    model.base_merge.weight.data[0, 1] = 1
    more = model(query, supports, masks).logits
    less = model(query, supports, masks, base_class=torch.tensor([2, 3])).logits
    assert (more[:, 0] > out.logits[:, 0]).all()
    assert (less[:, 0] < more[:, 0]).all()
    target = masks[:, 0].to(torch.uint8)
    losses = criterion(out, target, normalisers(target, ignore_index=255))
    assert set(losses) == {"loss_ce", "loss_meta"}
    assert math.isfinite(sum(losses.values()).item())
    assert not any(parameter.requires_grad for parameter in model.base.parameters())


def test_wrong_options():
    with pytest.raises(UserError, match="unknown few-shot backbone 'vgg16'"):
        few_shot(head="baseline", backbone="vgg16")
    with pytest.raises(UserError, match="shot is for learned weights"):
        few_shot(head="pfenet", shot=5, dim=8)
    with pytest.raises(UserError, match="BAM needs a base learner"):
        few_shot(head="bam", backbone="tiny", dim=8)


def test_bam_keeps_a_tuned_backbone_fit_for_its_base_learner():
    model = few_shot(head="bam", backbone="tiny", dim=8, base_classes=3, base_hidden=8).eval()
    svf(model.matcher.backbone)
    query, supports, masks = episode(2, 1, (65, 65))
    target, base = masks[:, 0].to(torch.uint8), torch.full((2, 65, 65), 2, dtype=torch.uint8)
    totals = normalisers(target, ignore_index=255)
    losses = criterion(model(query, supports, masks), target, totals, base_masks=base)
    assert set(losses) == {"loss_ce", "loss_meta", "loss_base"}
    losses["loss_base"].backward()
    tuned = {name: value for name, value in model.named_parameters() if name.endswith("singular_values")}
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in tuned.values())
    assert all(value.grad is None for value in model.base.parameters())


def test_official_backbone_files_load(tmp_path):
    source = deep_stem_resnet("resnet50")
    state = source.state_dict()
    official = {}
    for key, value in state.items():
        place = int(key.split(".")[1]) if key.startswith("stem.") else 0
        kind = {0: "conv", 1: "bn"}[place % 3]
        official[f"{kind}{place // 3 + 1}.{key.split('.')[2]}" if key.startswith("stem.") else key] = value
    torch.save(official | {"fc.weight": torch.zeros(2, 2)}, tmp_path / "resnet50_v2.pth")
    loaded = deep_stem_resnet("resnet50", weights=str(tmp_path / "resnet50_v2.pth")).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    with pytest.raises(UserError, match="does not fit resnet101"):
        deep_stem_resnet("resnet101", weights=str(tmp_path / "resnet50_v2.pth"))
