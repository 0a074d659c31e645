"""Time and memory of image -> label map, part by part, beside the machine's own matrix rate and the plain readout.

    python benchmarks/inference.py                                    # ViT-B/16, 512 x 512, 150 classes
    python benchmarks/inference.py --size 2048                        # peak memory at 2048 x 2048
    python benchmarks/inference.py --model segmenter_vit_base --json
    python benchmarks/inference.py --model ddrnet_23_slim             # 720 x 960, 11 classes: plain and folded in turns

The plain readout makes all class scores at full size at once, as the original does; it runs in the same process, after
ours, and its labels are compared with ours. Of DDRNet it is the network with folded BatchNorm that is compared with the
plain one.
"""

from __future__ import annotations

import argparse
import copy
import json

import numpy as np
import torch

from segvit.bench.bench import Ready
from segvit.bench.measure import in_turns, matrix_product, matrix_rate, medians, peak_memory
from segvit.contracts import Dense, InputSpec, Readout, Size
from segvit.inference.predictor import Predictor
from segvit.nn.flops import count_gflops
from segvit.systems.ddrnet import fold_batch_norm
from segvit.zoo import create_model


def plain_readout(readout: Readout, out: Dense, side: int) -> torch.Tensor:
    """All scores at once, then the arg max."""
    return readout(out, (side, side), range(side))[0].argmax(0)


@torch.inference_mode()
def measure(name: str, side: int, classes: int, runs: int) -> dict[str, float | str | int]:
    torch.manual_seed(0)
    model = create_model(name, num_classes=classes, spec=InputSpec(), image_size=min(side, 512)).eval()
    image = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    predictor = Predictor(model)
    pixels = torch.randn(1, 3, side, side)
    out = predictor.run.readout.trim(model(pixels))
    labels = {}
    reader = Predictor(Ready(predictor.run, out))
    spent = in_turns(
        {
            "matrix": matrix_product(),
            "backbone": lambda: model.backbone(pixels),
            "network": lambda: model(pixels),
            "whole": lambda: predictor.segment(image),
            "readout": lambda: reader.segment(image),
            "plain_readout": lambda: labels.update(plain=plain_readout(model.readout, out, side)),
        },
        runs,
    )
    seconds = medians(spent)
    report: dict[str, float | str | int] = {
        "model": name, "side": side, "classes": classes, "threads": torch.get_num_threads(),
        "parameters_m": sum(p.numel() for p in model.parameters()) / 1e6,
        "gflops": count_gflops(model, (side, side)),
        "matrix_gflop_per_s": 2 * matrix_rate(seconds["matrix"]),  # a multiply-add is two, here
        **{f"{part}_s": value for part, value in seconds.items() if part != "matrix"},
        "peak_mb": peak_memory(lambda: predictor.segment(image)),
        "plain_readout_peak_mb": peak_memory(lambda: plain_readout(model.readout, out, side)),
    }  # fmt: skip
    ready = reader.segment(image)[0]
    report["labels_equal"] = float((torch.from_numpy(ready) == labels["plain"]).float().mean())
    report["decoder_s"] = seconds["network"] - seconds["backbone"]
    report["readout_share"] = seconds["readout"] / seconds["whole"]
    # 1 = as fast as one large matrix product. Of the network's work: how scores are read is our choice.
    ideal = count_gflops(model, (side, side), readout=False) / matrix_rate(seconds["matrix"])
    report["share_of_matrix_rate"] = ideal / seconds["whole"]
    return report


@torch.inference_mode()
def measure_folding(name: str, size: Size, classes: int, runs: int) -> dict[str, float | str | int]:
    """A DDRNet as it was trained beside the same with folded BatchNorm: seconds of the network, and equal labels."""
    torch.manual_seed(0)
    plain = create_model(name, num_classes=classes).eval()
    for norm in plain.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):  # those of a new network do nothing
            for scale in (norm.weight, norm.running_var):
                scale.uniform_(0.5, 1.5)
            for shift in (norm.bias, norm.running_mean):
                shift.normal_(std=0.3)
    folded = fold_batch_norm(copy.deepcopy(plain))
    pixels = torch.randn(1, 3, *size)
    seconds = medians(in_turns({"plain": lambda: plain(pixels), "folded": lambda: folded(pixels)}, runs))
    labels = [plain.readout(network(pixels), size, range(size[0]))[0].argmax(0) for network in (plain, folded)]
    return {
        "model": name, "height": size[0], "width": size[1], "classes": classes, "threads": torch.get_num_threads(),
        "parameters_m": sum(p.numel() for p in folded.parameters()) / 1e6,
        "gflops": count_gflops(plain, size),
        **{f"{part}_s": value for part, value in seconds.items()},
        "folded_speed": seconds["plain"] / seconds["folded"],  # 1.3 = 1.3 times as fast as the plain network
        "labels_equal": float((labels[0] == labels[1]).double().mean()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="segvit_vit_base")
    parser.add_argument("--size", type=int, help="side of the image; 512, or 720 x 960 for DDRNet")
    parser.add_argument("--classes", type=int, help="150, or 11 for DDRNet")
    parser.add_argument("--runs", type=int, help="3, or 7 for DDRNet")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    side, classes, runs = arguments.size, arguments.classes, arguments.runs
    if arguments.model.startswith("ddrnet"):
        report = measure_folding(arguments.model, (side, side) if side else (720, 960), classes or 11, runs or 7)
    else:
        report = measure(arguments.model, side or 512, classes or 150, runs or 3)
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    for key, value in report.items():
        print(f"{key:24} {value:.4g}" if isinstance(value, float) else f"{key:24} {value}")


if __name__ == "__main__":
    main()
