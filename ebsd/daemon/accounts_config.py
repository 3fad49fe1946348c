"""``[accounts]``: what accounts may have, as the configuration file says it, checked.

Names of users and groups are looked up once, at the start: a request waits for no directory service.
"""

from __future__ import annotations

import grp
import pwd
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from ebsd.domain.errors import ConfigurationError, InvalidSize
from ebsd.domain.limits import AccountLimits, Counted
from ebsd.domain.units import parse_size
from ebsd.ipc.peer import NO_UID


class LimitsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[accounts.users.NAME]``; what is left out is as for everybody."""

    volumes: int | None = None
    volume_bytes: str | int | None = None
    """Sizes of all volumes together: ``"100G"`` or bytes."""
    snapshots: int | None = None
    jobs: int | None = None
    """Copies, restores and the like at once."""


class AccountsConfig(LimitsConfig, frozen=True, forbid_unknown_fields=True):
    """``[accounts]``: for everybody; administrators have no limits."""

    create: list[str | int] | None = None
    """Who may make volumes and snapshots: user names, uids, and ``@group``; left out: everybody."""
    users: dict[str, LimitsConfig] = {}


def account_limits(file: Path, accounts: AccountsConfig, admin_uid: int) -> AccountLimits:
    """Return the limits of accounts; raises ConfigurationError for a user, group or number that is none."""
    return AccountLimits(
        everybody=_limits(file, "accounts", accounts),
        users={
            _uid(file, f"accounts.users.{name}", name): _limits(file, f"accounts.users.{name}", limits)
            for name, limits in accounts.users.items()
        },
        creators=None if accounts.create is None else frozenset(_uids(file, accounts.create)),
        administrators=frozenset({0, admin_uid}),
    )


def _limits(file: Path, table: str, limits: LimitsConfig) -> dict[Counted, int]:
    found = {}
    for counted in Counted:
        value = getattr(limits, counted.value)
        if value is None:
            continue
        try:
            number = parse_size(value) if isinstance(value, str) else value
        except InvalidSize as exc:
            raise ConfigurationError(file=file, reason=f"{table}.{counted.value}: {exc.message}") from exc
        if number < 0:
            raise ConfigurationError(file=file, reason=f"{table}.{counted.value}: it is a number from 0")
        found[counted] = number
    return found


def _uids(file: Path, names: Sequence[str | int]) -> Iterator[int]:
    for name in names:
        if isinstance(name, str) and name.startswith("@"):
            yield from _members(file, name[1:])
        else:
            yield _uid(file, "accounts.create", name)


def _uid(file: Path, where: str, user: str | int) -> int:
    try:
        if isinstance(user, str) and not user.isdecimal():
            return pwd.getpwnam(user).pw_uid
    except KeyError:
        raise ConfigurationError(file=file, reason=f"{where}: no user of this host is called {user!r}") from None
    uid = int(user)
    if not 0 <= uid < NO_UID:
        raise ConfigurationError(file=file, reason=f"{where}: {user!r} is no uid")
    return uid


def _members(file: Path, name: str) -> Iterator[int]:
    """Yield the uids of a group's members, those whose first group it is included."""
    try:
        group = grp.getgrnam(name)
    except KeyError:
        reason = f"accounts.create: no group of this host is called {name!r}"
        raise ConfigurationError(file=file, reason=reason) from None
    for user in group.gr_mem:
        yield _uid(file, f"accounts.create: the group {name}", user)
    for entry in pwd.getpwall():
        if entry.pw_gid == group.gr_gid:
            yield entry.pw_uid
