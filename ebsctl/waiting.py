"""Waiting until ebsd serves, where a command made it start anew inside."""

from __future__ import annotations

import contextlib
import time
from typing import Final

from ebsctl.app import App
from ebsd.domain.errors import EbsdError, Timeout

PATIENCE: Final = 60.0
"""Seconds in which ebsd must be there again."""


def wait_until_running(app: App, operation: str) -> None:
    """Wait until ebsd is in the state ``running``; raises Timeout, which names the operation."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(EbsdError):
            if app.impatient_client(PATIENCE).control("GetStatus")["State"] == "running":
                return
        time.sleep(0.1)
    raise Timeout(operation=operation, seconds=f"{PATIENCE:g}")
