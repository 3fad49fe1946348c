"""Shows that every wrong command is refused with its code, status, message and hint, and that nothing is lost by it.

Each row of the table is run with --json and without against one running daemon; after each run the list of volumes
is what it was, and a volume with data still holds them.
"""

from __future__ import annotations

import json
import mmap
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pytest
from installation import BIN, Installation, Outcome, installation, run

from ebsctl.cli import cli
from ebsctl.client import Client

STRANGER = 23456
MIB = 1 << 20
DATA = random.Random(20).randbytes(MIB // 2)
"""What the volumes `kept` and `idle` hold from offset 0."""

USAGE = ("AllocatedBytes", "SharedBytes", "UniqueBytes")
"""What a flush in the background may change."""

NO_VOLUME = "vol-00000000000000000"
NO_KEY = "00000000-0000-4000-8000-000000000000"


@dataclass
class World:
    """A daemon with volumes in every state that a wrong command could hurt, and words that rows may use."""

    ebsd: Installation
    words: dict[str, str] = field(default_factory=dict)

    @property
    def client(self) -> Client:
        return Client(str(self.ebsd.socket), timeout=30)

    def ctl_as(self, uid: int, *arguments: str) -> Outcome:
        """Run ebsctl as a user, without a terminal.

        In a fork of this process: the start of an interpreter would be most of the time these tests take.
        """
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            pid = os.fork()
            if pid == 0:
                _be_ebsctl(uid, output.fileno(), errors.fileno(), ["--socket", str(self.ebsd.socket), *arguments])
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            output.seek(0)
            errors.seek(0)
            return Outcome(status, output.read().decode(), errors.read().decode())

    def volumes(self) -> Any:
        """Return all volumes as root sees them, without what reading alone may change."""
        found = self.client.ec2("DescribeVolumes")["Volumes"]
        return [{k: v for k, v in volume.items() if k not in USAGE} for volume in found]

    def keys(self) -> Any:
        return self.client.kms("ListAliases")["Aliases"], self.client.kms("ListKeys")["Keys"]

    def device_of(self, name: str) -> str:
        volume = self.client.ec2("DescribeVolumes", VolumeIds=[name])["Volumes"][0]
        return str(volume["Attachments"][0]["Path"])

    def attached_for_a_while(self, name: str) -> AbstractContextManager[str]:
        return _attached(self, name)


def _be_ebsctl(uid: int, output: int, errors: int, arguments: list[str]) -> NoReturn:
    """Turn a forked process into ebsctl, run by the user; it ends with ebsctl's exit status."""
    status = 70
    try:
        signal.alarm(60)
        os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(errors, 2)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
        if uid:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        try:
            cli.main(arguments)
        except SystemExit as exc:
            status = int(exc.code or 0)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:  # noqa: BLE001 - a fork that returned would run the tests once more
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


@contextmanager
def _attached(world: World, name: str) -> Iterator[str]:
    world.ebsd.ok("attach", name)
    try:
        yield world.device_of(name)
    finally:
        world.ebsd.ok("detach", name)


def write_data(device: str) -> None:
    with open(device, "r+b") as file:
        file.write(DATA)
        os.fsync(file.fileno())


def read_data(device: str) -> bytes:
    """Read past the page cache, so that what comes is what the volume process has."""
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, len(DATA)) as buffer:
            done = 0
            while done < len(DATA):
                count = os.preadv(fd, [memoryview(buffer)[done:]], done)
                assert count, f"{device} ends at {done}"
                done += count
            return bytes(buffer)
    finally:
        os.close(fd)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    # Not below pytest's own directory, which other users may not enter.
    root = Path(tempfile.mkdtemp(prefix="ebsd-bad-"))
    root.chmod(0o755)
    try:
        with installation(root) as ebsd:
            made = World(ebsd)
            ebsd.ok("key", "create", "good")
            ebsd.ok("key", "create", "off")
            for name in ("kept", "idle", "blank", "tagged"):
                ebsd.ok("create", name, "--size", "8M")
            ebsd.ok("create", "locked", "--size", "8M", "--encrypted", "--key", "off")
            ebsd.ok("tag", "tagged", *(f"k{n}=v" for n in range(50)))
            with made.attached_for_a_while("idle") as device:
                write_data(device)
            ebsd.ok("attach", "kept")
            write_data(made.device_of("kept"))
            (root / "file").touch()
            stranger = made.ctl_as(STRANGER, "--json", "key", "create", "theirs")
            with made.attached_for_a_while("blank"):
                pass
            made.words = {
                "ROOT": str(root),
                "kept-id": ebsd.ctl_json("show", "kept")["VolumeId"],
                "kept-device": made.device_of("kept"),
                "good-id": ebsd.ctl_json("key", "show", "good")["KeyId"],
                "good-arn": ebsd.ctl_json("key", "show", "good")["Arn"],
                "their-arn": stranger.json["Arn"],
                "their-id": stranger.json["KeyId"],
                "instance": ebsd.ctl_json("show", "kept")["Attachments"][0]["InstanceId"],
            }
            ebsd.ok("key", "disable", "off")
            yield made
            ebsd.ok("key", "enable", "off")
    finally:
        shutil.rmtree(root)


# --- what stands while a row is run -----------------------------------------------------------------------


@contextmanager
def unencrypted_by_default(world: World) -> Iterator[None]:
    world.ebsd.ok("defaults", "disable-encryption")
    try:
        yield
    finally:
        world.ebsd.ok("defaults", "enable-encryption")


@contextmanager
def nothing_attached_of_the_caller(world: World) -> Iterator[None]:
    """For `detach --all`: root's own attached volume is put away meanwhile."""
    world.ebsd.ok("detach", "kept")
    try:
        yield
    finally:
        world.ebsd.ok("attach", "kept")


def nothing_special(_world: World) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass(frozen=True)
class Row:
    """One wrong command: words in braces stand for things of the World."""

    what: str
    arguments: tuple[str, ...]
    code: str
    status: int
    message: str
    hint: str = ""
    uid: int = 0
    given: Callable[[World], AbstractContextManager[None]] = nothing_special


def row(
    what: str, command: str | tuple[str, ...], code: str, status: int, message: str, hint: str = "", **more: Any
) -> Row:
    arguments = tuple(command.split()) if isinstance(command, str) else command
    return Row(what, arguments, code, status, message, hint, **more)


def _each_volume_command(what: str, name: str, code: str, message: str, hint: str) -> list[Row]:
    commands = {
        "attach": ("attach", name),
        "detach": ("detach", name),
        "show": ("show", name),
        "delete": ("delete", name, "--yes"),
        "rename": ("rename", name, "other"),
        "tag": ("tag", name, "a=b"),
    }
    return [
        # What is not attached or detached may be a snapshot as well, so that the answer is EC2's for any resource.
        row(f"{verb} {what}", words, NO_ID if code == NO_SUCH and "tach" not in verb else code, 3, message, hint)
        for verb, words in commands.items()
    ]


SIZE_HINT = "powers of 1024"
NAME_HINT = "1 to 63 characters"
TAG_HINT = "KEY=VALUE"
NO_SUCH = "InvalidVolume.NotFound"
NO_ID = "InvalidID"
VALUE = "InvalidParameterValue"


def _sizes() -> list[Row]:
    wrong = {
        "0": "positive",
        "-1": "not a number",
        "4097": "smallest volume is 1 MiB",
        str(MIB - 4096): "smallest volume is 1 MiB",
        str(MIB + 1): "multiple of the sector",
        "65T": "largest volume is 64 TiB",
        str((64 << 40) + 4096): "largest volume is 64 TiB",
        "10X": "not a number",
        "": "not a number",
        " ": "not a number",
        "1.5G": "not a number",
        "1e9": "not a number",
        "10 G": "not a number",
        "+8M": "not a number",
        "\u0661\u0662M": "not a number",
        "9" * 20: "largest volume is 64 TiB",
        "9" * 20 + "T": "largest volume is 64 TiB",
        "9" * 21: "not a number",
    }
    return [
        row(f"create with size {size!a}", ("create", "new", f"--size={size}"), VALUE, 2, reason, SIZE_HINT)
        for size, reason in wrong.items()
    ]


def _names() -> list[Row]:
    wrong = {
        "vol-1": "reads like an id",
        "vol-0123456789abcdef0": "reads like an id",
        "snap-0123456789abcdef0": "reads like an id",
        "VOL-x": "reads like an id",
        "i-0123456789abcdef0": "reads like an id",
        "key-x": "reads like an id",
        "mrk-x": "reads like an id",
        "arn:aws:ec2:local:000000000000:volume/vol-1": "reads like an id, an ARN",
        "alias/x": "an alias",
        "-lead": "characters or a length",
        "--": "characters or a length",
        ".lead": "characters or a length",
        "../up": "characters or a length",
        "a/b": "characters or a length",
        "a@b": "characters or a length",
        "a b": "characters or a length",
        "new\n": "characters or a length",
        "a\x1b[31mb": "characters or a length",
        "a\x01b": "characters or a length",
        "\u00e4": "characters or a length",
        "": "characters or a length",
        "a" * 64: "characters or a length",
        "a" * 100_000: "characters or a length",
    }
    return [
        row(f"{verb} the name {name[:24]!a} of {len(name)}", (*words, "--", *before, name), VALUE, 2, reason, NAME_HINT)
        for name, reason in wrong.items()
        for verb, words, before in (("create", ("create", "--size", "8M"), ()), ("rename to", ("rename",), ("idle",)))
        if verb == "create" or name in ("vol-1", "-lead", "a@b", "")
    ]


ROWS: list[Row] = [
    # Volumes that are not there, and ids of the wrong kind.
    *_each_volume_command("a name nobody has", "nobody", NO_SUCH, "'nobody'", "`ebsctl list`"),
    row("show an id nobody has", f"show {NO_VOLUME}", NO_SUCH, 3, NO_VOLUME, "`ebsctl list`"),
    row("detach an id nobody has", f"detach {NO_VOLUME} --force", NO_SUCH, 3, NO_VOLUME, "`ebsctl list`"),
    *_each_volume_command("a malformed id", "vol-123", "InvalidVolumeID.Malformed", '"vol-123"', "17 hexadecimal"),
    row("attach a snapshot's id", "attach snap-0123456789abcdef0", NO_SUCH, 3, "snap-0123456789abcdef0"),
    row("detach a snapshot's id", "detach snap-0123456789abcdef0", NO_SUCH, 3, "snap-0123456789abcdef0"),
    row("attach an instance's id", "attach {instance}", NO_SUCH, 3, "{instance}", "`ebsctl list`"),
    row("detach an instance's id", "detach {instance}", NO_SUCH, 3, "{instance}", "`ebsctl list`"),
    *[
        row(
            f"{verb} a key's id",
            (verb, "{good-id}", *rest),
            NO_SUCH if "tach" in verb else NO_ID,
            3,
            "{good-id}",
            "`ebsctl list`",
        )
        for verb, rest in {"attach": (), "detach": (), "delete": ("--yes",), "rename": ("x",), "tag": ("a=b",)}.items()
    ],
    row("show a key's id that is none", f"show {NO_KEY}", "NotFoundException", 3, NO_KEY, "`ebsctl key list`"),
    row("attach an id in capitals", "attach VOL-00000000000000000", NO_SUCH, 3, "VOL-", "`ebsctl list`"),
    row("attach an id with a digit too many", f"attach {NO_VOLUME}0", "InvalidVolumeID.Malformed", 3, NO_VOLUME, "17"),
    row("attach an id with a line feed", ("attach", f"{NO_VOLUME}\n"), "InvalidVolumeID.Malformed", 3, NO_VOLUME, "17"),
    row("attach nothing by name", ("attach", ""), NO_SUCH, 3, "''", "`ebsctl list`"),
    row("attach a pattern", ("attach", "*"), NO_SUCH, 3, "'*'", "`ebsctl list`"),
    row("attach with control characters", ("attach", "a\x1b[2Jb"), NO_SUCH, 3, "does not exist", "`ebsctl list`"),
    row("show nothing", "show", "Usage", 2, "Missing argument 'ID'", "--help"),
    row("show nothing by name", ("show", ""), NO_ID, 3, "''", "`ebsctl list`"),
    # Sizes, names, tags, filters, commands.
    *_sizes(),
    row("create without a size", "create new", "Usage", 2, "--size", "--help"),
    *_names(),
    row(
        "create a name in use", "create kept --size 8M", "Ebsd.NameInUse", 4, "'kept' is in use by {kept-id}", "rename"
    ),
    row(
        "rename to a name in use",
        "rename idle kept",
        "Ebsd.NameInUse",
        4,
        "'kept' is in use by {kept-id}",
        "another name",
    ),
    row("tag without =", "tag idle word", VALUE, 2, "it has no '='", TAG_HINT),
    row("tag without a key", "tag idle =x", VALUE, 2, "1 to 128 characters", TAG_HINT),
    row("tag in AWS's part", "tag idle aws:x=1", VALUE, 2, "'aws:' are reserved", TAG_HINT),
    row("tag in AWS's part, in capitals", "tag idle AWS:x=1", VALUE, 2, "'aws:' are reserved", TAG_HINT),
    row("tag with a key too long", f"tag idle {'k' * 129}=v", VALUE, 2, "1 to 128 characters", TAG_HINT),
    row("tag with a value too long", f"tag idle k={'v' * 257}", VALUE, 2, "at most 256", TAG_HINT),
    row("tag twice", "tag idle a=1 a=2", VALUE, 2, "given twice", TAG_HINT),
    row("tag a 51st time", "tag tagged one-more=x", "TagLimitExceeded", 2, "more than 50 tags"),
    row(
        "create with 51 tags",
        ("create", "new", "--size=8M", *(f"--tag=t{n}=x" for n in range(51))),
        "TagLimitExceeded",
        2,
        "more than 50 tags",
    ),
    row("create with a tag of AWS's", "create new --size 8M --tag aws:x=1", VALUE, 2, "reserved", TAG_HINT),
    row("create with a tag without =", "create new --size 8M --tag word", VALUE, 2, "KEY=VALUE"),
    row(
        "create with a context of ours",
        "create new --size 8M --context ebsd:format=x",
        "ValidationException",
        2,
        "ebsd:",
    ),
    row(
        "create with a context of AWS's",
        "create new --size 8M --context aws:ebs:id=x",
        "ValidationException",
        2,
        "aws:",
    ),
    row("filter by what is not", "list --filter flavour=x", VALUE, 2, "The filter 'flavour' is invalid", "tag:KEY"),
    row("filter without =", "list --filter status", VALUE, 2, "NAME=VALUE"),
    row("filter keys by what is not", "list keys --filter flavour=x", VALUE, 2, "keys can be filtered by"),
    row("list what is not", "list volcanoes", "Usage", 2, "'volcanoes' is not one of", "--help"),
    row("a command that is not", "frobnicate", "Usage", 2, "No such command 'frobnicate'", "`ebsctl --help`"),
    row("an option that is not", "list --frobnicate", "Usage", 2, "--frobnicate", "--help"),
    row("too many arguments", "show kept idle", "Usage", 2, "idle", "--help"),
    # Attach and detach.
    row("attach twice", "attach kept", "VolumeInUse", 4, "already attached", "{kept-device}"),
    row("attach twice, as a file", "attach kept --file", "VolumeInUse", 4, "already attached", "{kept-device}"),
    row("attach twice, to format", "attach kept --mkfs ext4", "VolumeInUse", 4, "already attached", "{kept-device}"),
    row("attach twice, to mount", "attach kept --mount {ROOT}/there", "VolumeInUse", 4, "already attached"),
    row("detach what is not attached", "detach idle", "IncorrectState", 4, "'available' state", "ebsctl show"),
    row("force-detach what is not attached", "detach idle --force", "IncorrectState", 4, "'available' state", "show"),
    row("detach nothing", "detach", "Usage", 2, "--all", "`ebsctl list`"),
    row("detach one and all", "detach kept --all", "Usage", 2, "--all", "`ebsctl list`"),
    row("format what holds data", "attach idle --mkfs ext4", "Ebsd.NotBlank", 4, "holds data", "without --mkfs"),
    row(
        "format and mount what holds data",
        "attach idle --mkfs ext4 --mount {ROOT}/there",
        "Ebsd.NotBlank",
        4,
        "holds data",
        "without --mkfs",
    ),
    row("format what holds data, as a file", "attach idle --file --mkfs xfs", "Ebsd.NotBlank", 4, "holds data", "mkfs"),
    row("format with what is not", "attach blank --mkfs zfs", "Usage", 2, "'zfs' is not one of 'ext4'", "--help"),
    row(
        "format what may not be written", "attach blank --mkfs ext4 --read-only", "Usage", 2, "--read-only", "Attach it"
    ),
    row(
        "mount what has no file system",
        "attach idle --mount {ROOT}/there",
        "Ebsd.AttachFailed",
        1,
        "no ext4, xfs, btrfs file system",
        "without --mount",
    ),
    row("mount what is blank", "attach blank --mount {ROOT}/there", "Ebsd.AttachFailed", 1, "no ext4", "--mkfs ext4"),
    row("mount on a file", "attach blank --mount {ROOT}/file", VALUE, 2, "not a directory"),
    row("mount below a file", "attach blank --mount {ROOT}/file/x", VALUE, 2, "Not a directory"),
    row(
        "mount on a mount point",
        "attach blank --mkfs ext4 --mount /proc",
        "IncorrectState",
        4,
        "mounted on /proc already",
    ),
    row("mount where nothing can be made", "attach blank --mkfs ext4 --mount /proc/none", VALUE, 2, "No such file"),
    row(
        "mount a file",
        "attach blank --file --mount {ROOT}/there",
        "Usage",
        2,
        "--mount cannot be used with --file",
        "fuse2fs",
    ),
    # Delete.
    row(
        "delete what is attached",
        "delete kept --yes",
        "VolumeInUse",
        4,
        "{kept-id} is currently attached",
        "ebsctl detach {kept-id}",
    ),
    row("delete without --yes or a terminal", "delete idle", "Usage", 2, "needs a confirmation", "--yes"),
    row("delete nothing", "delete --yes", "Usage", 2, "Missing argument 'ID'", "--help"),
    # Encryption and keys.
    row(
        "a key without --encrypted",
        "create new --size 8M --key good",
        "InvalidParameterDependency",
        2,
        "KmsKeyId requires the parameter Encrypted",
        "--encrypted",
    ),
    row(
        "a key with --no-encrypted",
        "create new --size 8M --no-encrypted --key good",
        "InvalidParameterDependency",
        2,
        "KmsKeyId requires the parameter Encrypted",
        "--encrypted",
    ),
    row(
        "--no-encrypted where that is not allowed",
        "create new --size 8M --no-encrypted",
        "OperationNotPermitted",
        4,
        "does not allow unencrypted volumes",
        "allow_unencrypted",
        given=unencrypted_by_default,
    ),
    row(
        "no word on encryption where it must be",
        "create new --size 8M",
        "OperationNotPermitted",
        4,
        "does not allow unencrypted volumes",
        "--encrypted",
        given=unencrypted_by_default,
    ),
    row(
        "an alias that is not",
        "create new --size 8M --encrypted --key none",
        "NotFoundException",
        3,
        "alias/none is not found",
        "key alias list",
    ),
    row(
        "a key id that is not",
        f"create new --size 8M --encrypted --key {NO_KEY}",
        "NotFoundException",
        3,
        NO_KEY,
        "`ebsctl key list`",
    ),
    row(
        "a volume as a key",
        "create new --size 8M --encrypted --key {kept-id}",
        "NotFoundException",
        3,
        "{kept-id}",
        "key",
    ),
    row(
        "a malformed ARN as a key",
        "create new --size 8M --encrypted --key arn:aws:kms:x",
        "InvalidArnException",
        3,
        "arn:aws:kms:x",
    ),
    row(
        "a disabled key",
        "create new --size 8M --encrypted --key off",
        "DisabledException",
        6,
        "is disabled",
        "ebsctl key enable",
    ),
    row("a disabled key as the default", "defaults set-key off", "DisabledException", 6, "is disabled", "key enable"),
    row("a default key that is not", "defaults set-key none", "NotFoundException", 3, "alias/none", "key alias list"),
    row(
        "a key of another user, by ARN",
        "create new --size 8M --encrypted --key {good-arn}",
        "AccessDeniedException",
        5,
        "not authorized",
        uid=STRANGER,
    ),
    row(
        "a key of another user, by id",
        "create new --size 8M --encrypted --key {good-id}",
        "NotFoundException",
        3,
        "{good-id}",
        "key list",
        uid=STRANGER,
    ),
    row(
        "a key of another user, by alias",
        "create new --size 8M --encrypted --key good",
        "NotFoundException",
        3,
        f"{STRANGER:012d}:alias/good",
        "key alias list",
        uid=STRANGER,
    ),
    row(
        "show a key of another user", "key show {good-arn}", "AccessDeniedException", 5, "not authorized", uid=STRANGER
    ),
    row(
        "disable a key of another user",
        "key disable {good-arn}",
        "AccessDeniedException",
        5,
        "not authorized",
        uid=STRANGER,
    ),
    row(
        "attach what the key forbids", "attach locked", "CustomerKeyHasBeenRevoked", 6, "is disabled", "ebsctl key show"
    ),
    row("disable AWS's key", "key disable alias/aws/ebs", "AccessDeniedException", 5, "AWS managed key"),
    row(
        "a reserved alias",
        "key create alias/aws/mine",
        "InvalidAliasNameException",
        2,
        "alias/aws/ is reserved",
        "alias/",
    ),
    row("a reserved alias for a key", "key alias create aws/mine good", "InvalidAliasNameException", 2, "reserved"),
    row("delete AWS's alias", "key alias delete alias/aws/ebs", "InvalidAliasNameException", 2, "reserved"),
    row("an alias that exists", "key create good", "AlreadyExistsException", 4, "alias/good already exists", "update"),
    row(
        "an alias that exists for a key",
        "key alias create good good",
        "AlreadyExistsException",
        4,
        "already exists",
        "update",
    ),
    *[
        row(
            f"the alias {alias[:12]!a}",
            ("key", "create", "--", alias),
            "InvalidAliasNameException",
            2,
            "characters or a length",
            "a-z, A-Z, 0-9",
        )
        for alias in ("a b", "a:b", "a.b", "\u00e4", "a\n", "", "alias/", "x" * 251)
    ],
    row("move an alias that is not", "key alias update none good", "NotFoundException", 3, "alias/none", "alias list"),
    row("delete an alias that is not", "key alias delete none", "NotFoundException", 3, "alias/none", "alias list"),
    row(
        "an alias for a key that is not", f"key alias create fresh {NO_KEY}", "NotFoundException", 3, NO_KEY, "key list"
    ),
    row(
        "a key of a spec for no volume",
        "key create odd --spec RSA_2048",
        "UnsupportedOperationException",
        2,
        "RSA_2048",
    ),
    # Volumes of others.
    *[
        row(
            f"{words[0]} {words[1]} of another user", words, NO_SUCH, 3, "does not exist", "`ebsctl list`", uid=STRANGER
        )
        for words in (
            ("attach", "{kept-id}", "--file"),
            ("detach", "{kept-id}"),
            ("detach", "kept", "--force"),
            ("show", "{kept-id}"),
            ("delete", "{kept-id}", "--yes"),
            ("rename", "{kept-id}", "mine"),
            ("tag", "{kept-id}", "a=b"),
        )
    ],
    row("show kept of another user", "show kept", NO_ID, 3, "'kept'", "`ebsctl list`", uid=STRANGER),
]


def test_no_two_rows_are_about_the_same() -> None:
    names = [entry.what for entry in ROWS]
    assert sorted(set(names)) == sorted(names)


def filled(text: str, words: dict[str, str]) -> str:
    for name, value in words.items():
        text = text.replace("{" + name + "}", value)
    return text


def check_json(entry: Row, outcome: Outcome, message: str, hint: str) -> None:
    error = json.loads(outcome.stderr)
    assert set(error) == {"Code", "Message", "Hint"}
    assert error["Code"] == entry.code
    assert message in error["Message"]
    assert hint in error["Hint"]


def check_plain(entry: Row, outcome: Outcome, message: str, hint: str) -> None:
    lines = outcome.stderr.splitlines()
    while lines and lines[0].startswith(("Usage: ", "note: ", "       ")):
        lines.pop(0)
    assert lines[0].startswith("error: "), outcome.stderr
    assert message in lines[0]
    if entry.code != "Usage":
        assert lines[0].endswith(f"[{entry.code}]")
    if hint:
        assert lines[1].startswith("hint: ")
        assert hint in lines[1]
    assert len(lines) <= 2, outcome.stderr
    assert "\x1b" not in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize("entry", ROWS, ids=lambda entry: entry.what.replace(" ", "-"))
def test_a_wrong_command_is_refused_and_nothing_is_lost(world: World, entry: Row) -> None:
    arguments = [filled(argument, world.words) for argument in entry.arguments]
    message, hint = filled(entry.message, world.words), filled(entry.hint, world.words)
    with entry.given(world):
        volumes, keys = world.volumes(), world.keys()
        for as_json in (True, False):
            outcome = world.ctl_as(entry.uid, *(["--json"] if as_json else []), *arguments)
            if outcome.status == 0:
                world.ctl_as(entry.uid, "delete", "new", "--yes")
            assert outcome.status == entry.status, outcome
            assert outcome.stdout == ""
            (check_json if as_json else check_plain)(entry, outcome, message, hint)
            assert world.volumes() == volumes
            assert world.keys() == keys
            assert read_data(world.words["kept-device"]) == DATA
    assert not (world.ebsd.root / "there").exists()
    assert "incident" not in world.ebsd.log.read_text(), world.ebsd.log.read_text()[-3000:]


def test_after_all_of_that_the_data_of_the_idle_volume_is_there_and_verified(world: World) -> None:
    with world.attached_for_a_while("idle") as device:
        assert world.ebsd.ctl_json("show", "idle")["Integrity"] == "verified"
        assert read_data(device) == DATA
    with world.attached_for_a_while("blank") as device:
        assert read_data(device) == bytes(len(DATA))


# --- a volume that somebody uses --------------------------------------------------------------------------


def check_busy(world: World, name: str, told: str) -> None:
    """See that detach is refused in both forms, that nothing changed, and that the volume is as usable as before."""
    before = world.ebsd.ctl_json("show", name)
    status, error = world.ebsd.refused("detach", name)
    assert (status, error["Code"]) == (4, "Ebsd.VolumeBusy")
    assert told in error["Message"]
    assert "fuser" in error["Hint"]
    plain = world.ebsd.ctl("detach", name)
    assert plain.status == 4
    assert "[Ebsd.VolumeBusy]\nhint: " in plain.stderr
    status, error = world.ebsd.refused("delete", name, "--yes")
    assert (status, error["Code"]) == (4, "VolumeInUse")
    status, error = world.ebsd.refused("attach", name)
    assert (status, error["Code"]) == (4, "VolumeInUse")
    after = world.ebsd.ctl_json("show", name)
    for attachment in (*before["Attachments"], *after["Attachments"]):
        assert attachment.pop("State") in ("attached", "busy")
    for volume in (before, after):
        for member in USAGE:
            volume.pop(member, None)
    assert after == before
    assert after["State"] == "in-use"


def formatted(world: World, name: str) -> str:
    world.ebsd.ok("create", name, "--size", "32M")
    world.ebsd.ok("attach", name, "--mkfs", "ext4")
    return world.device_of(name)


def detach_soon(world: World, name: str) -> None:
    """Detach what was let go a moment ago."""
    deadline = time.monotonic() + 10
    while (outcome := world.ebsd.ctl("detach", name)).status:
        assert time.monotonic() < deadline, outcome.stderr
        time.sleep(0.1)


def test_detach_is_refused_while_the_volume_is_mounted_by_hand(world: World, tmp_path: Path) -> None:
    device = formatted(world, "by-hand")
    run("mount", device, tmp_path)
    try:
        (tmp_path / "before").write_bytes(DATA)
        check_busy(world, "by-hand", f"mounted on {tmp_path}")
        assert (tmp_path / "before").read_bytes() == DATA
        (tmp_path / "after").write_bytes(DATA)
    finally:
        run("umount", tmp_path)
    world.ebsd.ok("detach", "by-hand")
    world.ebsd.ok("attach", "by-hand", "--mount", str(tmp_path))
    assert (tmp_path / "before").read_bytes() == (tmp_path / "after").read_bytes() == DATA
    world.ebsd.ok("detach", "by-hand")
    world.ebsd.ok("delete", "by-hand", "--yes")


def test_detach_is_refused_while_a_second_mount_of_the_volume_stands(world: World, tmp_path: Path) -> None:
    ours, second = tmp_path / "ours", tmp_path / "second"
    second.mkdir()
    world.ebsd.ok("create", "twice", "--size", "32M")
    world.ebsd.ok("attach", "twice", "--mkfs", "ext4", "--mount", str(ours))
    run("mount", world.device_of("twice"), second)
    try:
        (second / "file").write_bytes(DATA)
        status, error = world.ebsd.refused("detach", "twice")
        assert (status, error["Code"]) == (4, "Ebsd.VolumeBusy")
        assert f"mounted on {second}" in error["Message"]
        assert f"{ours} was unmounted before this" in error["Hint"]
        assert (second / "file").read_bytes() == DATA
    finally:
        run("umount", second)
    world.ebsd.ok("detach", "twice")
    world.ebsd.ok("delete", "twice", "--yes")


def test_detach_is_refused_while_files_on_the_mounted_volume_are_open(world: World, tmp_path: Path) -> None:
    world.ebsd.ok("create", "open-file", "--size", "32M")
    world.ebsd.ok("attach", "open-file", "--mkfs", "ext4", "--mount", str(tmp_path))
    with (tmp_path / "file").open("w+b") as file:
        check_busy(world, "open-file", f"{tmp_path} is in use")
        file.write(DATA)
        assert tmp_path.is_mount()
    world.ebsd.ok("detach", "open-file")
    world.ebsd.ok("attach", "open-file", "--mount", str(tmp_path))
    assert (tmp_path / "file").read_bytes() == DATA
    world.ebsd.ok("detach", "open-file")
    world.ebsd.ok("delete", "open-file", "--yes")


def test_detach_is_refused_while_the_volume_is_mounted_in_another_namespace(world: World, tmp_path: Path) -> None:
    device = formatted(world, "elsewhere")
    # Mounts that the namespace got from here are dropped: other volumes would be busy for as long as it lives.
    script = f"""
        awk '{{ for (i = 7; $i != "-"; i++); if ($(i+1) == "fuse.ebsd" || $(i+2) ~ /loop/) print $5 }}' \\
            /proc/self/mountinfo | tac | while read -r place; do umount -l "$place" 2>/dev/null; done || true
        mount {device} {tmp_path} && echo mounted
        read -r _ && echo more > {tmp_path}/file && sync && exec cat {tmp_path}/file
    """
    elsewhere = subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "bash", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert elsewhere.stdin is not None
        assert elsewhere.stdout is not None
        assert elsewhere.stdout.readline() == "mounted\n"
        check_busy(world, "elsewhere", "another mount namespace")
        elsewhere.stdin.write("go on\n")
        elsewhere.stdin.flush()
        assert elsewhere.stdout.readline() == "more\n"
    finally:
        elsewhere.kill()
        elsewhere.communicate()
    detach_soon(world, "elsewhere")
    world.ebsd.ok("attach", "elsewhere", "--mount", str(tmp_path))
    assert (tmp_path / "file").read_text() == "more\n"
    world.ebsd.ok("detach", "elsewhere")
    world.ebsd.ok("delete", "elsewhere", "--yes")


@pytest.mark.parametrize("mode", ["<", "<>"], ids=["to-read", "to-write"])
def test_detach_is_refused_while_a_process_holds_the_device_open(world: World, mode: str) -> None:
    world.ebsd.ok("create", "held", "--size", "8M")
    world.ebsd.ok("attach", "held")
    device = world.device_of("held")
    holder = subprocess.Popen(
        ["bash", "-c", f'exec 7{mode}"$0"; echo open; exec sleep 600', device], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "open\n"
        check_busy(world, "held", "a process has the device open")
        write_data(device)
        assert read_data(device) == DATA
    finally:
        holder.kill()
        holder.communicate()
    time.sleep(0.5)
    try:
        assert read_data(device) == DATA, "the refused detach left the device set to go at its last close"
    except BaseException:
        world.ebsd.ctl("detach", "held", "--force")
        world.ebsd.ctl("delete", "held", "--yes")
        raise
    detach_soon(world, "held")
    with world.attached_for_a_while("held") as again:
        assert read_data(again) == DATA
    world.ebsd.ok("delete", "held", "--yes")


# --- keys that go away, accounts, and what is no error ----------------------------------------------------


def test_a_disabled_key_stops_attaching_but_not_what_is_attached(world: World) -> None:
    ebsd = world.ebsd
    ebsd.ok("key", "create", "switched")
    for name in ("running", "resting"):
        ebsd.ok("create", name, "--size", "8M", "--encrypted", "--key", "switched")
    ebsd.ok("attach", "resting")
    write_data(world.device_of("resting"))
    ebsd.ok("detach", "resting")
    ebsd.ok("attach", "running")

    ebsd.ok("key", "disable", "switched")
    status, error = ebsd.refused("attach", "resting")
    assert (status, error["Code"]) == (6, "CustomerKeyHasBeenRevoked")
    assert ebsd.ctl_json("show", "resting")["State"] == "available"
    assert ebsd.ctl_json("show", "resting")["Attachments"] == []
    device = world.device_of("running")
    write_data(device)
    assert read_data(device) == DATA
    ebsd.ok("detach", "running")
    assert ebsd.refused("attach", "running")[0] == 6

    ebsd.ok("key", "enable", "switched")
    for name in ("running", "resting"):
        with world.attached_for_a_while(name) as device:
            assert ebsd.ctl_json("show", name)["Integrity"] == "verified"
            assert read_data(device) == DATA
        ebsd.ok("delete", name, "--yes")


def test_no_encrypted_does_not_overrule_encryption_by_default(world: World) -> None:
    outcome = world.ebsd.ctl("create", "overruled", "--size", "8M", "--no-encrypted")
    assert outcome.status == 0
    assert "note: The volume is encrypted: encryption by default is on" in outcome.stderr
    shown = world.ebsd.ctl_json("show", "overruled")
    assert shown["Encrypted"] is True
    assert shown["KmsKeyId"].startswith("arn:aws:kms:local:000000000000:key/")
    world.ebsd.ok("delete", "overruled", "--yes")


def test_volumes_keys_and_names_of_root_do_not_exist_for_another_user(world: World) -> None:
    assert world.ctl_as(STRANGER, "--json", "list").json == {"Volumes": []}
    listed = world.ctl_as(STRANGER, "--json", "list", "keys").json["Keys"]
    assert [key["AWSAccountId"] for key in listed] == [f"{STRANGER:012d}"] * len(listed)
    assert world.ctl_as(STRANGER, "--json", "status").json["Volumes"] == 0
    made = world.ctl_as(STRANGER, "--json", "create", "kept", "--size", "8M")
    assert made.status == 0, "the name `kept` of root must not be in anybody's way"
    assert made.json["OwnerId"] == f"{STRANGER:012d}"
    assert world.ctl_as(STRANGER, "--json", "show", "kept").json["VolumeId"] == made.json["VolumeId"]
    status, error = world.ctl_as(STRANGER, "--json", "attach", "kept").status, "ebsctl attach --file"
    assert status == 5
    assert error in world.ctl_as(STRANGER, "attach", "kept").stderr
    assert world.ctl_as(STRANGER, "delete", "kept", "--yes").status == 0
    assert world.ebsd.ctl_json("show", "kept")["VolumeId"] == world.words["kept-id"]


def test_detach_all_of_another_user_leaves_roots_volumes_attached(world: World) -> None:
    outcome = world.ctl_as(STRANGER, "--json", "detach", "--all")
    assert (outcome.status, outcome.json) == (0, {"Volumes": [], "Unsuccessful": []})
    assert read_data(world.words["kept-device"]) == DATA


def test_detach_all_with_nothing_attached_is_no_error(world: World) -> None:
    with nothing_attached_of_the_caller(world):
        outcome = world.ebsd.ctl("--json", "detach", "--all")
        assert (outcome.status, outcome.json) == (0, {"Volumes": [], "Unsuccessful": []})
        assert world.ebsd.ctl("detach", "--all").status == 0
    assert read_data(world.device_of("kept")) == DATA


def test_delete_asks_on_a_terminal_and_takes_only_a_yes(world: World) -> None:
    before = world.volumes()
    for answer in (b"\n", b"no\n", b"\x04"):
        ours, theirs = pty.openpty()
        with os.fdopen(ours, "r+b", buffering=0) as terminal:
            process = subprocess.Popen(
                [BIN / "ebsctl", "--socket", world.ebsd.socket, "delete", "idle"],
                stdin=theirs,
                stderr=theirs,
                stdout=subprocess.PIPE,
                start_new_session=True,
            )
            os.close(theirs)
            terminal.write(answer)
            assert process.wait(30) == 1
            told = terminal.read(4096)
            assert process.communicate()[0] == b""
        assert b"Delete volume idle" in told
        assert world.volumes() == before


def test_a_volume_renamed_while_attached_leaves_no_link_of_its_old_name(world: World) -> None:
    """A link that stays would lead to whichever volume gets this loop device next."""
    names = [f"link-{os.getpid()}-{which}" for which in ("old", "new")]
    world.ebsd.ok("create", names[0], "--size", "8M")
    world.ebsd.ok("attach", names[0])
    device = world.device_of(names[0])
    links = [Path("/dev/ebsd") / name for name in names]
    assert os.readlink(links[0]) == device
    world.ebsd.ok("rename", *names)
    world.ebsd.ok("detach", names[1])
    world.ebsd.ok("delete", names[1], "--yes")
    try:
        assert [str(link) for link in links if link.is_symlink()] == []
    finally:
        for link in links:
            link.unlink(missing_ok=True)


def test_the_managed_key_set_as_the_default_is_told_by_its_name(world: World) -> None:
    assert world.ebsd.ctl_json("defaults", "set-key", "alias/aws/ebs")["KmsKeyId"] == "alias/aws/ebs"


def test_the_default_key_is_shown_also_when_none_was_set(world: World) -> None:
    assert world.ebsd.ctl_json("defaults", "show")["KmsKeyId"] == "alias/aws/ebs"
