"""Every system of the catalogue becomes a graph for any number and size of images, or says why not."""

from __future__ import annotations

import pytest
import torch

from segvit.contracts import UserError
from segvit.export.build import Plan, export_model
from segvit.export.exportable import why_not
from segvit.export.formats import to_onnx
from segvit.export.graph import Graph, kept_extras, trace
from segvit.export.record import describe
from segvit.export.runtimes import runnable
from segvit.zoo import MODELS
from tests.systems.test_contract import FAMILIES, KINDS, family, tiny

QUICK = ("segmenter_linear_vit_base",)
OTHERS = ["semantic_fpn", "fcn", "unet_plus_plus", "fpn", "deeplabv3_plus", "upernet"]
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in [*KINDS, *OTHERS]]


@pytest.mark.parametrize("name", NAMES)
def test_every_system_becomes_a_graph_or_says_why_not(name: str) -> None:
    model, side = tiny(name), max(64, family(name).side)
    if why_not(name, model.config.options) is not None:
        with pytest.raises(UserError, match="is not exported"):
            export_model(model, "never.pt2", Plan(format="pt2"))
        return
    graph, module = Graph(model, inside=False), runnable(trace(model, inside=False))
    with torch.no_grad():
        for shape in ((1, 3, side, side), (3, 3, side + 5, side + 17)):
            images = torch.randn(shape)
            for ours, theirs in zip(graph(images), module(images), strict=True):
                torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_the_ranges_that_the_tracer_assumes_do_not_bind() -> None:
    """In bf16 DDRNet's graph says that images are wider than 256 pixels, which nothing in it needs."""
    model = tiny("ddrnet_23_slim")
    module = runnable(trace(model, inside=False, bf16=True))
    images = torch.randn(1, 3, 96, 80)
    with torch.no_grad():
        expected = Graph(model, inside=False, bf16=True)(images)
        torch.testing.assert_close(module(images), list(expected), rtol=0.05, atol=0.05)


@pytest.mark.slow
def test_convolutions_keep_their_names_when_norms_are_folded() -> None:
    """`keep_fp32` finds layers by them."""
    model = tiny("ddrnet_23_slim")
    record = describe(model, format="onnx", precision="fp32", readout="outside", extras=kept_extras(model))
    graph = to_onnx(trace(model, inside=False), record).graph
    found = {node.name.partition("/")[0] for node in graph.node if node.op_type == "Conv"}
    layers = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)}
    assert found == {name for name in layers if not name.startswith("seghead_extra.")}  # which trains only


def test_the_list_above_stands_for_every_model() -> None:
    """A model shares all that matters for a graph with a tested one: the options that make it tiny, or its family."""
    tested = {max((key for key in FAMILIES if name.startswith(key)), key=len) for name in [*KINDS, *OTHERS]}
    families = {max((key for key in FAMILIES if name.startswith(key)), key=len) for name in MODELS}
    assert families - tested <= {"rsseg_pyramid", "deeplabv3"}  # each a tested backbone with a tested head


def test_reasons_are_told() -> None:
    assert "regions=false" in str(why_not("zsseg_resnet50", {}))
    assert why_not("zsseg_resnet50", {"regions": False}) is None
    assert "groups" in str(why_not("ftn_tiny", {}))
    assert why_not("segvit_vit_base", {}) is None
