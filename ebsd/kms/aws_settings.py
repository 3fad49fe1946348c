"""The settings of the back end ``aws``, as ebsd hands them to the broker.

The environment that boto3's credential chain reads crosses in the same message, because a child's own is cleared. It
may hold a secret access key, so nothing here shows it.
"""

from __future__ import annotations

import msgspec


class AwsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One region of AWS KMS, or an endpoint that speaks its protocol."""

    region: str
    endpoint_url: str | None = None
    """Instead of the region's own endpoint; STS is asked there, too."""
    profile: str | None = None
    principal: str | None = None
    """ARN that attach grants name as grantee; without one it is what STS says of the credentials."""
    default_key: str | None = None
    """Key or alias that stands for alias/aws/ebs where AWS is the default back end."""
    users: tuple[int, ...] | None = ()
    """uids that may use keys there besides administrators; None means everyone."""
    connect_timeout: float = 2.0
    read_timeout: float = 4.0
    """Seconds, of one attempt."""
    attempts: int = 3
    deadline: float = 20.0
    """Seconds for a whole request, repetitions included; ebsd waits 30 for an answer of the broker."""
    environment: dict[str, str] = {}

    def __repr__(self) -> str:
        return f"<AwsSettings {self.region} {self.endpoint_url or ''}>"

    @property
    def place(self) -> str:
        """What messages call this back end."""
        return f"AWS KMS at {self.endpoint_url}" if self.endpoint_url else f"AWS KMS in {self.region}"
