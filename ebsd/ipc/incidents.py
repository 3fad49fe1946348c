"""Unexpected exceptions: a number for the user, a traceback for the log."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable

from ebsd.domain.errors import EbsdError, HostFailure, InternalFailure, NoSpace

OnIncident = Callable[[str, BaseException], None]
"""Called with the incident (8 hexadecimal digits) and the exception, while no reply has been sent yet."""

_log = logging.getLogger(__name__)


def log_incident(incident: str, exc: BaseException) -> None:
    """Log the exception. The traceback has lines of code and no local variables: those may be secret."""
    _log.error("incident %s: %s", incident, type(exc).__name__, exc_info=exc)


def as_ebsd_error(exc: Exception, on_incident: OnIncident) -> EbsdError:
    """Return the error to answer with: ours as it is, anything else, once reported, as InternalFailure."""
    leaf: BaseException = exc
    # A nursery wraps what its tasks raise; one error alone in its groups is that error.
    while isinstance(leaf, BaseExceptionGroup) and len(leaf.exceptions) == 1:
        leaf = leaf.exceptions[0]
    if isinstance(leaf, EbsdError):
        return leaf
    if isinstance(leaf, OSError) and leaf.errno is not None:
        _log.error("the host failed: %s", leaf, exc_info=exc)
        return host_failure(leaf)
    incident = os.urandom(4).hex()
    try:
        on_incident(incident, exc)
    except Exception:  # noqa: BLE001 - a fault of the report must not hide the incident
        _log.exception("incident %s could not be reported", incident)
    return InternalFailure(incident=incident)


def host_failure(exc: OSError) -> EbsdError:
    """Return the error that says which call of the host failed: no bug, so without a number to look up."""
    where = f"at {os.fsdecode(exc.filename)}" if exc.filename is not None else "in a call of ebsd"
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(where=where)
    return HostFailure(where=where, reason=exc.strerror or str(exc))
