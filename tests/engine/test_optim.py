"""Parameter groups by the longest key, the optimiser over them, rates of a step, clipping."""

import pytest
import torch
from torch import nn

from segvit.engine.optim import clip_gradients, make_optimizer, parameter_rates, set_rates
from segvit.engine.settings import Optim, Schedule


def parameters(*names, frozen=()):
    return [(name, nn.Parameter(torch.ones(2), requires_grad=name not in frozen)) for name in names]


def table(named, **options):
    rates = parameter_rates(named, Optim(lr=1.0, weight_decay=0.1, **options))
    return {rate.name: (rate.lr, pytest.approx(rate.weight_decay)) for rate in rates}


def test_the_longest_key_alone_counts():
    named = parameters("backbone.norm.weight", "head.norm1.weight", "head.fc.weight", "backbone.fc.weight")
    found = table(named, lr_mult={"head": 10.0, "norm1": 3.0}, decay_mult={"norm": 0.0})
    assert found == {
        "backbone.norm.weight": (1.0, 0.0),
        "head.norm1.weight": (3.0, 0.1),  # "norm1" is longest: neither the head's rate nor the norms' decay
        "head.fc.weight": (10.0, 0.1),
        "backbone.fc.weight": (1.0, 0.1),
    }


def test_of_equally_long_keys_the_first_in_the_alphabet_counts():
    assert table(parameters("head.norm"), lr_mult={"norm": 2.0, "head": 5.0})["head.norm"][0] == 5.0


def test_one_key_may_stand_in_both_tables():
    found = table(parameters("head.fc"), lr_mult={"head": 10.0}, decay_mult={"head": 0.5})
    assert found["head.fc"] == (10.0, 0.05)


def test_frozen_parameters_are_left_out():
    assert list(table(parameters("a", "b", frozen=("a",)))) == ["b"]


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_every_parameter_is_in_one_group_of_its_rate_and_decay(name, kind):
    named = parameters("backbone.fc", "backbone.norm", "head.fc", "head.norm", "head.other")
    optim = Optim(name=name, lr=1.0, weight_decay=0.1, lr_mult={"head": 10.0}, decay_mult={"norm": 0.0})
    optimizer = make_optimizer(parameter_rates(named, optim), optim)
    assert type(optimizer) is kind
    names = {parameter: name for name, parameter in named}
    groups = {
        tuple(names[p] for p in group["params"]): (group["lr"], group["initial_lr"], group["weight_decay"])
        for group in optimizer.param_groups
    }
    assert groups == {
        ("backbone.fc",): (1.0, 1.0, 0.1),
        ("backbone.norm",): (1.0, 1.0, 0.0),
        ("head.fc", "head.norm", "head.other"): (10.0, 10.0, 0.1),  # "head" comes before "norm" and is as long
    }


def test_weight_decay_shrinks_weights_without_a_gradient():
    for name in ("adamw", "sgd"):
        named, optim = parameters("a"), Optim(name=name, lr=0.5, weight_decay=0.1)
        optimizer = make_optimizer(parameter_rates(named, optim), optim)
        named[0][1].grad = torch.zeros(2)
        optimizer.step()
        torch.testing.assert_close(named[0][1].detach(), torch.full((2,), 1 - 0.5 * 0.1))


def test_layer_decay_multiplies_the_rate_of_every_layer():
    named = parameters("backbone.pos_embed", "backbone.blocks.0.fc", "backbone.blocks.1.norm", "head.fc")
    found = table(named, layer_decay=0.5, lr_mult={"head": 10.0}, decay_mult={"norm": 0.0})
    assert found == {
        "backbone.pos_embed": (0.125, 0.1),
        "backbone.blocks.0.fc": (0.25, 0.1),
        "backbone.blocks.1.norm": (0.5, 0.0),
        "head.fc": (10.0, 0.1),
    }


def test_layers_are_counted_with_those_that_are_frozen():
    named = parameters("backbone.blocks.0.fc", "backbone.blocks.1.fc", frozen=("backbone.blocks.1.fc",))
    assert table(named, layer_decay=0.5) == {"backbone.blocks.0.fc": (0.25, 0.1)}


def test_set_rates_scales_each_group_and_returns_the_lowest_and_the_highest():
    named, optim = parameters("backbone", "head"), Optim(lr=1.0, lr_mult={"head": 10.0})
    optimizer = make_optimizer(parameter_rates(named, optim), optim)
    schedule = Schedule(kind="poly", power=1.0, warmup=0)
    for _ in range(2):  # from the initial rate, never from the last one
        assert set_rates(optimizer, schedule, 25, 100) == pytest.approx((0.75, 7.5))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.75, 7.5])


def test_clipping_bounds_the_total_norm_and_gives_the_norm_before():
    tensors = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    for limit, after in ((None, 5.0), (10.0, 5.0), (1.0, 1.0)):
        tensors[0].grad, tensors[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
        assert clip_gradients(iter(tensors), limit).item() == pytest.approx(5.0)
        norm = torch.cat([tensor.grad for tensor in tensors]).norm()
        assert norm.item() == pytest.approx(after, rel=1e-5)
