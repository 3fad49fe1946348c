"""The table that a module of crash tests prints at its end, one line for each operation."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


def printed_table(request: pytest.FixtureRequest, header: str, *, loud: bool) -> Iterator[list[str]]:
    """The body of a module's fixture: give a list for the lines, then print them; ``loud``: captured or not."""
    lines = [header]
    yield lines
    capture = request.config.pluginmanager.getplugin("capturemanager")
    if loud and capture is not None:
        with capture.global_and_fixture_disabled():
            print("\n" + "\n".join(lines))
    else:
        print("\n" + "\n".join(lines))
