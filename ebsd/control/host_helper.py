"""Mount, loop and link operations, in helper processes, each with a time limit.

Each takes a helper that runs (``by``), of a caller that needs several or had it started while something else was to be
done; without one it has a process of its own. A helper that did not answer in time is not asked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ebsd.domain.ids import AccountId
from ebsd.domain.model import Volume
from ebsd.ipc.channel import Channel, Packet
from ebsd.ipc.process import helper_running, run_helper

MODULE: Final = "ebsd.volume.host"
BENCH_MODULE: Final = "ebsd.volume.bench"
DEADLINE: Final = 30.0


@dataclass(frozen=True, slots=True)
class LoopDevice:
    minor: int
    path: str


def running() -> AbstractAsyncContextManager[Channel]:
    """Start a helper for several operations, and end it."""
    return helper_running(MODULE)


async def _run(operation: str, params: dict[str, Any], by: Channel | None = None) -> Packet:
    if by is not None:
        return await by.request(operation, params, deadline=DEADLINE)
    return await run_helper(MODULE, {"method": operation, "params": params}, deadline=DEADLINE)


async def mount_fuse(path: Path, *, uid: int, gid: int, read_only: bool, by: Channel | None = None) -> int:
    """Mount FUSE on the regular file; returns the descriptor of the connection, which is the caller's."""
    packet = await _run("mount_fuse", {"path": str(path), "uid": uid, "gid": gid, "read_only": read_only}, by)
    return packet.fds[0]


async def unmount_fuse(volume: str, path: Path, *, force: bool, by: Channel | None = None) -> None:
    """Unmount the block file; raises VolumeBusy while it is open (never with ``force``)."""
    await _run("unmount_fuse", {"volume": volume, "path": str(path), "force": force}, by)


async def attach_loop(
    volume: str, path: Path, *, read_only: bool, avoid: Sequence[int], discard: bool, by: Channel | None = None
) -> LoopDevice:
    """Bind a fresh loop device to the block file; ``discard`` says whether the file's transport knows fallocate."""
    packet = await _run(
        "loop_attach",
        {"volume": volume, "path": str(path), "read_only": read_only, "avoid": list(avoid), "discard": discard},
        by,
    )
    return LoopDevice(packet.message["minor"], packet.message["device"])


async def detach_loop(volume: str, minor: int, *, force: bool, dead: bool, by: Channel | None = None) -> bool:
    """Flush and remove the loop device; raises VolumeBusy and changes nothing while it is in use.

    ``dead`` says that nobody serves the block file any more, so there is nothing to flush to. False when ``force``
    took it from somebody who still has it open: its number is to be removed, by asking again, after their close.
    """
    packet = await _run("loop_detach", {"volume": volume, "minor": minor, "force": force, "dead": dead}, by)
    return bool(packet.message["removed"])


async def show_size(volume: str, block_file: Path, minor: int | None) -> None:
    """Have the kernel look at the block file's new size, and its loop device take it over."""
    await _run("show_size", {"volume": volume, "path": str(block_file), "minor": minor})


def link_names(volume: Volume) -> list[str]:
    """Return the names below /dev/ebsd of a volume's device.

    Names of their own only for root's volumes: everybody may call a volume ``data``, and fstab must not follow
    another user's. Unencrypted volumes never appear where an encrypted one could be.
    """
    names = [str(volume.id)]
    if volume.account == AccountId("0" * 12) and volume.name != volume.id:
        names.append(volume.name)
    return names if volume.encrypted else [f"unencrypted/{name}" for name in names]


async def make_links(volume: Volume, device: str, *, by: Channel | None = None) -> None:
    await _run("make_links", {"links": link_names(volume), "device": device}, by)


async def remove_links(volume: Volume, device: str, *, by: Channel | None = None) -> None:
    await _run("remove_links", {"links": link_names(volume), "device": device}, by)


async def benchmark() -> dict[str, Any]:
    """Measure the host's cryptography; see ``volume/bench.py``."""
    return (await run_helper(BENCH_MODULE, {"method": "measure", "params": {}}, deadline=DEADLINE)).message


async def mount_tmpfs(path: Path) -> None:
    """Mount a tmpfs for live maps on the directory."""
    await _run("mount_tmpfs", {"path": str(path)})


async def unmount_tmpfs(path: Path) -> None:
    await _run("unmount_tmpfs", {"path": str(path)})
