"""Optional packages of export: found only when used, and none of them reports what its user does."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

from segvit.contracts import UserError

TELEMETRY = "openvino_telemetry"


def need(module: str) -> Any:
    """An optional package by name. Raises UserError that names the remedy where it is not installed."""
    silence()
    try:
        package = import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed; pip install 'segvit[export]'") from error
    if module == "onnxruntime":
        package.disable_telemetry_events()  # its builds for Windows send some
    return package


def silence() -> None:
    """Make the telemetry package of OpenVINO and NNCF impossible to import.

    Both then use stubs of their own that send nothing. Their documented opt-out is a file in the user's home whose
    writing is itself reported; this touches no file and sends nothing.
    """
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]  # what Python documents for a blocked import
