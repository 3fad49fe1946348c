"""Audit records: a call and what came of it, as AWS CloudTrail would write it down. Pure.

1. Members of requests are taken by a table. What is not in it is taken only when it is a number or a truth value; a
   text of an unknown member becomes HIDDEN, so that a new operation cannot put a secret here by being new.
2. Plaintexts, wrapped keys, grant tokens and passphrases are left out altogether, as CloudTrail does; and whatever
   texts were left out are also looked for in the finished record (an error may quote its request).
3. What AWS has no field for stands in ``additionalEventData``.
Source: CloudTrail User Guide, "CloudTrail record contents"; KMS Developer Guide, "Examples of KMS log entries".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256
from typing import Any, Final

from ebsd.domain.errors import EbsdError, InvalidKeyArn
from ebsd.domain.ids import REGION, AccountId, format_uuid, looks_like_snapshot_id, split_alias_arn, split_key_arn
from ebsd.kms.audit.lines import MAX_LINE, encode_record
from ebsd.kms.policy import SERVICE

EVENT_VERSION: Final = "1.11"
KMS: Final = "kms.amazonaws.com"
EC2: Final = "ec2.amazonaws.com"
EBSD: Final = "ebsd.local"
"""eventSource of what AWS does not have: anchors, backup of the keys, the log itself."""
HIDDEN: Final = "HIDDEN_DUE_TO_SECURITY_REASONS"
"""CloudTrail's own word for a value that it does not show."""

MAX_RECORD: Final = MAX_LINE - 1024
MAX_REFUSAL: Final = 8 * 1024
"""Bytes of a record, and of one of a call that was refused: anybody can make as many of these as he likes."""

_SHORTEST_SECRET: Final = 16
"""Characters of a text that is looked for in the record; shorter ones would be found by chance."""


class Keep(Enum):
    """What becomes of a member of a request or reply."""

    VALUE = "as it is"
    PAIRS = "a map of texts, as it is"
    STRUCT = "its members, by the same table"
    NOTHING = "left out: the record has it elsewhere, or it is a descriptor"
    SECRET = "left out, and looked for in the rest of the record"


def _names(text: str) -> list[str]:
    return text.split()


_SHOWN: Final = _names("""
KeyId KeyArn Arn TargetKeyId AliasName AliasArn SourceKeyId DestinationKeyId AWSAccountId KeySpec KeyUsage KeyState
KeyManager CustomerMasterKeySpec Origin Description CreationDate DeletionDate Policy PolicyName EncryptionAlgorithm
EncryptionAlgorithms KeyMaterialId CurrentKeyMaterialId SourceKeyMaterialId DestinationKeyMaterialId IncludeKeyMaterial
GrantId GranteePrincipal RetiringPrincipal Operations Name Marker Tags TagKeys ResourceId SourceResourceId
MadeFromResourceId EbsDefaultKmsKeyId SnapshotBlockPublicAccess Kind Path RootKey FormerRootKey AccountId AllowedKeys
Making ChangeTime Add Remove
""")
_PAIRS: Final = _names("""
EncryptionContext SourceEncryptionContext DestinationEncryptionContext EncryptionContextEquals EncryptionContextSubset
""")
_SECRET: Final = _names("""
CiphertextBlob Plaintext GrantToken GrantTokens Passphrase
""")
_LEFT_OUT: Final = _names("""
Caller PlaintextDescriptor PassphraseDescriptor Source Destination Session
""")

MEMBERS: Final[Mapping[str, Keep]] = {
    **dict.fromkeys(_SHOWN, Keep.VALUE),
    **dict.fromkeys(_PAIRS, Keep.PAIRS),
    **dict.fromkeys(("Constraints", "KeyMetadata", "Rule"), Keep.STRUCT),
    **dict.fromkeys(_SECRET, Keep.SECRET),
    **dict.fromkeys(_LEFT_OUT, Keep.NOTHING),
}

READ_ONLY: Final = frozenset(
    ("Admit", "Encrypt", "Decrypt", "ReEncrypt", "GenerateDataKey", "GenerateDataKeyWithoutPlaintext", "CheckSharedKey")
)
"""What CloudTrail calls read-only although it is no Describe, Get or List."""

_GRANT_ID: Final = re.compile(r"[0-9a-f]{64}")
_LOOKS: Final = ("Describe", "Get", "List")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call: the members of its reply, or the error."""

    reply: Mapping[str, Any] = field(default_factory=dict)
    error: EbsdError | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Everything that a record is made of."""

    source: str
    name: str
    identity: Mapping[str, Any]
    parameters: Mapping[str, Any]
    outcome: Outcome
    keys: tuple[str, ...] = ()
    """ARNs of the keys that the request means, as far as they are known."""
    owner: AccountId | None = None
    """Account of the volume or snapshot that the request names."""
    user_agent: str = ""
    additional: Mapping[str, Any] = field(default_factory=dict)
    type: str = "AwsApiCall"


@dataclass(frozen=True, slots=True)
class Stamp:
    """What no event has of itself: time and ids."""

    time: str
    event_id: str
    request_id: str
    shared_event_id: str


def is_read_only(name: str) -> bool:
    return name in READ_ONLY or name.startswith(_LOOKS)


def is_a_look(name: str) -> bool:
    """Say whether an operation only shows what is there: no key is used and nothing is changed."""
    return name.startswith(_LOOKS)


def record_of(event: Event, stamp: Stamp) -> dict[str, Any]:
    """Return the record, short enough for a line."""
    arns = tuple(dict.fromkeys((*event.keys, *_arns_in(event.outcome.reply))))
    resources = [*_key_resources(arns), *_ebs_resources(event)]
    caller = str(event.identity.get("accountId", ""))
    recipient = resources[0]["accountId"] if resources else caller
    record: dict[str, Any] = {
        "eventVersion": EVENT_VERSION,
        "userIdentity": dict(event.identity),
        "eventTime": stamp.time,
        "eventSource": event.source,
        "eventName": event.name,
        "awsRegion": REGION,
        "sourceIPAddress": event.identity.get("invokedBy", "local"),
        "userAgent": event.identity.get("invokedBy", event.user_agent),
    }
    if event.outcome.error is not None:
        record |= {"errorCode": event.outcome.error.code, "errorMessage": event.outcome.error.message}
    response = {} if is_read_only(event.name) else visible(event.outcome.reply)
    additional = dict(event.additional)
    if "KeyMaterialId" in event.outcome.reply:
        additional["keyMaterialId"] = event.outcome.reply["KeyMaterialId"]
    record |= {
        "requestParameters": visible(event.parameters) or None,
        "responseElements": response or None,
        **({"additionalEventData": additional} if additional else {}),
        "requestID": stamp.request_id,
        "eventID": stamp.event_id,
        "readOnly": is_read_only(event.name),
        "resources": resources,
        "eventType": event.type,
        "managementEvent": True,
        "recipientAccountId": recipient,
        **({"sharedEventID": stamp.shared_event_id} if caller and caller != recipient else {}),
        "eventCategory": "Management",
    }
    limit = MAX_RECORD if event.outcome.error is None else MAX_REFUSAL
    return _fitting(_without(record, secrets_of(event)), limit)


def service_record(name: str, stamp: Stamp, details: Mapping[str, Any], key: str | None = None) -> dict[str, Any]:
    """Return the record of something that the service did by itself, perhaps to a key, whose owner then sees it."""
    resources = list(_key_resources([key] if key else []))
    return {
        "eventVersion": EVENT_VERSION,
        "userIdentity": {"type": "AWSService", "invokedBy": "ebsd-kms"},
        "eventTime": stamp.time,
        "eventSource": KMS if key else EBSD,
        "eventName": name,
        "awsRegion": REGION,
        "sourceIPAddress": "ebsd-kms",
        "userAgent": "ebsd-kms",
        "requestParameters": None,
        "responseElements": None,
        "eventID": stamp.event_id,
        "readOnly": False,
        "resources": resources,
        "eventType": "AwsServiceEvent",
        "managementEvent": True,
        "recipientAccountId": resources[0]["accountId"] if resources else "",
        "serviceEventDetails": dict(details),
        "eventCategory": "Management",
    }


def accounts_of(record: Mapping[str, Any]) -> set[str]:
    """Return the accounts that a record concerns: who asked, for whom, and whose resources it was about."""
    found = {record["userIdentity"].get("accountId"), record.get("recipientAccountId")}
    found.add((record.get("additionalEventData") or {}).get("onBehalfOf", {}).get("accountId"))
    return {account for account in found | {item["accountId"] for item in record["resources"]} if account}


# --- parts ------------------------------------------------------------------------------------------------


def visible(members: Mapping[str, Any]) -> dict[str, Any]:
    """Return members of a request or reply under CloudTrail's names (first letter small), without secrets."""
    shown = {}
    for name, value in members.items():
        keep = MEMBERS.get(name)
        if keep in (Keep.NOTHING, Keep.SECRET) or value is None:
            continue
        if keep is Keep.STRUCT:
            value = visible(value)
        elif _is_hidden(name, value):
            value = HIDDEN
        shown[_small(name)] = value
    return shown


def _is_hidden(name: str, value: object) -> bool:
    """Say whether a value may be a secret: of an unknown member, or a grant token where an id belongs."""
    if name == "GrantId":
        return _GRANT_ID.fullmatch(str(value)) is None
    return name not in MEMBERS and not isinstance(value, bool | int)


def secrets_of(event: Event) -> set[str]:
    """Return the texts of request and reply that must not be in the record."""
    hidden = [value for name, value in event.parameters.items() if _is_hidden(name, value)]
    for members in (event.parameters, event.outcome.reply):
        hidden += [value for name, value in members.items() if MEMBERS.get(name) is Keep.SECRET]
    return {text for value in hidden for text in _texts(value) if len(text) >= _SHORTEST_SECRET}


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _without(value: Any, hidden: Iterable[str]) -> Any:
    """Return a JSON value with the hidden texts replaced wherever they stand."""
    if isinstance(value, str):
        for text in hidden:
            value = value.replace(text, HIDDEN)
        return value
    if isinstance(value, dict):
        return {_without(name, hidden): _without(part, hidden) for name, part in value.items()}
    if isinstance(value, list):
        return [_without(part, hidden) for part in value]
    return value


def _fitting(record: dict[str, Any], limit: int) -> dict[str, Any]:
    """Return the record, its largest parts replaced by their digests when it is longer than the limit."""
    for part in ("requestParameters", "responseElements", "errorMessage"):
        encoded = encode_record(record)
        if len(encoded) <= limit:
            break
        value = record.get(part)
        if value is not None:
            omitted = {"omitted": True, "sha256": sha256(encode_record({part: value})).hexdigest()}
            record[part] = omitted if isinstance(value, dict) else str(value)[:1024]
    return record


def _small(name: str) -> str:
    return "awsAccountId" if name == "AWSAccountId" else name[:1].lower() + name[1:]


def _arns_in(reply: Mapping[str, Any]) -> Iterator[str]:
    places = (reply.get("KeyId"), reply.get("SourceKeyId"), (reply.get("KeyMetadata") or {}).get("Arn"))
    return (place for place in places if isinstance(place, str) and place.startswith("arn:"))


def _key_resources(arns: Iterable[str]) -> Iterator[dict[str, str]]:
    for arn in arns:
        try:
            alias = split_alias_arn(arn)
            account = split_key_arn(arn)[1] if alias is None else alias[0]
        except InvalidKeyArn:
            continue
        yield {"accountId": account, "type": "AWS::KMS::Key" if alias is None else "AWS::KMS::Alias", "ARN": arn}


def _ebs_resources(event: Event) -> Iterator[dict[str, str]]:
    resource = event.parameters.get("ResourceId") or event.additional.get("resourceId")
    if event.owner is None or not isinstance(resource, str):
        return
    kind, word = ("Snapshot", "snapshot") if looks_like_snapshot_id(resource) else ("Volume", "volume")
    arn = f"arn:aws:ec2:{REGION}:{event.owner}:{word}/{resource}"
    yield {"accountId": event.owner, "type": f"AWS::EC2::{kind}", "ARN": arn}


def service_identity() -> dict[str, Any]:
    """Return the identity of ebsd where it acts for nobody in particular."""
    return {"type": "AWSService", "invokedBy": SERVICE}


def request_id_of_grant(grant_id: str) -> str:
    """Return the request id that an attachment's CreateGrant and Decrypt share, as they do on AWS."""
    return format_uuid(sha256(b"ebsd audit request\0" + grant_id.encode("utf-8", "replace")).digest()[:16])
