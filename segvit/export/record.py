"""What an exported file says of itself, so that it runs alone: input, classes, readout, the order of its outputs."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from segvit import __version__
from segvit.contracts import Classes, InputSpec, ModelConfig, Readout, UserError
from segvit.nn.readout import logit_rows

Format = Literal["pt2", "onnx", "openvino"]
Precision = Literal["fp32", "bf16", "int8"]
Place = Literal["outside", "inside"]
KEY = "segvit"  # under which the record stands in the file
SUFFIXES: dict[str, Format] = {".pt2": "pt2", ".onnx": "onnx", ".xml": "openvino"}


@dataclass(frozen=True, kw_only=True)
class Record:
    """The content of an exported file's metadata.

    With the readout outside the graph gives `logits`, the `extras` that the readout reads, and `covers` (2,), the input
    area that these maps span: scores are interpolated over it and cropped to the image. With the readout inside it
    gives `scores` (B, K, H, W) and `labels` (B, H, W) at the input's size.
    """

    config: ModelConfig
    spec: InputSpec
    format: Format
    precision: Precision
    readout: Place
    extras: tuple[str, ...]  # in the order of the graph's outputs
    plain: bool  # whether the readout is only a resize of the logits
    confidence: Literal["softmax", "share", "score"]
    kept_fp32: tuple[str, ...] = ()

    @property
    def classes(self) -> Classes:
        """Names and colours in id order."""
        return self.config.classes

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the graph's outputs."""
        return ("scores", "labels") if self.readout == "inside" else ("logits", *self.extras, "covers")

    def to_text(self) -> str:
        """JSON."""
        graph = {
            "format": self.format, "precision": self.precision, "readout": self.readout, "extras": list(self.extras),
            "outputs": list(self.outputs), "plain": self.plain, "confidence": self.confidence,
            "kept_fp32": list(self.kept_fp32), "input": "images: normalised float32 (B, C, H, W), any H and W",
            "covers": "maps are interpolated over `covers`, then cropped to the input",
        }  # fmt: skip
        parts = {"config": self.config.to_json(__version__), "preprocessor": self.spec.to_json(), "graph": graph}
        return json.dumps(parts, ensure_ascii=True)

    @staticmethod
    def from_text(text: str, source: str) -> Record:
        """The inverse of `to_text`. Raises UserError for anything else."""
        try:
            parts: dict[str, Any] = json.loads(text)
            graph = parts["graph"]
            return Record(
                config=ModelConfig.from_json(parts["config"]), spec=InputSpec.from_json(parts["preprocessor"]),
                format=graph["format"], precision=graph["precision"], readout=graph["readout"],
                extras=tuple(graph["extras"]), plain=graph["plain"], confidence=graph["confidence"],
                kept_fp32=tuple(graph["kept_fp32"]),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{source} was not written by segvit export; export the model again") from error

    def find_readout(self) -> Readout:
        """How class scores are read off the graph's outputs."""
        if self.readout == "inside" or self.plain:
            return Readout(logit_rows, confidence=self.confidence)
        from segvit.zoo import find_system  # imports every system, which plain readouts need not wait for

        return replace_keeps(find_system(self.config.name).readout, self.extras)


def replace_keeps(readout: Readout, extras: tuple[str, ...]) -> Readout:
    """The same readout that keeps only what the graph gives."""
    return readout._replace(keeps=extras)


def describe(model: Any, *, format: Format, precision: Precision, readout: Place, extras: tuple[str, ...]) -> Record:
    """The record of a model that is about to be exported. Raises UserError where its readout is not the system's."""
    from segvit.zoo import find_system

    if model.readout != find_system(model.config.name).readout:
        raise UserError(f"{model.config.name} reads its scores by a threshold, which no file holds; leave that out")
    return Record(
        config=replace(model.config, adapter=None), spec=model.spec, format=format, precision=precision,
        readout=readout, extras=extras, plain=model.readout.scores is logit_rows,
        confidence=model.readout.confidence,
    )  # fmt: skip
