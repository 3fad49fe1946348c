"""The program as a whole: --json anywhere, usage, exit statuses, status, doctor, version, completion, signals."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from ebsctl_fakes import Bench, FakeServer, key, volume

from ebsctl import doctor
from ebsctl.app import App
from ebsctl.cli import COMMANDS, ELSEWHERE, cli
from ebsctl.client import Client
from ebsctl.mounting import Programs
from ebsd import __version__
from ebsd.domain.errors import ExitStatus, InRescue, InternalFailure, NeedsRoot

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.server.close()


def run(*words: str) -> click.testing.Result:
    return CliRunner().invoke(cli, list(words))


# --- --json and usage -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--json", "key", "alias", "list"],
        ["key", "--json", "alias", "list"],
        ["key", "alias", "--json", "list"],
        ["key", "alias", "list", "--json"],
        ["--json", "key", "alias", "list", "--json"],
    ],
)
def test_json_may_stand_anywhere(bench: Bench, words: list[str]) -> None:
    assert json.loads(bench.ok(*words)) == {"Aliases": []}


def test_json_as_the_value_of_an_option_is_a_value(bench: Bench) -> None:
    assert bench.ok("key", "create", "--description", "--json").endswith("\n")
    assert bench.server.parameters("KMS.CreateKey") == {"Description": "--json"}


@pytest.mark.parametrize(
    "words",
    [
        ["--bogus"],
        ["nonsense"],
        ["list", "--bogus"],
        ["create"],
        ["key", "nonsense"],
        ["key", "alias", "create", "one"],
        ["completion", "tcsh"],
        ["version", "extra"],
        ["create", "x", "--size"],
    ],
)
def test_usage_errors_exit_2_in_both_forms(words: list[str]) -> None:
    plain = run(*words)
    assert (plain.exit_code, plain.stdout) == (2, "")
    assert "error: " in plain.stderr
    assert "--help" in plain.stderr
    result = run("--json", *words)
    assert (result.exit_code, result.stdout) == (2, "")
    document = json.loads(result.stderr)
    assert document["Code"] == "Usage"
    assert "--help" in document["Hint"]


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("creat", "Did you mean `ebsctl create`?"),
        ("restore", "ebsctl create NAME --from SNAPSHOT"),
        ("umount", "ebsctl detach VOLUME"),
    ],
)
def test_a_word_that_is_no_command_is_answered_with_the_one_that_was_meant(word: str, hint: str) -> None:
    document = json.loads(run("--json", word, "x").stderr)
    assert document["Message"] == f"No such command '{word}'."
    assert hint in document["Hint"]


@pytest.mark.parametrize("words", [line.partition(";")[0].split()[1:] for line in ELSEWHERE.values()], ids=" ".join)
def test_what_stands_for_other_words_exists(words: list[str]) -> None:
    command: click.Command | None = cli
    while isinstance(command, click.Group):
        command = command.get_command(click.Context(command), words.pop(0))
    assert command is not None
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


GROUPS = [(), ("key",), ("key", "alias"), ("key", "root"), ("job",), ("defaults",)]


@pytest.mark.parametrize("words", GROUPS, ids=" ".join)
def test_summaries_of_commands_are_whole_in_80_columns(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    summaries = run(*words, "--help").stdout.partition("Commands:")[2]
    assert "..." not in summaries
    assert all(len(line) <= 80 for line in summaries.splitlines())


@pytest.mark.parametrize("words", [[], ["key"], ["key", "alias"], ["defaults"], ["job"]])
def test_a_group_alone_shows_its_help_and_is_a_usage_error(words: list[str]) -> None:
    plain = run(*words)
    assert plain.exit_code == 2
    assert "Commands:" in plain.stderr
    assert json.loads(run(*words, "--json").stderr)["Code"] == "Usage"


def leaves(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        found += leaves(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


ALL_COMMANDS = leaves(cli)


@pytest.mark.parametrize("words", ALL_COMMANDS, ids=" ".join)
def test_every_command_has_help_and_json(words: tuple[str, ...]) -> None:
    result = run(*words, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert len(result.stdout.splitlines()) > 5


def test_the_help_tells_exit_statuses_and_how_to_stop() -> None:
    text = run("--help").stdout
    assert "ebsctl detach --all, then stop ebsd" in " ".join(text.split())
    for status in ExitStatus:
        assert f" {int(status)}  " in text
    for name in COMMANDS:
        assert f"\n  {name} " in text


MINIMAL = {
    "create": ["x", "--size", "1G"],
    "attach": ["x"],
    "detach": ["x"],
    "restart-engine": ["x"],
    "resize": ["x", "2G"],
    "trim": ["x"],
    "snapshot": ["x"],
    "copy": ["x"],
    "clone": ["x", "y"],
    "import": ["/etc/passwd", "x"],
    "export": ["x", "/nonexistent/out"],
    "schedule create": ["x", "y", "--every", "1h"],
    "schedule show": ["x"],
    "schedule run": ["x"],
    "schedule pause": ["x"],
    "schedule resume": ["x"],
    "schedule delete": ["x", "--yes"],
    "lock": ["x", "--days", "1"],
    "unlock": ["x"],
    "share": ["x"],
    "undelete": ["x"],
    "recycle-bin rule create": ["--type", "volume", "--days", "1"],
    "recycle-bin rule delete": ["x"],
    "archive export": ["x", "/dev/null"],
    "archive import": ["/dev/null", "x"],
    "archive verify": ["/dev/null"],
    "archive show": ["/dev/null"],
    "wait": ["x", "--for", "available"],
    "job show": ["job-1"],
    "job wait": ["job-1"],
    "job cancel": ["job-1"],
    "job limit": ["job-1", "50M"],
    "show": ["x"],
    "delete": ["x", "--yes"],
    "rename": ["x", "y"],
    "tag": ["x", "a=1"],
    "defaults set-key": ["x"],
    "key show": ["x"],
    "key enable": ["x"],
    "key disable": ["x"],
    "key policy": ["x"],
    "key grant": ["x", "--to", "arn:aws:iam::000000001000:user/x", "--operation", "Decrypt"],
    "key grants": ["x"],
    "key revoke": ["x", "0"],
    "key retire": ["x", "0"],
    "key rotation": ["x"],
    "key schedule-deletion": ["x"],
    "key cancel-deletion": ["x"],
    "key rewrap": ["x"],
    "key root change": ["--to", "file:x"],
    "verify": ["x"],
    "blocks list": ["x"],
    "blocks changed": ["x", "y"],
    "blocks get": ["x", "y"],
    "blocks start": ["--size", "1G"],
    "blocks put": ["x", "/dev/zero", "--block", "0"],
    "blocks complete": ["x", "--count", "0"],
    "key alias create": ["x", "y"],
    "key alias update": ["x", "y"],
    "key alias delete": ["x"],
}
"""Arguments that every command needs to come to its first call."""

CALLING = [words for words in ALL_COMMANDS if words[-1] not in ("doctor", "version", "completion", "status")]


@pytest.mark.parametrize("words", CALLING, ids=" ".join)
def test_every_command_without_ebsd_exits_9(words: tuple[str, ...], tmp_path: Path) -> None:
    arguments = MINIMAL.get(" ".join(words), [])
    if words[-1] in ("backup", "restore"):
        passphrase = tmp_path / "p"
        passphrase.write_bytes(b"word")
        arguments = [str(tmp_path / ("b" if words[-1] == "backup" else "p")), "--passphrase-file", str(passphrase)]
    result = run("--socket", str(tmp_path / "ebsd.sock"), "--json", *words, *arguments)
    assert (result.exit_code, result.stdout) == (9, "")
    document = json.loads(result.stderr)
    assert document["Code"] == "Ebsd.DaemonUnreachable"
    assert str(tmp_path) in document["Message"]
    assert "--socket" in document["Hint"]
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("raw", [b"", b"nonsense\0"])
def test_garbage_and_hang_up_exit_9(bench: Bench, raw: bytes) -> None:
    bench.server.raw = raw
    assert bench.error(9, "list")["Code"] == "Ebsd.DaemonUnreachable"


def test_a_reply_that_lacks_a_member_is_a_protocol_error(bench: Bench) -> None:
    bench.server.raw = b'{"parameters":{}}\0'
    error = bench.error(1, "list")
    assert error["Code"] == "Ebsd.Protocol"
    assert "Volumes" in error["Message"]


def test_the_socket_comes_from_the_option_before_the_environment(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("EBSD_SOCKET", bench.server.path)
    assert run("list", "--json").exit_code == 0
    assert run("--socket", str(tmp_path / "none"), "list").exit_code == 9
    monkeypatch.setenv("EBSD_SOCKET", "")
    monkeypatch.setenv("EBSD_RUNTIME_DIR", str(bench.directory))
    assert run("list", "--json").exit_code == 0


def test_errors_from_a_server_cannot_steer_the_terminal(bench: Bench) -> None:
    bench.server.fail("EC2.DescribeVolumes", InternalFailure(incident="\x1b[2J\nerror: forged"))
    lines = bench.run("list").stderr.splitlines()
    assert len(lines) == 2
    assert "\x1b" not in lines[0]


def test_rescue_mode_is_told(bench: Bench) -> None:
    bench.server.fail("EC2.DescribeVolumes", InRescue(reason="the catalog is damaged"))
    assert "doctor" in bench.error(1, "list")["Hint"]


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, bench: Bench) -> None:
    def interrupted(*_args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "call", interrupted)
    assert bench.error(130, "list")["Code"] == "Interrupted"


# --- status -----------------------------------------------------------------------------------------------


def test_status(bench: Bench) -> None:
    bench.world.add(volume())
    document = bench.document("status")
    assert (document["State"], document["Volumes"], document["Socket"]) == ("running", 1, bench.server.path)
    lines = bench.ok("status").splitlines()
    assert "KeyService.State\trunning" in lines
    assert f"FreeBytes\t{5 << 30}" in lines


def test_status_for_people_has_sizes(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(App, "for_people", True)
    assert "5 GiB" in bench.ok("status")


def test_status_without_ebsd_still_says_what_it_knows(tmp_path: Path) -> None:
    server = FakeServer(tmp_path, ebsd=False)
    result = run("--socket", server.path, "status", "--json")
    server.close()
    assert result.exit_code == 9
    document = json.loads(result.stdout)
    assert document["State"] == "unreachable"
    assert document["KeyService"]["State"] == "running"
    assert json.loads(result.stderr)["Code"] == "Ebsd.DaemonUnreachable"


def test_status_without_anything(tmp_path: Path) -> None:
    result = run("--socket", str(tmp_path / "ebsd.sock"), "status")
    assert result.exit_code == 9
    assert "State\tunreachable" in result.stdout.splitlines()
    assert "KeyService.State\tunreachable" in result.stdout.splitlines()


def test_status_does_not_wait_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ebsctl.commands.service.PATIENCE", 0.02)
    bench.server.hang("Control.GetStatus")
    assert bench.error(8, "status")["Code"] == "Ebsd.Timeout"


# --- doctor -----------------------------------------------------------------------------------------------


@pytest.fixture
def healthy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this host healthy, whatever it is."""
    ok = doctor.finding("/dev/fuse", "ok", "it is there")
    monkeypatch.setattr(doctor, "check_fuse", lambda _path: ok)
    monkeypatch.setattr(doctor, "check_loop_control", lambda _path, _uid: {**ok, "Check": "loop devices"})


def by_check(findings: list[doctor.Finding]) -> dict[str, str]:
    assert len({item["Check"] for item in findings}) == len(findings)
    return {item["Check"]: item["Level"] for item in findings}


@pytest.mark.usefixtures("healthy")
def test_doctor_is_content(bench: Bench) -> None:
    levels = by_check(bench.document("doctor")["Findings"])
    assert levels["ebsd.sock"] == levels["keys.sock"] == levels["mkfs"] == "ok"
    assert {"/dev/fuse", "loop devices", "AES instructions", "kernel"} <= set(levels)


@pytest.mark.usefixtures("healthy")
def test_ebsds_own_findings_come_last_and_replace_local_ones(bench: Bench) -> None:
    bench.world.findings = [
        {"Check": "/dev/fuse", "Level": "note", "Message": "seen from ebsd", "Fix": None},
        {"Check": "state-directory", "Level": "warning", "Message": "on tmpfs", "Fix": "move it"},
    ]
    findings = bench.document("doctor")["Findings"]
    assert by_check(findings)["/dev/fuse"] == "note"
    assert findings[-1]["Check"] == "state-directory"
    assert "warning\tstate-directory\ton tmpfs\tmove it" in bench.ok("doctor").splitlines()


@pytest.mark.usefixtures("healthy")
def test_a_failure_exits_1_with_the_findings_on_standard_output(bench: Bench) -> None:
    bench.world.findings = [{"Check": "catalog", "Level": "failure", "Message": "it is damaged"}]
    result = bench.run("doctor", "--json")
    assert (result.exit_code, result.stderr) == (1, "")
    assert by_check(json.loads(result.stdout)["Findings"])["catalog"] == "failure"


def test_doctor_works_without_ebsd(tmp_path: Path) -> None:
    result = run("--socket", str(tmp_path / "ebsd.sock"), "doctor", "--json")
    assert result.exit_code == 1
    levels = by_check(json.loads(result.stdout)["Findings"])
    assert levels["ebsd.sock"] == levels["keys.sock"] == "failure"
    assert {"/dev/fuse", "loop devices", "mkfs", "AES instructions", "kernel"} <= set(levels)


@pytest.mark.usefixtures("healthy")
def test_doctor_tells_of_a_key_service_in_rescue(bench: Bench) -> None:
    bench.world.key_service_state = "rescue"
    result = bench.run("doctor")
    assert result.exit_code == 1
    assert "the root key file is missing" in result.stdout


def test_missing_devices_are_found(tmp_path: Path) -> None:
    gone = str(tmp_path / "none")
    assert doctor.check_fuse(gone)["Level"] == "failure"
    assert doctor.check_loop_control(gone, 0)["Level"] == "warning"
    assert doctor.check_fuse("/dev/null")["Level"] == "ok"
    assert doctor.check_loop_control("/dev/null", 1000)["Level"] == "ok"


def test_devices_that_cannot_be_opened_are_found(tmp_path: Path) -> None:
    directory = str(tmp_path)  # opening it for writing fails, for root too
    assert doctor.check_fuse(directory)["Level"] == "warning"
    assert doctor.check_loop_control(directory, 0)["Level"] == "warning"
    assert doctor.check_loop_control(directory, 1000)["Level"] == "note"


def test_missing_programs_are_found(tmp_path: Path) -> None:
    bare = Programs(str(tmp_path))
    found = doctor.check_file_systems(bare)
    assert (found["Level"], found["Fix"]) == ("note", "apt install e2fsprogs xfsprogs btrfs-progs")
    assert doctor.check_fusermount(bare)["Fix"] == "apt install fuse3"
    (tmp_path / "fusermount3").write_text("")
    (tmp_path / "fusermount3").chmod(0o755)
    assert doctor.check_fusermount(bare)["Level"] == "ok"


@pytest.mark.parametrize(
    ("cpuinfo", "level"),
    [
        ("processor\t: 0\nflags\t\t: fpu aes sse2\n", "ok"),
        ("processor\t: 0\nFeatures\t: fp asimd aes pmull\n", "ok"),
        ("flags\t\t: fpu vaes\n", "warning"),
        ("", "warning"),
    ],
)
def test_aes_instructions_are_looked_for(cpuinfo: str, level: str) -> None:
    assert doctor.check_cpu(cpuinfo)["Level"] == level


@pytest.mark.parametrize(
    ("release", "level"),
    [
        ("6.18.1", "ok"),
        ("6.9", "ok"),
        ("6.1.0-18-amd64", "note"),
        ("5.10.0", "note"),
        ("5.9.16", "warning"),
        ("4.19", "warning"),
        ("odd", "note"),
    ],
)
def test_old_kernels_are_found(release: str, level: str) -> None:
    assert doctor.check_kernel(release)["Level"] == level


def test_users_without_root_are_asked_for_fusermount(bench: Bench) -> None:
    client = Client(bench.server.path)
    assert "fusermount3" in by_check(doctor.examine(client, bench.programs, 1000))
    assert "fusermount3" not in by_check(doctor.examine(client, bench.programs, 0))


# --- version and completion -------------------------------------------------------------------------------


def test_version() -> None:
    assert run("version").stdout == run("--version").stdout == f"ebsctl {__version__}\n"
    assert json.loads(run("version", "--json").stdout) == {"Version": __version__}


@pytest.mark.parametrize(
    ("shell", "word"), [("bash", "complete -o"), ("zsh", "#compdef ebsctl"), ("fish", "complete ")]
)
def test_completion_scripts(shell: str, word: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0
    assert word in result.stdout
    assert "_EBSCTL_COMPLETE" in result.stdout
    assert json.loads(run("completion", shell, "--json").stdout)["Shell"] == shell


# --- the real process -------------------------------------------------------------------------------------


def start(*words: str, **options: object) -> subprocess.Popen[bytes]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ebsctl", *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, **options)  # type: ignore[call-overload, no-any-return]


def test_a_reader_that_goes_away_is_no_news(bench: Bench) -> None:
    """As in `ebsctl list | head -1`."""
    bench.world.add(*(volume(number, f"v{number}") for number in range(1, 40)))
    reader, writer = os.pipe()
    os.close(reader)
    process = start("--socket", bench.server.path, "list", stdout=writer)
    os.close(writer)
    assert process.communicate(timeout=20)[1] == b""
    assert process.returncode == 1


def test_a_full_disk_behind_standard_output_is_an_error(bench: Bench) -> None:
    bench.world.add(volume())
    with open("/dev/full", "wb") as full:
        process = start("--socket", bench.server.path, "list", stdout=full)
        stderr = process.communicate(timeout=20)[1]
    assert process.returncode == 1
    assert b"No space left" in stderr
    assert b"Traceback" not in stderr


def test_ctrl_c_ends_a_waiting_command_with_130(bench: Bench) -> None:
    bench.server.hang("EC2.DescribeVolumes")
    process = start("--socket", bench.server.path, "list", stdout=subprocess.DEVNULL)
    while not bench.server.calls:
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stderr = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert stderr.strip() == b"error: Interrupted. [Interrupted]"


@pytest.mark.parametrize(("typed", "status"), [(b"y\n", 0), (b"n\n", 1)])
def test_delete_asks_on_a_real_terminal(bench: Bench, typed: bytes, status: int) -> None:
    bench.world.add(volume())
    master, slave = pty.openpty()
    os.write(master, typed)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "ebsctl", "--socket", bench.server.path, "delete", "data"]
    done = subprocess.run(command, env=environment, stdin=slave, stdout=slave, stderr=slave, timeout=20, check=False)
    os.close(slave)
    shown = os.read(master, 4096)
    os.close(master)
    assert done.returncode == status, shown
    assert b"cannot be recovered. [y/N]" in shown
    assert bool(bench.world.volumes) is (status == 1)


def test_a_key_listing_leaks_no_descriptor(bench: Bench) -> None:
    bench.world.keys = {key()["KeyId"]: key()}
    bench.ok("key", "list")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        bench.ok("key", "list")
    # The server's end of the last connection may still be open: it is closed by another thread.
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_doctor_says_where_the_verification_key_of_the_audit_log_is(bench: Bench) -> None:
    client = Client(bench.server.path)
    (found,) = doctor.check_audit_log(client)
    assert (found["Level"], "--take-key" in found["Fix"]) == ("note", True)
    bench.world.key_is_here = False
    assert [item["Level"] for item in doctor.check_audit_log(client)] == ["ok"]
    bench.server.fail("Audit.GetLog", NeedsRoot(operation="Verification", remedy=""))
    assert doctor.check_audit_log(client) == []
