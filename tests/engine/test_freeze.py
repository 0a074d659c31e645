"""Freezing by pattern: what matches, what is said otherwise, and normalisation layers that stand still."""

import pytest
import torch
from torch import nn

from segvit.contracts import UserError
from segvit.engine.freeze import freeze, frozen_parts, train_mode


def model():
    blocks = nn.Sequential(*(nn.ModuleDict({"fc": nn.Linear(2, 2), "norm": nn.BatchNorm1d(2)}) for _ in range(3)))
    return nn.ModuleDict({"backbone": nn.ModuleDict({"blocks": blocks}), "head": nn.Linear(2, 2)})


def trained(network):
    return {name for name, parameter in network.named_parameters() if parameter.requires_grad}


def test_every_name_with_a_match_is_frozen():
    network = model()
    freeze(network, [r"blocks\.[01]\.", "bias$"])
    assert trained(network) == {"backbone.blocks.2.fc.weight", "backbone.blocks.2.norm.weight", "head.weight"}
    freeze(network, [])
    assert len(trained(network)) == 3


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (r"backbone\.block\.", "matches no parameter; there are backbone.blocks"),
        ("^hed", "matches no parameter; there are head"),
        ("zzz", "matches no parameter; there are backbone, head$"),
        ("blocks.(", r"'blocks.\(' is not a regular expression"),
        ("", "leaves nothing to train; freeze less"),
    ],
)  # fmt: skip
def test_mistakes_are_named(pattern, message):
    network = model()
    with pytest.raises(UserError, match=message):
        freeze(network, [pattern])


def test_frozen_norms_keep_their_statistics_in_training():
    network = model().eval()
    freeze(network, [r"blocks\.0\.", r"blocks\.1\.norm\.weight"])
    train_mode(network)
    norms = [block["norm"] for block in network["backbone"]["blocks"]]
    assert [norm.training for norm in norms] == [False, True, True]  # half frozen is not frozen
    assert network["backbone"]["blocks"][0]["fc"].training
    before = norms[0].running_mean.clone()
    for norm in norms:
        norm(torch.randn(8, 2) + 5)
    assert torch.equal(norms[0].running_mean, before)
    assert not torch.equal(norms[1].running_mean, before)


def test_what_is_frozen_is_named_by_its_outermost_part():
    network = model()
    assert frozen_parts(network) == ""
    freeze(network, [r"blocks\.0", "head.bias"])
    assert frozen_parts(network) == "backbone.blocks.0, head.bias"
    freeze(network, ["backbone"])
    assert frozen_parts(network) == "backbone, head.bias"
    many = nn.ModuleDict({name: nn.Linear(1, 1) for name in "abcdefg"})
    freeze(many, ["^[a-f]"])
    assert frozen_parts(many) == "a, b, c, d and 2 more"
