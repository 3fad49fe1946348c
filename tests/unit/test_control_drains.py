"""When ebsd has an attached volume drained: after what makes it worth while, in rounds, until nothing is left."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from ebsd.control.drains import ROUND_SECONDS, SETTLE_SECONDS, Drains
from ebsd.control.volume_link import Drained
from ebsd.daemon.config import load
from ebsd.domain.errors import ConfigurationError, RemoteError, VolumeNotAnswering
from ebsd.domain.ids import LineageId, VolumeId

pytestmark = pytest.mark.trio
LINEAGE = LineageId("6ba7b810-9dad-41d1-80b4-00c04fd430c8")
OTHER = LineageId("00000000-9dad-41d1-80b4-00c04fd430c8")
VOLUME = VolumeId("vol-0123456789abcdef0")


class Link:
    """A process that moves three chunks in its first pass, slowly, and none in the next."""

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.volume = VOLUME
        self.stopping = False
        self.moves = [3, 0]
        self.busy = 0
        self.error: Exception | None = None

    async def drain(self, layers: list[int]) -> None:
        self.said.append(layers)
        self.busy = 3

    async def drained(self, taken: tuple[int, ...] = ()) -> Drained:
        if self.error is not None:
            raise self.error
        self.busy = max(0, self.busy - 1)
        return Drained(self.busy > 0, 0, frozenset())


class Lineages:
    def __init__(self) -> None:
        self.on_sweep: Callable[[LineageId], None] = lambda lineage: None
        self.known: list[int] | None = [4, 7]
        self._lock = trio.Lock()

    def lock(self, lineage: LineageId) -> trio.Lock:
        return self._lock

    async def exclusive_layers(self, ident: VolumeId, lineage: LineageId) -> list[int] | None:
        assert self._lock.locked()
        return self.known

    async def take_left(self, ident: VolumeId, lineage: LineageId, link: Link) -> int:
        link.said.append("given back")
        return link.moves.pop(0) if link.moves else 0


class Rig:
    def __init__(self, nursery: trio.Nursery, *, drain: bool = True) -> None:
        self.link = Link()
        self.links = {VOLUME: self.link}
        self.lineages = Lineages()
        self.nursery = nursery
        self.row = SimpleNamespace(id=VOLUME, lineage=LINEAGE, attachment=SimpleNamespace(read_only=False))
        self.drains = Drains(
            SimpleNamespace(drain=drain), self, self.lineages, self.links, nursery,  # type: ignore[arg-type]
        )  # fmt: skip

    async def run(self, use_case: Callable[[Any], Any]) -> Any:
        return use_case(SimpleNamespace(volume=lambda ident: self.row))

    def follow(self) -> None:
        self.drains.follow(self.row, self.link)  # type: ignore[arg-type]


@pytest.fixture
async def rig(nursery: trio.Nursery) -> Rig:
    return Rig(nursery)


ROUND = [[4, 7], "given back"]


async def test_an_attachment_is_followed_by_rounds_until_nothing_is_moved(
    autojump_clock: trio.abc.Clock, rig: Rig
) -> None:
    rig.follow()
    await trio.sleep(SETTLE_SECONDS - 0.1)
    assert rig.link.said == []
    await trio.sleep(30)
    assert rig.link.said == 2 * ROUND


async def test_a_deletion_in_its_lineage_and_an_hour_begin_it_again(autojump_clock: trio.abc.Clock, rig: Rig) -> None:
    rig.follow()
    await trio.sleep(30)
    rig.link.said.clear()
    rig.lineages.on_sweep(OTHER)
    await trio.sleep(30)
    assert rig.link.said == []
    for _ in range(5):
        rig.lineages.on_sweep(LINEAGE)
    await trio.sleep(30)
    assert rig.link.said == ROUND, "five deletions are one reason"
    await trio.sleep(ROUND_SECONDS)
    assert rig.link.said == 2 * ROUND


async def test_a_deletion_in_a_round_is_not_forgotten(autojump_clock: trio.abc.Clock, rig: Rig) -> None:
    rig.follow()
    await trio.sleep(SETTLE_SECONDS + 0.1)
    assert rig.link.said == [[4, 7]]
    rig.lineages.on_sweep(LINEAGE)
    await trio.sleep(60)
    assert rig.link.said == 3 * ROUND


async def test_what_cannot_be_said_now_waits(autojump_clock: trio.abc.Clock, rig: Rig) -> None:
    rig.lineages.known = None
    rig.follow()
    await trio.sleep(60)
    assert rig.link.said == []
    rig.lineages.known = [9]
    rig.lineages.on_sweep(LINEAGE)
    await trio.sleep(60)
    assert rig.link.said[0] == [9]


async def test_it_ends_with_the_process(autojump_clock: trio.abc.Clock, rig: Rig, nursery: trio.Nursery) -> None:
    rig.follow()
    await trio.sleep(30)
    old, rig.link = rig.link, Link()
    rig.links[VOLUME] = rig.link
    rig.follow()
    old.said.clear()
    await trio.sleep(30)
    assert (old.said, rig.link.said) == ([], 2 * ROUND)
    del rig.links[VOLUME]
    rig.lineages.on_sweep(LINEAGE)
    await trio.sleep(30)
    assert len(nursery.child_tasks) == 0
    assert await rig.drains.collect(VOLUME) == 0
    assert not await rig.drains.begin(VOLUME)


async def test_a_process_that_does_not_answer_is_asked_again_later(
    autojump_clock: trio.abc.Clock, rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.link.error = VolumeNotAnswering(volume=VOLUME, reason="it stands still")
    rig.follow()
    await trio.sleep(30)
    assert rig.link.said == []
    assert "it stands still" in caplog.text
    rig.link.error = None
    rig.lineages.on_sweep(LINEAGE)
    await trio.sleep(30)
    assert rig.link.said == 2 * ROUND


async def test_a_process_of_an_earlier_version_is_left_alone(
    autojump_clock: trio.abc.Clock, rig: Rig, nursery: trio.Nursery
) -> None:
    rig.link.error = RemoteError("UnsupportedOperation", "the request drained is not supported.")
    rig.follow()
    await trio.sleep(30)
    assert len(nursery.child_tasks) == 0


async def test_read_only_attachments_and_a_configuration_without_it_have_none(
    autojump_clock: trio.abc.Clock, nursery: trio.Nursery
) -> None:
    Rig(nursery, drain=False).follow()
    rig = Rig(nursery)
    rig.row.attachment.read_only = True
    rig.follow()
    assert len(nursery.child_tasks) == 0


@pytest.mark.parametrize(("text", "expected"), [("", True), ("drain = true", True), ("drain = false", False)])
async def test_it_can_be_switched_off(tmp_path: Path, text: str, expected: bool) -> None:
    file = tmp_path / "ebsd.toml"
    file.write_text(f"[space]\n{text}\n")
    environment = {"HOME": str(tmp_path)}
    config = load(file=file, state_dir=tmp_path, runtime_dir=tmp_path, uid=1000, environment=environment)
    assert config.drain is expected
    file.write_text('[space]\ndrain = "sometimes"\n')
    with pytest.raises(ConfigurationError, match="drain"):
        load(file=file, state_dir=tmp_path, runtime_dir=tmp_path, uid=1000, environment=environment)
