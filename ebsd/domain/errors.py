"""Errors: every failure a user can meet, with AWS's code, a message, a hint and an exit status.

1. A class owns its code, texts and exit status; the raiser gives only the facts.
2. Codes of EC2 and KMS keep AWS's spelling; those that AWS does not have start with ``Ebsd.``.
3. ``EXIT_STATUS`` is derived from the classes, so no code can stand in two tables.
"""

from __future__ import annotations

from enum import IntEnum
from typing import ClassVar


class ExitStatus(IntEnum):
    """Exit statuses of ``ebsctl``; scripts rely on them."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    DENIED = 5
    KEY_UNAVAILABLE = 6
    INTEGRITY = 7
    TIMEOUT = 8
    UNREACHABLE = 9
    NO_SPACE = 10
    INTERRUPTED = 130


class EbsdError(Exception):
    """Base of all errors meant for users: ``code``, ``message``, ``hint``, ``exit_status`` and the facts."""

    code: ClassVar[str]
    exit_status: ClassVar[ExitStatus]
    template: ClassVar[str]
    hint_template: ClassVar[str] = ""
    aws_reason: ClassVar[str] = ""
    """Reason of an error of the EBS direct APIs."""

    def __init__(self, **facts: object) -> None:
        self.facts = facts
        self.message = self.template.format_map(facts)
        self.hint = self.hint_template.format_map(facts)
        super().__init__(f"{self.code}: {self.message}")


class RemoteError(EbsdError):
    """An error received from another process: its code, message and hint are carried unchanged."""

    template = ""
    code = "Ebsd.RemoteError"
    exit_status = ExitStatus.FAILED

    def __init__(self, code: str, message: str, hint: str = "", aws_reason: str = "") -> None:
        Exception.__init__(self, f"{code}: {message}")
        self.facts = {}
        self.aws_reason = aws_reason  # type: ignore[misc]
        self.code = code  # type: ignore[misc]
        self.message = message
        self.hint = hint
        self.exit_status = exit_status_of(code)  # type: ignore[misc]


# --- parameters -------------------------------------------------------------------------------------------


class InvalidParameterValue(EbsdError):
    code = "InvalidParameterValue"
    exit_status = ExitStatus.USAGE
    template = "Value ({value}) for parameter {parameter} is invalid: {reason}."


class InvalidSize(EbsdError):
    code = "InvalidParameterValue"
    exit_status = ExitStatus.USAGE
    template = "Size {size} is invalid: {reason}."
    hint_template = "Write a size as 10G, 512M or a number of bytes; K, M, G and T are powers of 1024."


class InvalidName(EbsdError):
    code = "InvalidParameterValue"
    exit_status = ExitStatus.USAGE
    template = "The name {name!r} is invalid: {reason}."
    hint_template = (
        "A name has 1 to 63 characters from a-z, A-Z, 0-9, '.', '_' and '-', and starts with a letter or digit."
    )


class InvalidFilter(EbsdError):
    """AWS names only the filter; which there are says the hint."""

    code = "InvalidParameterValue"
    exit_status = ExitStatus.USAGE
    template = "The filter '{name}' is invalid."
    hint_template = "Valid filters are {known}."


class FilterLimitExceeded(EbsdError):
    code = "FilterLimitExceeded"
    exit_status = ExitStatus.USAGE
    template = "The request has {count} {what}; the limit is {limit}."


class MissingParameter(EbsdError):
    code = "MissingParameter"
    exit_status = ExitStatus.USAGE
    template = "The request must contain the parameter {parameter}."


class UnknownParameter(EbsdError):
    code = "UnknownParameter"
    exit_status = ExitStatus.USAGE
    template = "The parameter {parameter} is not recognized."


class InvalidPermissionGroup(EbsdError):
    code = "InvalidAMIAttributeItemValue"
    exit_status = ExitStatus.USAGE
    template = "Invalid attribute item value {group!r} for userGroup item type."
    hint_template = "The only group is all: everybody on this host."


class InvalidParameterCombination(EbsdError):
    code = "InvalidParameterCombination"
    exit_status = ExitStatus.USAGE
    template = "{reason}."


class KmsKeyRequiresEncrypted(EbsdError):
    code = "InvalidParameterDependency"
    exit_status = ExitStatus.USAGE
    template = "The parameter KmsKeyId requires the parameter Encrypted to be set."
    hint_template = "Add --encrypted."


class InvalidTag(EbsdError):
    code = "InvalidParameterValue"
    exit_status = ExitStatus.USAGE
    template = "The tag {tag!r} is invalid: {reason}."
    hint_template = "Write a tag as KEY=VALUE; keys have at most 128 characters, values 256, and 'aws:' is reserved."


class InvalidDescription(EbsdError):
    code = "InvalidParameterValue"
    exit_status = ExitStatus.USAGE
    template = "The description is invalid: {reason}."


class TagLimitExceeded(EbsdError):
    code = "TagLimitExceeded"
    exit_status = ExitStatus.USAGE
    template = "The resource {resource} would have more than {limit} tags."


class IdempotentParameterMismatch(EbsdError):
    code = "IdempotentParameterMismatch"
    exit_status = ExitStatus.CONFLICT
    template = "The client token {token!r} was used with other parameters: they made {resource}."
    hint_template = "Send the same parameters again, or take another token."


# --- not found --------------------------------------------------------------------------------------------


class VolumeNotFound(EbsdError):
    code = "InvalidVolume.NotFound"
    exit_status = ExitStatus.NOT_FOUND
    template = "The volume '{volume}' does not exist."
    hint_template = "`ebsctl list` shows the volumes you can see."


class ModificationNotFound(EbsdError):
    code = "InvalidVolumeModification.NotFound"
    exit_status = ExitStatus.NOT_FOUND
    template = "Modification for volume '{volume}' does not exist."
    hint_template = "The volume has had its size since it was made."


class VolumeIdMalformed(EbsdError):
    code = "InvalidVolumeID.Malformed"
    exit_status = ExitStatus.NOT_FOUND
    template = 'Invalid id: "{volume}" (expecting "vol-...").'
    hint_template = "A volume is named by its name or its id, vol- and 17 hexadecimal digits."


class SnapshotNotFound(EbsdError):
    code = "InvalidSnapshot.NotFound"
    exit_status = ExitStatus.NOT_FOUND
    template = "The snapshot '{snapshot}' does not exist."
    hint_template = "`ebsctl list snapshots` shows the snapshots you can see."


class SnapshotIdMalformed(EbsdError):
    code = "InvalidSnapshotID.Malformed"
    exit_status = ExitStatus.NOT_FOUND
    template = 'Invalid id: "{snapshot}" (expecting "snap-...").'


class JobNotFound(EbsdError):
    code = "Ebsd.JobNotFound"
    exit_status = ExitStatus.NOT_FOUND
    template = "The job '{job}' does not exist."
    hint_template = "`ebsctl job list` shows your jobs."


class ScheduleNotFound(EbsdError):
    code = "Ebsd.ScheduleNotFound"
    exit_status = ExitStatus.NOT_FOUND
    template = "The schedule '{schedule}' does not exist."
    hint_template = "`ebsctl schedule list` shows the schedules that there are."


class ResourceNotFound(EbsdError):
    code = "InvalidID"
    exit_status = ExitStatus.NOT_FOUND
    template = "The ID '{resource}' is not valid: nothing you can see has this name or id."
    hint_template = "`ebsctl list` shows volumes, `ebsctl list snapshots` snapshots and `ebsctl list keys` keys."


class UserIdMalformed(EbsdError):
    code = "InvalidUserID.Malformed"
    exit_status = ExitStatus.NOT_FOUND
    template = 'Invalid user id: "{user}" (expecting the 12 digits of an account).'
    hint_template = "An account is the uid of a Unix user, with zeros in front."


class AdmissionRuleNotFound(EbsdError):
    code = "Ebsd.AdmissionRuleNotFound"
    exit_status = ExitStatus.NOT_FOUND
    template = "There is no admission rule for {whom}."
    hint_template = "`ebsctl admission show` lists them."


class UserNotFound(EbsdError):
    code = "InvalidUserID.Malformed"
    exit_status = ExitStatus.NOT_FOUND
    template = "No user on this host is called '{user}'."


# --- state and conflict -----------------------------------------------------------------------------------


class AmbiguousName(EbsdError):
    code = "InvalidParameterValue"
    exit_status = ExitStatus.CONFLICT
    template = "The name '{name}' stands for several: {resources}."
    hint_template = "Name one by its id."


class RecycleBinRuleNotFound(EbsdError):
    code = "ResourceNotFoundException"
    exit_status = ExitStatus.NOT_FOUND
    template = "The retention rule '{rule}' does not exist."
    hint_template = "`ebsctl recycle-bin rule list` shows the rules."


class RecycleBinRuleLimit(EbsdError):
    code = "ServiceQuotaExceededException"
    exit_status = ExitStatus.CONFLICT
    template = "An account has at most {limit} retention rules."


class NameInUse(EbsdError):
    code = "Ebsd.NameInUse"
    exit_status = ExitStatus.CONFLICT
    template = "The name '{name}' is in use by {resource}."
    hint_template = "Choose another name, or rename the other one: ebsctl rename {resource} NEW."


class ScheduleNameInUse(NameInUse):
    hint_template = "Choose another name, or delete the other one: ebsctl schedule delete {resource}"


class VolumeInUse(EbsdError):
    code = "VolumeInUse"
    exit_status = ExitStatus.CONFLICT
    template = "Volume {volume} is currently attached ({state})."
    hint_template = "Detach it first: ebsctl detach {volume}."


class VolumeAlreadyAttached(EbsdError):
    code = "VolumeInUse"
    exit_status = ExitStatus.CONFLICT
    template = "{volume} is already attached to an instance."
    hint_template = "It is at {path}."


class VolumeBusy(EbsdError):
    code = "Ebsd.VolumeBusy"
    exit_status = ExitStatus.CONFLICT
    template = "Volume {volume} is busy: {reason}."
    hint_template = "End what uses it (see `fuser -vm {path}`) and detach again."


class IncorrectVolumeState(EbsdError):
    code = "IncorrectState"
    exit_status = ExitStatus.CONFLICT
    template = "Volume '{volume}' is in the '{state}' state."
    hint_template = "`ebsctl show {volume}` tells more; a volume in 'error' can be detached and attached again."


class IncorrectState(EbsdError):
    code = "IncorrectState"
    exit_status = ExitStatus.CONFLICT
    template = "{reason}."


class SnapshotInUse(EbsdError):
    code = "InvalidSnapshot.InUse"
    exit_status = ExitStatus.CONFLICT
    template = "The snapshot {snapshot} is currently in use by {user}."
    hint_template = "Wait for it (ebsctl job wait {user}), or cancel it."


class SnapshotLocked(EbsdError):
    """AWS does not publish the code of this case."""

    code = "Ebsd.SnapshotLocked"
    exit_status = ExitStatus.CONFLICT
    template = "The snapshot {snapshot} is locked ({state}) until {until}."


class SharedSnapshotInUse(EbsdError):
    code = "InvalidSnapshot.InUse"
    exit_status = ExitStatus.CONFLICT
    template = "The snapshot {snapshot} is currently in use by account {account}."
    hint_template = (
        "A job of that account reads it. If it is shared, stop that (ebsctl share {snapshot} --reset), so that nothing "
        "new begins, and delete it when the job has ended."
    )


class SnapshotPending(EbsdError):
    code = "IncorrectState"
    exit_status = ExitStatus.CONFLICT
    template = "Snapshot '{snapshot}' is in the '{state}' state."
    hint_template = "Wait until it is completed: ebsctl wait {snapshot} --for completed."


class IncorrectSnapshotState(EbsdError):
    code = "IncorrectState"
    exit_status = ExitStatus.CONFLICT
    template = "Snapshot '{snapshot}' is in the '{state}' state."
    hint_template = "`ebsctl show {snapshot}` tells more."


class IncorrectModificationState(EbsdError):
    code = "IncorrectModificationState"
    exit_status = ExitStatus.CONFLICT
    template = "The modification of volume '{volume}' is in the '{state}' state."
    hint_template = "`ebsctl list modifications` tells more."


class SnapshotRateExceeded(EbsdError):
    code = "ConcurrentSnapshotLimitExceeded"
    exit_status = ExitStatus.CONFLICT
    template = "A snapshot of {volume} is being taken already."
    hint_template = "Wait until it is completed."


class SnapshotSetFailed(EbsdError):
    code = "Ebsd.SnapshotSetFailed"
    exit_status = ExitStatus.FAILED
    template = "The snapshots were not taken, as {volume} could not be held together with the others: {reason}."
    hint_template = "None of the set stays, and all volumes go on. Try again."


class CopyNotPermitted(EbsdError):
    code = "InvalidParameterValue"
    exit_status = ExitStatus.USAGE
    template = "Value (false) for parameter encrypted is invalid: a copy cannot be made unencrypted."
    hint_template = "Leave the parameter out, or add --encrypted."


class StartSnapshotRefused(EbsdError):
    """StartSnapshot with encryption parameters that do not go together: EBS's ValidationException."""

    code = "ValidationException"
    aws_reason = "INVALID_PARAMETER_VALUE"
    exit_status = ExitStatus.USAGE
    template = "The encryption parameters do not go together."


class ParentAndEncryption(StartSnapshotRefused):
    template = "Encrypted and KmsKeyArn cannot be given together with ParentSnapshotId."
    hint_template = "Leave both out: a snapshot with a parent is encrypted as its parent is, under the same key."


class ParentUnencrypted(StartSnapshotRefused):
    template = "The parent snapshot is not encrypted, and encryption by default is on."
    hint_template = "Copy the parent first (ebsctl copy --encrypted), and name the copy as the parent."


class SnapshotMustBeEncrypted(StartSnapshotRefused):
    template = "Encrypted cannot be false: encryption by default is on."
    hint_template = "Leave the parameter out, or turn encryption by default off (ebsctl defaults disable-encryption)."


class SnapshotKeyWithoutEncryption(StartSnapshotRefused):
    template = "KmsKeyArn cannot be given together with Encrypted=false."
    hint_template = "Leave one of them out: a key alone means an encrypted snapshot."


class JobCancelled(EbsdError):
    code = "Ebsd.JobCancelled"
    exit_status = ExitStatus.FAILED
    template = "The job {job} was cancelled."


class ArchiveNeedsBase(EbsdError):
    code = "Ebsd.ArchiveNeedsBase"
    exit_status = ExitStatus.CONFLICT
    template = "The archive of {snapshot} has only what changed since {base}: {reason}."
    hint_template = "Import the archive of {base} first, and name what it became: --onto SNAPSHOT."


class ArchiveOfAnother(EbsdError):
    code = "Ebsd.ArchiveOfAnother"
    exit_status = ExitStatus.CONFLICT
    template = "{file} cannot be continued: {reason}."
    hint_template = "Choose another file name, or remove the file."


class NotBlank(EbsdError):
    code = "Ebsd.NotBlank"
    exit_status = ExitStatus.CONFLICT
    template = "Volume {volume} holds data and is not formatted."
    hint_template = "Attach it without --mkfs; to discard its contents, run mkfs on {path} yourself."


class OperationNotPermitted(EbsdError):
    code = "OperationNotPermitted"
    exit_status = ExitStatus.CONFLICT
    template = "{reason}."
    hint_template = "{remedy}"


class DefaultKeySnapshotNotShareable(EbsdError):
    code = "OperationNotPermitted"
    exit_status = ExitStatus.CONFLICT
    template = "Encrypted snapshots with EBS default key cannot be shared."
    hint_template = (
        "Nobody else can be allowed to use alias/aws/ebs. Copy it under a key of yours and share the copy: "
        "ebsctl copy {snapshot} --encrypted --key KEY."
    )


class EncryptedSnapshotNotPublic(EbsdError):
    code = "OperationNotPermitted"
    exit_status = ExitStatus.CONFLICT
    template = "Encrypted snapshots cannot be shared publicly."
    hint_template = "Share it with named users: ebsctl share {snapshot} --add USER."


class PublicSharingBlocked(EbsdError):
    code = "OperationNotPermitted"
    exit_status = ExitStatus.CONFLICT
    template = "Public sharing of snapshots is blocked for account {account} ({state})."
    hint_template = "Share it with named users, or allow it first: ebsctl defaults allow-public-snapshots."


class ShareLimitExceeded(EbsdError):
    code = "ResourceLimitExceeded"
    exit_status = ExitStatus.CONFLICT
    template = "The snapshot {snapshot} would be shared with more than {limit} users."
    hint_template = "Stop sharing it with some: ebsctl share {snapshot} --remove USER."


class StateDirectoryInUse(EbsdError):
    code = "Ebsd.StateDirectoryInUse"
    exit_status = ExitStatus.CONFLICT
    template = "Another {program} uses {directory}."
    hint_template = "One {program} serves one state directory; stop the other one, or name another directory."


# --- denied -----------------------------------------------------------------------------------------------


class UnauthorizedOperation(EbsdError):
    code = "UnauthorizedOperation"
    exit_status = ExitStatus.DENIED
    template = "You are not authorized to perform this operation: {reason}."


class MayNotCreate(EbsdError):
    code = "UnauthorizedOperation"
    exit_status = ExitStatus.DENIED
    template = "You are not authorized to perform this operation: {account} may make no volumes and no snapshots here."
    hint_template = "An administrator can add you to `create` of [accounts] in the configuration of ebsd."


class AdmissionRefused(EbsdError):
    """An administrator's rule forbids what would be made: as an explicit deny of IAM forbids an action of EC2."""

    code = "UnauthorizedOperation"
    exit_status = ExitStatus.DENIED
    template = "You are not authorized to perform this operation: {reason}, and {rule} denies that."
    hint_template = "To fulfil the rule {remedy}. `ebsctl admission show` shows it; administrators change it."


class AuthFailure(EbsdError):
    code = "AuthFailure"
    exit_status = ExitStatus.DENIED
    template = "The user with uid {uid} cannot use this service: {reason}."


class SnapshotNotOwned(EbsdError):
    code = "AuthFailure"
    exit_status = ExitStatus.DENIED
    template = "Not authorized for snapshot: {snapshot} is shared with you, and belongs to account {owner}."
    hint_template = (
        "You can make volumes (ebsctl create NAME --from {snapshot}) and copies (ebsctl copy {snapshot}) of your own."
    )


class AccessDenied(EbsdError):
    code = "AccessDeniedException"
    exit_status = ExitStatus.DENIED
    template = "User: {principal} is not authorized to perform: {action} on resource: {resource}{reason}"
    hint_template = "Who administers the key can allow {action}: ebsctl key policy, or ebsctl key grant."


class AwsUserDenied(AccessDenied):
    """A user of this host whom the configuration does not let use ebsd's principal in AWS."""

    hint_template = "An administrator can add you to `users` of [key_service.aws] in the configuration of ebsd."


class ForeignAccessDenied(AccessDenied):
    """Of another account's key: whether it exists is its account's business."""

    template = (
        "User: {principal} is not authorized to perform: {action} on this resource because the resource does not exist "
        "in this Region, no resource-based policies allow access, or a resource-based policy explicitly denies access"
    )


class CiphertextAccessDenied(EbsdError):
    code = "AccessDeniedException"
    exit_status = ExitStatus.DENIED
    template = (
        "The ciphertext refers to a customer master key that does not exist, does not exist in this region, "
        "or you are not allowed to access."
    )


class NeedsRoot(EbsdError):
    code = "UnauthorizedOperation"
    exit_status = ExitStatus.DENIED
    template = "{operation} needs root."
    hint_template = "{remedy}"


# --- key service ------------------------------------------------------------------------------------------


class KeyNotFound(EbsdError):
    code = "NotFoundException"
    exit_status = ExitStatus.NOT_FOUND
    template = "Key '{key}' does not exist."
    hint_template = "`ebsctl key list` shows your keys."


class AliasNotFound(EbsdError):
    code = "NotFoundException"
    exit_status = ExitStatus.NOT_FOUND
    template = "Alias {alias} is not found."
    hint_template = "`ebsctl key alias list` shows your aliases."


class AliasExists(EbsdError):
    code = "AlreadyExistsException"
    exit_status = ExitStatus.CONFLICT
    template = "An alias with the name {alias} already exists."
    hint_template = "Point it to another key with `ebsctl key alias update`, or choose another name."


class InvalidAliasName(EbsdError):
    code = "InvalidAliasNameException"
    exit_status = ExitStatus.USAGE
    template = "The alias name {alias!r} is invalid: {reason}."
    hint_template = "An alias is alias/ and 1 to 250 characters from a-z, A-Z, 0-9, '/', '_' and '-'."


class InvalidKeyArn(EbsdError):
    code = "InvalidArnException"
    exit_status = ExitStatus.NOT_FOUND
    template = "'{key}' is not a key id, a key ARN or an alias."


class KeyDisabled(EbsdError):
    code = "DisabledException"
    exit_status = ExitStatus.KEY_UNAVAILABLE
    template = "{key} is disabled."
    hint_template = "Its owner can enable it again: ebsctl key enable {key}."


class AwsKeyDisabled(KeyDisabled):
    """A key of AWS KMS: who may enable it again does so there."""

    hint_template = "Its administrator can enable it again: aws kms enable-key --key-id {key}."


class AwsAccessDenied(AccessDenied):
    """AWS KMS refused ebsd's principal; the text is its own."""

    template = "AWS KMS: {reason}"
    hint_template = (
        "The key's policy, or an IAM policy of ebsd's principal there, must allow kms:{action} on {resource}."
    )


class AwsKeyAdministration(EbsdError):
    code = "UnsupportedOperationException"
    exit_status = ExitStatus.USAGE
    template = "{key} is a key of AWS KMS, which {operation} of this key service does not reach."
    hint_template = "Use the tools of its provider: aws kms {command} --region {region} --key-id {key}"


class KmsInvalidState(EbsdError):
    code = "KMSInvalidStateException"
    exit_status = ExitStatus.KEY_UNAVAILABLE
    template = "{key} is {state}."


class KeyPendingDeletion(KmsInvalidState):
    """A key of this host that waits for its deletion."""

    template = "{key} is pending deletion."
    hint_template = "Until its deletion date its owner can keep it: ebsctl key cancel-deletion {key}."


class AwsKeyPendingDeletion(KmsInvalidState):
    """A key of AWS KMS that waits for its deletion."""

    template = "{key} is pending deletion."
    hint_template = "Until its deletion date its administrator can keep it: aws kms cancel-key-deletion --key-id {key}."


class KeyStillUsed(EbsdError):
    """Ours: KMS schedules the deletion of a key without asking what it encrypts."""

    code = "Ebsd.KeyStillUsed"
    exit_status = ExitStatus.CONFLICT
    template = "Once {key} is deleted, {what} can never be read again."
    hint_template = (
        "Delete them, or copy them under another key (ebsctl copy --key); or accept the loss: repeat with --yes."
    )


class InvalidKeyUsage(EbsdError):
    code = "InvalidKeyUsageException"
    exit_status = ExitStatus.USAGE
    template = "{key} has key usage {usage}, which {operation} cannot use."
    hint_template = "Volumes need a symmetric encryption key (SYMMETRIC_DEFAULT, ENCRYPT_DECRYPT)."


class NoVolumeKey(InvalidKeyUsage):
    """A key that is there and allowed, but of a kind that wraps no data keys of volumes."""

    template = "{key} has key spec {spec} and key usage {usage}, which EBS encryption cannot use."


class UnsupportedKeySpec(EbsdError):
    code = "UnsupportedOperationException"
    exit_status = ExitStatus.USAGE
    template = "Key spec {spec} with usage {usage} is not supported."
    hint_template = "Volumes need a symmetric encryption key (SYMMETRIC_DEFAULT, ENCRYPT_DECRYPT)."


class IncorrectKey(EbsdError):
    code = "IncorrectKeyException"
    exit_status = ExitStatus.INTEGRITY
    template = "The key ID in the request does not identify a CMK that can perform this operation."


class InvalidCiphertext(EbsdError):
    """One uniform error for every reason why a wrapped key does not open: no oracle."""

    code = "InvalidCiphertextException"
    exit_status = ExitStatus.INTEGRITY
    template = "The ciphertext is damaged, or was made with another key or encryption context."


class KmsConflict(EbsdError):
    code = "ConflictException"
    exit_status = ExitStatus.CONFLICT
    template = "{reason}."


class InvalidGrantId(EbsdError):
    code = "InvalidGrantIdException"
    exit_status = ExitStatus.NOT_FOUND
    template = "The key has no grant '{grant}'."
    hint_template = "`ebsctl key grants KEY` lists them."


class InvalidGrantToken(EbsdError):
    code = "InvalidGrantTokenException"
    exit_status = ExitStatus.DENIED
    template = "The grant {grant} does not exist, or does not allow this."


class KmsValidation(EbsdError):
    code = "ValidationException"
    exit_status = ExitStatus.USAGE
    template = "{reason}."


class MalformedPolicy(EbsdError):
    code = "MalformedPolicyDocumentException"
    exit_status = ExitStatus.USAGE
    template = "The policy document is not valid. {reason}."
    hint_template = "`ebsctl key policy KEY` prints the present policy, which is a place to begin."


class VolumeLimitExceeded(EbsdError):
    code = "VolumeLimitExceeded"
    exit_status = ExitStatus.CONFLICT
    template = "You have reached the limit of {limit} volumes."
    hint_template = "Delete volumes, or ask an administrator: `ebsctl defaults show` tells what you use."


class VolumeBytesExceeded(VolumeLimitExceeded):
    template = "The sizes of your volumes would be {used} bytes together, more than the limit of {limit}."


class SnapshotLimitExceeded(EbsdError):
    code = "SnapshotLimitExceeded"
    exit_status = ExitStatus.CONFLICT
    template = "You have reached the limit of {limit} snapshots."
    hint_template = "Delete snapshots, or ask an administrator: `ebsctl defaults show` tells what you use."


class JobLimitExceeded(EbsdError):
    code = "ResourceLimitExceeded"
    exit_status = ExitStatus.CONFLICT
    template = "You have reached the limit of {limit} jobs at once."
    hint_template = "Wait for one, or cancel it: `ebsctl job list` shows them."


class KmsLimitExceeded(EbsdError):
    code = "LimitExceededException"
    exit_status = ExitStatus.CONFLICT
    template = "The request was refused because a quota would be exceeded: {what}."


class Throttled(EbsdError):
    code = "ThrottlingException"
    exit_status = ExitStatus.FAILED
    template = "Rate exceeded"
    hint_template = "Too many operations on keys: the audit log takes so much from a user at a time. Try again later."


class KeyRevoked(EbsdError):
    code = "CustomerKeyHasBeenRevoked"
    exit_status = ExitStatus.KEY_UNAVAILABLE
    template = "Volume {volume} cannot be attached. The encrypted volume was unable to access the KMS key: {reason}"
    hint_template = "Make the key usable again (ebsctl key show {key}), then attach."


class ArchiveKeyUnavailable(EbsdError):
    code = "Ebsd.ArchiveKeyUnavailable"
    exit_status = ExitStatus.KEY_UNAVAILABLE
    template = "The archive is encrypted under {key}, which this key service cannot use for it: {reason}."
    hint_template = (
        "Nothing was made. The key service of this host needs that KMS key: the same AWS KMS, or `ebsctl key restore` "
        "of a backup that has it."
    )


class KeyServiceUnavailable(EbsdError):
    code = "KMSInternalException"
    exit_status = ExitStatus.KEY_UNAVAILABLE
    template = "The key service is not available: {reason}."
    hint_template = "`ebsctl doctor` says what is wrong with it. Attached volumes are not affected."


class KeyServiceNotAnswering(KeyServiceUnavailable):
    template = "The key service is not available: it does not answer (for {seconds} seconds)."
    hint_template = (
        "It may be stopped, or the host overloaded. `systemctl restart ebsd-kms` starts it again if it is a service; "
        "ebsd itself starts again the one that it started. Attached volumes are not affected."
    )


class RootKeyUnavailable(EbsdError):
    code = "Ebsd.RootKeyUnavailable"
    exit_status = ExitStatus.KEY_UNAVAILABLE
    template = "The root key cannot be used: {reason}."
    hint_template = "Put the root key file back, or restore the keys from a backup: ebsctl key restore FILE."


class KeysMissing(EbsdError):
    code = "Ebsd.KeysMissing"
    exit_status = ExitStatus.KEY_UNAVAILABLE
    template = "There are volumes or snapshots, but not their keys: {directory} holds none; the root key, {root_key}."
    hint_template = (
        "Put both back, or restore a backup of the keys: ebsctl key restore FILE. Without either the data is lost."
    )


class KeyServiceLocked(EbsdError):
    code = "Ebsd.KeyServiceLocked"
    exit_status = ExitStatus.KEY_UNAVAILABLE
    template = "The key service is locked: {reason}."
    hint_template = "An administrator unlocks it: ebsctl key unlock. Attached volumes are not affected."


class WrongPassphrase(EbsdError):
    code = "Ebsd.WrongPassphrase"
    exit_status = ExitStatus.DENIED
    template = "The passphrase does not open the root key."
    hint_template = "Nothing was changed; try again. A line feed at the end of a passphrase does not count."


class BackupRefused(EbsdError):
    code = "Ebsd.BackupRefused"
    exit_status = ExitStatus.INTEGRITY
    template = "The key backup cannot be used: {reason}."


# --- integrity --------------------------------------------------------------------------------------------


class IntegrityFailure(EbsdError):
    code = "Ebsd.IntegrityFailure"
    exit_status = ExitStatus.INTEGRITY
    template = "{resource} fails its integrity check: {reason}."
    hint_template = "Nothing was changed. Restore the state directory from a backup, or ask `ebsctl doctor`."


class RecordTooOld(EbsdError):
    code = "Ebsd.RecordTooOld"
    exit_status = ExitStatus.INTEGRITY
    template = "{resource} has a record of generation {generation}, but generation {floor} was already reached."
    hint_template = (
        "Its files are older than the key service remembers: a rollback, or a restored backup. An administrator who "
        "restored it accepts that: ebsctl attach VOLUME --accept-rollback, ebsctl verify SNAPSHOT --accept-rollback."
    )


class StoreDamaged(EbsdError):
    code = "Ebsd.StoreDamaged"
    exit_status = ExitStatus.INTEGRITY
    template = "{file} is damaged: {reason}."


class SnapshotDamaged(EbsdError):
    code = "Ebsd.SnapshotDamaged"
    exit_status = ExitStatus.INTEGRITY
    template = "The last verification of {snapshot} found damage: {chunks} chunks, {files} other files."
    hint_template = (
        "Use another snapshot, or put the files back and verify again: ebsctl verify {snapshot}. To restore what is "
        "whole, under its own key: ebsctl create NAME --from {snapshot} --allow-damaged."
    )


class DamageFound(EbsdError):
    code = "Ebsd.DamageFound"
    exit_status = ExitStatus.INTEGRITY
    template = "{resource} is damaged: {chunks} chunks, {files} other files."
    hint_template = "`ebsctl verify {resource}` lists the damage; `ebsctl show {resource}` tells what was found last."


class ArchiveDamaged(EbsdError):
    code = "Ebsd.ArchiveDamaged"
    exit_status = ExitStatus.INTEGRITY
    template = "The archive cannot be trusted: {reason}."
    hint_template = "Nothing of it can be used. Fetch it again from where it was kept, or export the snapshot again."


class UnsupportedFormat(EbsdError):
    code = "Ebsd.UnsupportedFormat"
    exit_status = ExitStatus.INTEGRITY
    template = "{file} has {what}, which this version does not know."
    hint_template = "It was written by a newer ebsd; use that version."


# --- host and service -------------------------------------------------------------------------------------


class NoSpace(EbsdError):
    code = "Ebsd.NoSpace"
    exit_status = ExitStatus.NO_SPACE
    template = "There is not enough space {where}."
    hint_template = (
        "Nothing was lost. Delete snapshots or volumes, or grow the file system. What `ebsctl recycle-bin list` shows "
        "takes space, too: ebsctl delete ID --permanently."
    )


class AuditLogFull(EbsdError):
    """Has the code of NoSpace, so that ends and undoings draw on the ballast for their records, too."""

    code = "Ebsd.NoSpace"
    exit_status = ExitStatus.NO_SPACE
    template = "The operation was refused: there is no space to record it in the audit log of the key service."
    hint_template = "Delete snapshots or volumes, grow the file system, or move old log-*.jsonl files off this host."


class AuditLogUnavailable(EbsdError):
    code = "Ebsd.AuditLogUnavailable"
    exit_status = ExitStatus.KEY_UNAVAILABLE
    template = "The operation was refused: it cannot be recorded in the audit log of the key service ({reason})."
    hint_template = "The log of ebsd says more. Attached volumes are not affected."


class ImageUnusable(EbsdError):
    """What was given to import, or as the place of an export, cannot serve as an image."""

    code = "Ebsd.ImageUnusable"
    exit_status = ExitStatus.FAILED
    template = "The image cannot be used: {reason}."
    hint_template = "{remedy}"


class ImageChanged(EbsdError):
    """An image is not what it was when its import began."""

    code = "Ebsd.ImageChanged"
    exit_status = ExitStatus.CONFLICT
    template = "The image changed while it was imported: {reason}."
    hint_template = "Import it again when nobody writes to it; a copy or snapshot of it will do."


class OutputExists(EbsdError):
    code = "Ebsd.OutputExists"
    exit_status = ExitStatus.CONFLICT
    template = "{file} is there already."
    hint_template = "--force replaces a file, and overwrites a device."


class OutputClosed(EbsdError):
    code = "Ebsd.OutputClosed"
    exit_status = ExitStatus.FAILED
    template = "Whoever reads the export has gone away before its end."
    hint_template = "What was written so far is not a whole image."


class HostFailure(EbsdError):
    """A call of the operating system failed: the disk, the file system, or a limit of the process."""

    code = "Ebsd.HostFailure"
    exit_status = ExitStatus.FAILED
    template = "The host failed {where}: {reason}."
    hint_template = (
        "The kernel's log (dmesg) says more. What was not finished is undone, at the next start at the latest."
    )


class WritesFailed(EbsdError):
    """The kernel could not write out what somebody wrote to a device."""

    code = "Ebsd.HostFailure"
    exit_status = ExitStatus.FAILED
    template = "Writes to {volume} failed before it was detached: {reason}."
    hint_template = (
        "The volume stays attached. What failed is lost unless it is written again: check the volume's own file "
        "system. Detach again to go on without it."
    )


class WritesLackedSpace(EbsdError):
    """As ``WritesFailed``, for want of space."""

    code = "Ebsd.NoSpace"
    exit_status = ExitStatus.NO_SPACE
    template = "There was not enough space for what was written to {volume} before it was detached."
    hint_template = (
        "The volume stays attached. Delete snapshots or volumes, or grow the file system; then write again what "
        "failed, and check the volume's own file system. Detach again to go on without it."
    )


class MemoryForMapMissing(EbsdError):
    code = "Ebsd.NoSpace"
    exit_status = ExitStatus.NO_SPACE
    template = "The live map of {volume} needs {need} bytes on {directory}, which cannot give them."
    hint_template = "Enlarge the tmpfs: mount -o remount,size=... {directory}."


class Timeout(EbsdError):
    code = "Ebsd.Timeout"
    exit_status = ExitStatus.TIMEOUT
    template = "{operation} did not finish within {seconds} seconds."


class VolumeNotAnswering(EbsdError):
    code = "Ebsd.VolumeNotAnswering"
    exit_status = ExitStatus.TIMEOUT
    template = "The volume process of {volume} does not answer: {reason}."
    hint_template = (
        "It may be stopped, or the host overloaded. Nothing is lost by that; commands on the volume work again as soon "
        "as it answers. `ebsctl detach --force {volume}` ends it."
    )


class EngineReplaced(VolumeNotAnswering):
    """What was asked of an engine that ended may have been done; another one serves the volume now."""


class DaemonUnreachable(EbsdError):
    code = "Ebsd.DaemonUnreachable"
    exit_status = ExitStatus.UNREACHABLE
    template = "No ebsd answers on {socket}: {reason}."
    hint_template = "Start it (`ebsd`, or `systemctl start ebsd`), or name its socket with --socket or EBSD_SOCKET."


class HostUnsupported(EbsdError):
    code = "Ebsd.HostUnsupported"
    exit_status = ExitStatus.FAILED
    template = "{reason}."
    hint_template = "{remedy}"


class AttachFailed(EbsdError):
    code = "Ebsd.AttachFailed"
    exit_status = ExitStatus.FAILED
    template = "Volume {volume} could not be attached: {reason}."
    hint_template = "{remedy}"


class CommandFailed(EbsdError):
    code = "Ebsd.CommandFailed"
    exit_status = ExitStatus.FAILED
    template = "`{command}` failed with exit status {status}: {output}"


class InRescue(EbsdError):
    code = "Ebsd.Rescue"
    exit_status = ExitStatus.FAILED
    template = "ebsd runs in rescue mode: {reason}."
    hint_template = (
        "`ebsctl doctor` says what is wrong. Only status, doctor, check and `key restore` work; "
        "`ebsctl check --rebuild-catalog` makes a new catalog."
    )


class ConfigurationError(EbsdError):
    code = "Ebsd.Configuration"
    exit_status = ExitStatus.USAGE
    template = "{file}: {reason}."


class ProtocolError(EbsdError):
    code = "Ebsd.Protocol"
    exit_status = ExitStatus.FAILED
    template = "The other side broke the protocol: {reason}."


class InternalFailure(EbsdError):
    """A bug: the log of the daemon has the traceback under the same incident number."""

    code = "InternalFailure"
    exit_status = ExitStatus.FAILED
    template = "The request failed unexpectedly (incident {incident})."
    hint_template = "This is a bug in ebsd; its log has the details under this incident number."


class TooManyConnections(EbsdError):
    code = "RequestLimitExceeded"
    exit_status = ExitStatus.FAILED
    template = "The user with uid {uid} has {limit} connections open already."


class NotSupported(EbsdError):
    code = "UnsupportedOperation"
    exit_status = ExitStatus.FAILED
    template = "{what} is not supported."
    hint_template = "{remedy}"


# --- EBS direct APIs --------------------------------------------------------------------------------------


class BlocksValidation(EbsdError):
    """What is wrong with a request for blocks; each with the reason that EBS gives (ValidationExceptionReason)."""

    code = "ValidationException"
    exit_status = ExitStatus.USAGE
    template = "{reason}."
    aws_reason = "INVALID_PARAMETER_VALUE"


class InvalidParameter(BlocksValidation):
    template = "The value of {parameter} is invalid: {reason}."


class BlockOutOfRange(BlocksValidation):
    aws_reason = "INVALID_BLOCK"
    template = "Block index {block} is beyond the volume size extent."


class ChecksumMismatch(BlocksValidation):
    aws_reason = "INVALID_BLOCK"
    template = "The data of block {block} does not have the checksum that was given."
    hint_template = (
        "It was changed on its way, or the checksum is not the SHA-256 of all 524288 bytes. Nothing was kept."
    )


class BlockDataUnusable(BlocksValidation):
    aws_reason = "INVALID_BLOCK"
    template = "The data cannot be used: {reason}."


class BlocksMissing(BlocksValidation):
    template = "{count} blocks were said to be written to {snapshot}, but {written} were."
    hint_template = "Write what is missing, and complete it again: nothing was changed."


class AggregateMismatch(BlocksValidation):
    template = "The blocks written to {snapshot} do not have the checksum that was given."
    hint_template = (
        "It is the SHA-256 of the 32-byte digests of all written blocks, in the order of their numbers. "
        "The snapshot stays pending: blocks can be written again."
    )


class InvalidBlockToken(BlocksValidation):
    aws_reason = "INVALID_BLOCK_TOKEN"
    template = "The block token is not that of block {block} of {snapshot}."
    hint_template = "Tokens come from ListSnapshotBlocks and ListChangedBlocks."


class BlockTokenExpired(BlocksValidation):
    aws_reason = "INVALID_BLOCK_TOKEN"
    template = "The token of block {block} has expired."
    hint_template = "Block tokens are good for seven days. List the blocks again."


class InvalidPageToken(BlocksValidation):
    aws_reason = "INVALID_PAGE_TOKEN"
    template = "The page token is none that a reply to the same request has given."


class PageTokenExpired(BlocksValidation):
    aws_reason = "INVALID_PAGE_TOKEN"
    template = "The page token has expired."
    hint_template = "Page tokens are good for an hour. Go on with StartingBlockIndex."


class UnrelatedSnapshots(BlocksValidation):
    aws_reason = "UNRELATED_SNAPSHOTS"
    template = "{first} and {second} are not related."
    hint_template = "Blocks are compared within one lineage: snapshots that share a data key (DataEncryptionKeyId)."


class ParentSizeMismatch(BlocksValidation):
    aws_reason = "INVALID_VOLUME_SIZE"
    template = "A snapshot of {size} bytes cannot have the parent {parent}, which has {parent_size}."


class SnapshotNotReadable(BlocksValidation):
    aws_reason = "INVALID_SNAPSHOT_ID"
    template = "The blocks of {snapshot} cannot be read: it is {state}."


class PublicSnapshotNotReadable(BlocksValidation):
    aws_reason = "INVALID_SNAPSHOT_ID"
    template = "The blocks of {snapshot} cannot be read: it is public, and not shared with you by name."
    hint_template = "Copy it (ebsctl copy), and read the copy."


class ForeignParent(BlocksValidation):
    aws_reason = "INVALID_SNAPSHOT_ID"
    template = "{snapshot} cannot be the parent: it belongs to another account."
    hint_template = "Copy it first (ebsctl copy), and name the copy as the parent."


class DirectSnapshotNotPending(BlocksValidation):
    aws_reason = "INVALID_SNAPSHOT_ID"
    template = "{snapshot} takes no blocks: it is {state}."
    hint_template = "Blocks are written to what StartSnapshot made, until CompleteSnapshot."


class DirectSnapshotTimedOut(BlocksValidation):
    aws_reason = "WRITE_REQUEST_TIMEOUT"
    template = "{snapshot} was given up and removed: no block came for {minutes} minutes."
    hint_template = "Start it again, with a longer Timeout."


class BlocksNotFound(EbsdError):
    """A snapshot that is not there, or that the caller may not see."""

    code = "ResourceNotFoundException"
    exit_status = ExitStatus.NOT_FOUND
    aws_reason = "SNAPSHOT_NOT_FOUND"
    template = "The snapshot '{snapshot}' does not exist."
    hint_template = "`ebsctl list snapshots` shows the snapshots you can see."


class BlocksNotOwned(EbsdError):
    """A snapshot that is shared with the caller, of which more was asked than to be read."""

    code = "AccessDeniedException"
    exit_status = ExitStatus.DENIED
    aws_reason = "UNAUTHORIZED_ACCOUNT"
    template = "The snapshot '{snapshot}' belongs to another account."
    hint_template = "Copy it (ebsctl copy), and name the copy."


class ClientTokenConflict(EbsdError):
    code = "ConflictException"
    exit_status = ExitStatus.CONFLICT
    template = "Another request with other parameters used this ClientToken."


class TooManyPendingSnapshots(EbsdError):
    code = "ServiceQuotaExceededException"
    exit_status = ExitStatus.CONFLICT
    aws_reason = "DEPENDENCY_SERVICE_QUOTA_EXCEEDED"
    template = "There are {limit} snapshots started and not completed already."
    hint_template = "Complete some of them, or delete them (ebsctl delete)."


class TooManyBlockWorkers(EbsdError):
    code = "RequestThrottledException"
    exit_status = ExitStatus.FAILED
    aws_reason = "RESOURCE_LEVEL_THROTTLE"
    template = "Blocks of {limit} snapshots are being read or written for you already."
    hint_template = "Try again when one of them is done."


def _all_kinds(kind: type[EbsdError]) -> list[type[EbsdError]]:
    return [kind, *(leaf for sub in kind.__subclasses__() for leaf in _all_kinds(sub))]


def error_kinds() -> list[type[EbsdError]]:
    """Return every error class that has a code, in the order of definition."""
    return [kind for kind in _all_kinds(EbsdError) if kind not in (EbsdError, RemoteError)]


EXIT_STATUS: dict[str, ExitStatus] = {kind.code: kind.exit_status for kind in error_kinds()}
"""AWS or ``Ebsd.`` code -> exit status of ``ebsctl``."""


def exit_status_of(code: str) -> ExitStatus:
    """Return the exit status for an error code; unknown codes are plain failures."""
    return EXIT_STATUS.get(code, ExitStatus.FAILED)
