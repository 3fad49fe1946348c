"""What the daemon knows of its host and installation, gathered once at start and passed in everywhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ebsd.control.space import Space


@dataclass(frozen=True, slots=True)
class RuntimeLayout:
    """Paths below RUNTIME; the only place that knows them."""

    root: Path
    live: Path
    """A directory on tmpfs: RUNTIME/live, or below /dev/shm when ebsd does not run as root."""

    @property
    def users_socket(self) -> Path:
        return self.root / "ebsd.sock"

    @property
    def keys_socket(self) -> Path:
        return self.root / "keys.sock"

    @property
    def broker_socket(self) -> Path:
        return self.root / "kms.sock"

    def block_file(self, volume: str) -> Path:
        return self.root / "volumes" / volume

    def control_socket(self, volume: str) -> Path:
        return self.root / "control" / f"{volume}.sock"


@dataclass(frozen=True, slots=True)
class Host:
    """Facts and sources of facts. Time and chance come in here, so that use cases can be tested."""

    runtime: RuntimeLayout
    boot_id: str
    instance: str
    admin_uid: int
    """The uid the daemon runs as; it and uid 0 administer."""
    allow_unencrypted: bool
    drain: bool
    """Attached volumes move what little they have in old layers of their own, so that those can go."""
    space: Space
    now: Callable[[], str]
    """RFC 3339 UTC, whole seconds."""
    random: Callable[[int], bytes]
    clock_is_even: Callable[[], bool]
    """Whether ``now`` may be trusted with what cannot be undone (``domain.clockwatch``)."""
    transport: str = "native"
    """What serves the block file of a volume that is attached from now on: ``native`` or ``pyfuse3``."""
    engine_deaths: int = 5
    """How often within a minute the engine of a volume may die and be replaced."""
    job_rate: int = 0
    """Bytes per second at most for a job that has no limit of its own; 0: none."""

    @property
    def is_root(self) -> bool:
        return self.admin_uid == 0
