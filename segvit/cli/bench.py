"""What a model costs, and what others cost on the same machine, at the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from segvit.cli.parsing import show, sides
from segvit.contracts import UserError

Rival = Literal["eomt", "mask2former", "segformer", "upernet", "smp_unet", "timm_linear"]
Engine = Literal["torch", "compile", "onnxruntime", "openvino"]
Precision = Literal["fp32", "bf16", "fp16", "int8"]


def bench(
    model: str, *, size: tuple[int, ...] = (512,), batches: tuple[int, ...] = (1, 2, 4), repeats: int = 5,
    against: tuple[Rival, ...] = (), num_classes: int = 150, engine: Engine | None = None,
    precision: Precision = "fp32", device: str | None = None, threads: int | None = None, out: str | None = None,
    json: bool = False,
) -> None:  # fmt: skip
    """Parameters, GFLOPs, latency by part, throughput and memory, also beside other libraries' networks.

    Images have the size that is asked for, whatever size or windows the model was made for. Rivals run on eager torch
    in fp32.

    Args:
        model: Run or model folder, an exported file, or a model's name, which is then measured with random weights.
        size: Side of the image, or height and width.
        batches: Batch sizes whose throughput is measured.
        repeats: Rounds, in which everything is timed once; the median counts.
        against: Networks of other libraries, with random weights, timed in the same rounds.
        num_classes: Classes of a model given by its name.
        engine: As for predict.
        precision: Of the network.
        device: Where all of them run; None = the GPU where there is one.
        threads: Of torch; None = as many as it takes by itself.
        out: Folder for bench.json, bench.md and index.html; None = nothing is written.
        json: Print JSON instead of tables.
    """
    import torch

    from segvit.bench.bench import Options, plain, run_bench
    from segvit.bench.report import write_bench
    from segvit.export.engines import on_engine
    from segvit.export.runtimes import is_exported, open_exported
    from segvit.tasks.console import aligned
    from segvit.tasks.sources import default_device

    if is_exported(model) and (engine, precision, device) != (None, "fp32", None):
        raise UserError(f"{model} runs as it was exported, on the CPU; leave out --engine, --precision and --device")
    height, width = sides("size", size) or (512, 512)
    options = Options(
        size=(height, width), batches=tuple(batches), repeats=repeats, against=tuple(against), num_classes=num_classes,
        device="cpu" if is_exported(model) else device or default_device(),
    )  # fmt: skip
    if threads is not None:
        torch.set_num_threads(threads)
    if is_exported(model):
        exported = open_exported(model)
        found = run_bench(model, options, exported=exported)
        found.facts.update(format=exported.record.format, precision=exported.record.precision)
    else:
        found = run_bench(model, options, lambda network: on_engine(network, model, engine=engine, precision=precision))
        found.facts.update(engine=engine or "torch", precision=precision)
    if out is not None:
        write_bench(Path(out), found)
    show(found.to_json(), json, plain(found, aligned))
