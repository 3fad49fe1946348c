"""Encryption of what is to be made: the account's settings, the outcome, its key, and whether that is admitted.

The one place that all makers of volumes and snapshots go through. The key is judged before anything is made: EBS lets
a volume with an unusable key vanish afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from ebsd.control.broker import Broker, KeyDescription
from ebsd.control.host import Host
from ebsd.domain.admission import Making, admit
from ebsd.domain.errors import (
    AwsKeyDisabled,
    AwsKeyPendingDeletion,
    KeyDisabled,
    KeyPendingDeletion,
    KmsInvalidState,
    NoVolumeKey,
)
from ebsd.domain.ids import MANAGED_ALIAS, KeyArn, foreign_region
from ebsd.domain.model import Caller
from ebsd.domain.outcomes import Outcome


class Decide(Protocol):
    """One of ``domain.outcomes``' decisions with everything given but the account's setting."""

    def __call__(self, *, encryption_by_default: bool) -> Outcome: ...


@dataclass(frozen=True, slots=True)
class Settled:
    """Under which key something will be made."""

    outcome: Outcome
    key: KeyArn | None
    """None: it is unencrypted."""


class Encryption:
    """Settles the encryption of new volumes and snapshots."""

    def __init__(self, host: Host, broker: Broker) -> None:
        self._host = host
        self._broker = broker

    async def settle(
        self, caller: Caller, making: Making, decide: Decide, *, named: str | None, source: KeyArn | None
    ) -> Settled:
        """Return the key that ``decide``, the request's key ``named`` and the key of its source lead to.

        Raises what the decision refuses, the key service's error for a key that cannot be used, and the refusal of
        what is not admitted.
        """
        settings = await self._broker.account(caller)
        outcome = decide(encryption_by_default=settings.encryption_by_default)
        key: KeyArn | None = None
        if outcome is not Outcome.UNENCRYPTED:
            wanted = {
                Outcome.NAMED_KEY: named,
                Outcome.DEFAULT_KEY: settings.default_key,
                Outcome.SOURCE_KEY: source,
            }[outcome]
            key = usable_key(await self._broker.describe_key(caller, wanted or MANAGED_ALIAS))
        admit(making, key, allow_unencrypted=self._host.allow_unencrypted)
        if settings.admission_rules:
            # Judged by the key service: it keeps the rules, and what it refuses is in the audit log.
            await self._broker.admit(caller, making, key)
        return Settled(outcome, key)


def usable_key(key: KeyDescription) -> KeyArn:
    """Return the ARN when a volume can be encrypted under the key, else raise KMS's error for it.

    What is refused is what EBS refuses later (KMS developer guide, key states; EBS user guide, Requirements: symmetric
    encryption keys only). A key that is not there, or another account's, the key service has refused before.
    """
    in_aws = foreign_region(key.arn) is not None
    if key.spec != "SYMMETRIC_DEFAULT" or key.usage != "ENCRYPT_DECRYPT":
        raise NoVolumeKey(key=key.arn, spec=key.spec, usage=key.usage)
    if key.state == "Disabled":
        raise AwsKeyDisabled(key=key.arn) if in_aws else KeyDisabled(key=key.arn)
    if key.state == "PendingDeletion":
        raise AwsKeyPendingDeletion(key=key.arn) if in_aws else KeyPendingDeletion(key=key.arn)
    if key.state != "Enabled":
        raise KmsInvalidState(key=key.arn, state=_WORDS.get(key.state, key.state))
    return key.arn


_WORDS: Final = {"PendingImport": "pending import", "PendingReplicaDeletion": "pending deletion"}
"""States of keys of AWS KMS in the words of its messages."""
