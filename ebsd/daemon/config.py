"""The configuration file and the places it may name: TOML in, one frozen value out.

Order of precedence: command line, environment (EBSD_STATE_DIR, EBSD_RUNTIME_DIR), file, built-in default. A key
that is not known is refused: a misspelt security setting must not be silently absent.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from ebsd.daemon.accounts_config import AccountsConfig, account_limits
from ebsd.daemon.aws_config import AwsKeyService, aws_parameters
from ebsd.domain.errors import ConfigurationError, InvalidParameterValue, InvalidSize
from ebsd.domain.jobs import check_rate
from ebsd.domain.limits import AccountLimits
from ebsd.domain.space import MAX_FULL_WAIT
from ebsd.domain.units import parse_size

_KMS: Final = "ebsd-kms"


class LocalKeyService(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[key_service.local]``."""

    root_key: str = ""
    """Path of the root key file, ``credential:NAME`` for a systemd credential, or ``passphrase``."""
    service: bool = False
    """The key service is a service of its own (``ebsd-kms``), which ebsd neither starts nor ends."""
    state_dir: str = ""


class KeyServiceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[key_service]``."""

    default: Literal["local", "aws"] = "local"
    """Where alias/aws/ebs is; any other key is found by its name."""
    local: LocalKeyService = LocalKeyService()
    aws: AwsKeyService | None = None


class SpaceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[space]``; what is left out follows from the size of the file system (``domain/space.py``)."""

    reserve: str | int | None = None
    """Free space that volumes leave alone: ``"1G"`` or bytes."""
    ballast: str | int | None = None
    """Space set aside for deletions on a full disk: ``"256M"`` or bytes."""
    full_wait: float | None = None
    """Seconds for which a write waits for space before it fails with ENOSPC; 0 fails it at once."""
    drain: bool = True
    """Move what attached volumes have left in old layers, so that the layers can go."""


class JobsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``[jobs]``."""

    rate: str | int = 0
    """Bytes per second at most for a job that has no limit of its own: ``"50M"`` or bytes; 0 for none."""


class FileConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that may stand in ebsd.toml."""

    state_dir: str = ""
    runtime_dir: str = ""
    allow_unencrypted: bool = False
    transport: Literal["native", "pyfuse3"] = "native"
    """What serves the block file of a volume that is attached from now on."""
    engine_deaths: Annotated[int, msgspec.Meta(ge=0)] = 5
    """How often within a minute the process that serves a volume may die and be replaced."""
    key_service: KeyServiceConfig = KeyServiceConfig()
    space: SpaceConfig = SpaceConfig()
    accounts: AccountsConfig = AccountsConfig()
    jobs: JobsConfig = JobsConfig()


@dataclass(frozen=True, slots=True)
class Config:
    """The settings in force."""

    file: Path | None
    state_dir: Path
    runtime_dir: Path
    kms_state_dir: Path
    kms_is_service: bool
    """ebsd neither starts nor ends the key service, and has no part in its directory."""
    root_key: Mapping[str, str]
    """``{"kind": "file", "path": ...}``, ``{"kind": "credential", "name": ..., "directory": ...}`` or
    ``{"kind": "passphrase"}``. The directory of a credential is empty where the key service is a service of its own."""
    root_key_beside_data: bool
    """The root key lies below the state directory it protects: whoever copies that directory can read everything."""
    allow_unencrypted: bool
    transport: str
    space_reserve: int | None
    """Bytes; None: the default for the file system."""
    space_ballast: int | None
    full_wait: float | None
    """Seconds."""
    drain: bool
    engine_deaths: int
    """Within a minute; one more, and the volume is given up."""
    job_rate: int
    """Bytes per second; 0: no limit."""
    limits: AccountLimits = field(default_factory=AccountLimits)
    """What accounts may have."""
    aws: Mapping[str, Any] | None = field(default=None, repr=False)
    """What the broker is told of AWS, credentials of the environment included; None: not configured."""


def load(
    *,
    file: Path | None,
    state_dir: Path | None,
    runtime_dir: Path | None,
    uid: int,
    environment: Mapping[str, str],
) -> Config:
    """Return the settings in force; raises ConfigurationError naming the file and what is wrong in it."""
    path = file if file is not None else _default_file(uid, environment)
    settings = _read(path, must_exist=file is not None)
    own_state = state_dir or _path(environment.get("EBSD_STATE_DIR")) or _path(settings.state_dir)
    state = own_state or _default_state(uid, environment)
    runtime = (
        runtime_dir
        or _path(environment.get("EBSD_RUNTIME_DIR"))
        or _path(settings.runtime_dir)
        or _default_runtime(uid, environment)
    )
    local = settings.key_service.local
    # Named alone, a state directory holds all there is: for trials and tests, which want to leave nothing elsewhere.
    # A key service with a user of its own could not enter it.
    lone_state = own_state if not local.service else None
    kms_state = _path(local.state_dir) or (lone_state / "kms" if lone_state else _default_state(uid, environment, _KMS))
    root_key = _root_key(local, lone_state, uid, environment)
    return Config(
        file=path if path.exists() else None,
        state_dir=state.resolve(),
        runtime_dir=runtime.resolve(),
        kms_state_dir=kms_state.resolve(),
        kms_is_service=local.service,
        root_key=root_key,
        root_key_beside_data=root_key["kind"] == "file"
        and Path(root_key["path"]).resolve().is_relative_to(state.resolve()),
        allow_unencrypted=settings.allow_unencrypted,
        transport=settings.transport,
        space_reserve=_size(path, "space.reserve", settings.space.reserve),
        space_ballast=_size(path, "space.ballast", settings.space.ballast),
        full_wait=_seconds(path, "space.full_wait", settings.space.full_wait),
        drain=settings.space.drain,
        engine_deaths=settings.engine_deaths,
        job_rate=_rate(path, settings.jobs.rate),
        limits=account_limits(path, settings.accounts, uid),
        aws=aws_parameters(path, settings.key_service.aws, settings.key_service.default, environment),
    )


def _size(file: Path, name: str, value: str | int | None) -> int | None:
    if value is None:
        return None
    try:
        return parse_size(str(value))
    except InvalidSize as exc:
        raise ConfigurationError(file=file, reason=f"{name}: {exc.message}") from exc


def _rate(file: Path, value: str | int) -> int:
    try:
        return check_rate(_size(file, "jobs.rate", value)) or 0
    except InvalidParameterValue as exc:
        raise ConfigurationError(file=file, reason=f"jobs.rate: {exc.message}") from exc


def _seconds(file: Path, name: str, value: float | None) -> float | None:
    if value is not None and not 0 <= value <= MAX_FULL_WAIT:
        raise ConfigurationError(file=file, reason=f"{name}: it is a number of seconds from 0 to {MAX_FULL_WAIT:g}")
    return value


def _read(path: Path, *, must_exist: bool) -> FileConfig:
    try:
        text = path.read_text()
    except FileNotFoundError:
        if must_exist:
            raise ConfigurationError(file=path, reason="there is no such file") from None
        return FileConfig()
    except OSError as exc:
        raise ConfigurationError(file=path, reason=exc.strerror) from exc
    try:
        return msgspec.convert(tomllib.loads(text), FileConfig)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as exc:
        raise ConfigurationError(file=path, reason=str(exc)) from exc


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None


def _home(environment: Mapping[str, str], variable: str, below_home: str) -> Path:
    named = environment.get(variable)
    if named:
        return Path(named)
    home = environment.get("HOME")
    if not home:
        raise ConfigurationError(file="environment", reason=f"neither {variable} nor HOME is set; name the directories")
    return Path(home) / below_home


def _default_file(uid: int, environment: Mapping[str, str]) -> Path:
    if uid == 0:
        return Path("/etc/ebsd/ebsd.toml")
    return _home(environment, "XDG_CONFIG_HOME", ".config") / "ebsd" / "ebsd.toml"


def _default_state(uid: int, environment: Mapping[str, str], name: str = "ebsd") -> Path:
    return Path("/var/lib") / name if uid == 0 else _home(environment, "XDG_STATE_HOME", ".local/state") / name


def _default_runtime(uid: int, environment: Mapping[str, str]) -> Path:
    if uid == 0:
        return Path("/run/ebsd")
    named = environment.get("XDG_RUNTIME_DIR")
    return Path(named) / "ebsd" if named else Path(f"/dev/shm/ebsd-{uid}/run")


def root_key_name(place: Mapping[str, str]) -> str:
    """Return where a root key comes from, as status shows it: a path, ``credential:NAME``, or ``passphrase``."""
    return {"file": place.get("path", ""), "credential": f"credential:{place.get('name')}"}.get(
        place["kind"], place["kind"]
    )


def _root_key(
    local: LocalKeyService, lone_state: Path | None, uid: int, environment: Mapping[str, str]
) -> dict[str, str]:
    named = local.root_key
    if named.startswith("credential:"):
        directory = environment.get("CREDENTIALS_DIRECTORY", "")
        if not directory and not local.service:
            raise ConfigurationError(
                file="key_service.local.root_key", reason="a credential is named, but CREDENTIALS_DIRECTORY is not set"
            )
        return {"kind": "credential", "name": named.removeprefix("credential:"), "directory": directory}
    if named == "passphrase":
        return {"kind": "passphrase"}
    if named:
        path = Path(named)
    elif lone_state is not None:
        path = lone_state / "root.key"
    elif uid == 0:
        path = Path("/etc/ebsd/root.key")
    else:
        path = _home(environment, "XDG_CONFIG_HOME", ".config") / "ebsd" / "root.key"
    return {"kind": "file", "path": str(path.absolute())}
