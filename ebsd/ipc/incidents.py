"""Unexpected exceptions: a number for the user, a traceback for the log."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from ebsd.domain.errors import EbsdError, InternalFailure

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
    incident = os.urandom(4).hex()
    try:
        on_incident(incident, exc)
    except Exception:  # noqa: BLE001 - a fault of the report must not hide the incident
        _log.exception("incident %s could not be reported", incident)
    return InternalFailure(incident=incident)
