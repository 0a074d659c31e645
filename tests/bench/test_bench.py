"""What `segvit bench` says: every figure from a measurement, rivals beside ours, and pages that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from segvit.bench.bench import Options, markdown, run_bench
from segvit.bench.measure import in_turns, matrix_rate, medians, peak_memory, processor
from segvit.bench.report import write_bench
from segvit.bench.rivals import RIVALS, build_rival
from segvit.cli import main
from segvit.contracts import InputSpec, UserError
from segvit.inference.predictor import TorchRuntime
from segvit.model_folder import load_model, save_model
from segvit.nn.flops import count_gflops
from segvit.zoo import create_model

TINY = {
    "image_size": 64, "patch_size": 16, "depth": 2, "embed_dim": 64, "out_indices": [0, 1], "layers": 1,
    "drop_path": 0.0, "dropout": 0.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    save_model(create_model("segvit_vit_tiny", num_classes=5, spec=InputSpec(), **TINY), path)
    return str(path)


def test_parts_are_timed_in_turns() -> None:
    order: list[str] = []
    seconds = in_turns({name: lambda name=name: order.append(name) for name in "ab"}, 3)
    assert order == ["a", "b"] * 4  # the first round is not counted
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    assert medians({"a": [3.0, 1.0, 2.0]}) == {"a": 2.0}


def test_memory_is_what_was_held_at_most() -> None:
    def hold() -> None:
        large = torch.ones(40_000_000)  # 160 MB
        large.add_(1)

    assert 120 < peak_memory(hold) < 400
    assert peak_memory(lambda: None) < 60


def test_a_model_is_measured_whole_and_in_parts(folder: str) -> None:
    found = run_bench(folder, Options(size=(64, 96), batches=(1, 2), repeats=2))
    model = create_model("segvit_vit_tiny", num_classes=5, **TINY)
    assert found.rows[0].parameters == sum(p.numel() for p in model.parameters())
    assert {"prepare", "backbone", "decoder", "network", "readout"} == set(found.parts)
    assert min(found.parts["backbone"], found.parts["network"], found.parts["readout"]) > 0
    assert set(found.throughput) == {1, 2}
    assert found.share is not None
    assert 0 < found.share < 2
    assert found.gflops == pytest.approx(count_gflops(model, (64, 96)))
    assert 0.5 * found.gflops < found.network_gflops < found.gflops
    assert found.facts["classes"] == "5"
    assert processor() == found.facts["machine"]
    text = markdown(found)
    assert "64 x 96" in text
    assert f"{1e3 * found.rows[0].seconds:.1f} ms" in text


def test_the_size_that_is_asked_for_is_measured(folder: str, tmp_path: Path) -> None:
    """Whatever size or windows a model was made for; and in bf16 no part is timed that fp32 would do."""
    model = create_model("segvit_vit_tiny", num_classes=5, **TINY)
    model.spec = InputSpec(exact=(32, 32), window=(32, 32), stride=(16, 16))
    save_model(model, tmp_path / "model")
    seen = []

    def start(network: Any) -> TorchRuntime:
        run = TorchRuntime(network, precision="bf16")
        network.register_forward_pre_hook(lambda module, inputs: seen.append(tuple(inputs[0].shape[-2:])))
        return run

    found = run_bench(str(tmp_path / "model"), Options(size=(64, 96), batches=(1,), repeats=1), start)
    assert set(seen) == {(64, 96)}
    assert set(found.parts) == {"prepare", "network", "readout"}


def test_an_exported_file_is_measured_as_it_is(folder: str) -> None:
    """By what runs it; there is no model to count, and no engine to choose."""
    model = load_model(folder)
    model.spec = InputSpec(exact=(32, 32))
    found = run_bench("a.onnx", Options(size=(64, 64), batches=(1,), repeats=1), exported=TorchRuntime(model))
    assert (found.gflops, found.share, found.rows[0].parameters) == (None, None, None)
    assert found.rows[0].seconds > 0
    assert "| a.onnx | - |" in markdown(found)
    with pytest.raises(SystemExit) as stopped:
        main(["bench", "a.onnx", "--engine", "compile"])
    assert stopped.value.code == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", RIVALS)
def test_rivals_make_label_maps(name: str) -> None:
    rival = build_rival(name, 11, (128, 128))
    with torch.inference_mode():
        labels = rival.labels(torch.randn(1, 3, 128, 128))
    assert labels.shape == (128, 128)
    assert int(labels.max()) < 11


def test_a_rival_stands_beside_ours(folder: str, tmp_path: Path) -> None:
    found = run_bench(folder, Options(size=(64, 64), batches=(1,), repeats=1, against=("timm_linear",)))
    assert [row.name for row in found.rows] == [folder, "timm_linear"]
    assert found.rows[1].parameters > 80e6
    assert found.to_json()["networks"][1]["times_ours"] > 1
    write_bench(tmp_path, found)
    assert json.loads((tmp_path / "bench.json").read_text())["networks"][1]["name"] == "timm_linear"
    page = (tmp_path / "index.html").read_text()
    assert "ViT-B/16 and a linear layer (timm)" in page
    assert page.count("<circle") == 2


def test_the_command_measures_an_engine(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    main(["bench", folder, "--size", "64", "--batches", "1", "--repeats", "1", "--json", "--out", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert (found["engine"], found["precision"]) == ("torch", "fp32")
    assert found["networks"][0]["name"] == folder
    assert json.loads((tmp_path / "bench.json").read_text()) == found


def test_the_rate_counts_a_multiply_add_once() -> None:
    assert matrix_rate(1.0) == pytest.approx(8.59, abs=0.01)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"repeats": 0}, "1 or more"), ({"size": (0, 4)}, "1 or more"), ({"batches": (0,)}, "1 or more")],
)
def test_wrong_options(change: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Options(**{"size": (64, 64)} | change)


def test_unknown_rivals_and_tasks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="choose from eomt"):
        build_rival("best", 5, (64, 64))
    with pytest.raises(UserError, match="eomt takes square images"):
        build_rival("eomt", 5, (64, 96))
    options = {name: TINY[name] for name in ("image_size", "patch_size", "depth", "embed_dim")}
    save_model(create_model("classifier_vit_tiny", num_classes=5, spec=InputSpec(), **options), tmp_path)
    with pytest.raises(UserError, match="its task is classify"):
        run_bench(str(tmp_path), Options(size=(64, 64)))
