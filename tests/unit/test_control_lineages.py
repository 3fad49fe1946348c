"""Lineages: nothing of one is given back while it is read, and what was put off is done afterwards."""

from __future__ import annotations

from typing import Any

import pytest

from ebsd.control.lineages import Lineages
from ebsd.domain.ids import LineageId

pytestmark = pytest.mark.trio
LINEAGE = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
OTHER = LineageId("00000000-9dad-41d1-80b4-00c04fd430c8")


class Sweeps(Lineages):
    """Counts the sweeps that were not put off."""

    def __init__(self) -> None:
        super().__init__(None, None, {})  # type: ignore[arg-type]
        self.swept: list[LineageId] = []

    async def _refuse_doubtful(self, lineage: LineageId, *args: Any) -> None:
        self.swept.append(lineage)
        raise OSError("no further")


@pytest.mark.parametrize("how", ["sweep", "sweep_whole"])
async def test_a_lineage_that_is_read_is_swept_when_the_last_reader_has_ended(how: str) -> None:
    lineages = Sweeps()
    sweep = getattr(lineages, how)
    with lineages.reading(LINEAGE):
        with lineages.reading(LINEAGE):
            await sweep(LINEAGE)
            await sweep(OTHER)
        await lineages.catch_up(LINEAGE)
        assert lineages.swept == [OTHER]
    await lineages.catch_up(LINEAGE)
    assert lineages.swept == [OTHER, LINEAGE]
    await lineages.catch_up(LINEAGE)
    assert lineages.swept == [OTHER, LINEAGE], "nothing was put off since"
    await sweep(LINEAGE)
    assert lineages.swept == [OTHER, LINEAGE, LINEAGE]


async def test_a_reader_that_fails_reads_no_more() -> None:
    lineages = Sweeps()
    with pytest.raises(ValueError, match="broken"), lineages.reading(LINEAGE):
        raise ValueError("broken")
    await lineages.sweep(LINEAGE)
    assert lineages.swept == [LINEAGE]
