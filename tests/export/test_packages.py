"""No telemetry: what OpenVINO and NNCF would send is switched off before they are imported."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from unittest.mock import MagicMock

import pytest

from segvit.export.packages import TELEMETRY, need

ALONE = """
import sys
from segvit.export.packages import need
need("openvino"), need("nncf")
from nncf.telemetry.wrapper import NNCFTelemetry, telemetry
from openvino.tools.ovc import telemetry_utils
assert not isinstance(telemetry, NNCFTelemetry), telemetry
assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub", telemetry_utils.tm
assert not [name for name in sys.modules if name.startswith("openvino_telemetry") and sys.modules[name]]
"""


def test_the_telemetry_package_cannot_be_imported_once_an_engine_is_used() -> None:
    need("openvino")
    with pytest.raises(ImportError):
        import_module(TELEMETRY)
    utils = import_module("openvino.tools.ovc.telemetry_utils")
    assert utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
    wrapper = import_module("nncf.telemetry.wrapper")
    assert wrapper.telemetry is MagicMock or not isinstance(wrapper.telemetry, wrapper.NNCFTelemetry)


@pytest.mark.slow
def test_no_telemetry_object_is_active_outside_of_tests() -> None:
    # NNCF switches itself off where it sees pytest, so only a process of its own can tell.
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
