"""int8 by post-training quantisation, calibrated on the user's own images (NNCF)."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from torch import Tensor

from segvit.contracts import UserError
from segvit.export.graph import quiet
from segvit.export.packages import need
from segvit.export.record import Format


def quantise(
    model: Any, images: Sequence[Tensor], *, format: Format, transformer: bool, keep_fp32: Sequence[str] = ()
) -> Any:
    """An OpenVINO or ONNX model with int8 matrix products and convolutions, except in what `keep_fp32` names.

    `images` are prepared, (C, H, W). `transformer` leaves what attention needs between its products in fp32. Raises
    UserError without images.
    """
    if not images:
        raise UserError("int8 is calibrated on images; give --data DATA")
    nncf = need("nncf")
    nncf.set_log_level(40)  # logging.ERROR
    batches = [image[None].numpy() for image in images]
    data = nncf.Dataset(batches, (lambda batch: {"images": batch}) if format == "onnx" else None)
    patterns = [rf"{re.escape(name)}([.].*)?/.*" for name in keep_fp32]
    ignored = nncf.IgnoredScope(patterns=patterns, validate=False) if patterns else None
    kind = nncf.ModelType.TRANSFORMER if transformer else None
    with quiet(), redirect_stdout(sys.stderr):  # its progress bars are no results
        return nncf.quantize(model, data, subset_size=len(batches), model_type=kind, ignored_scope=ignored)
