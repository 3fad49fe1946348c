"""Commands on the root key of the key service: unlock it, change it."""

from __future__ import annotations

import os
from typing import Any

import click

from ebsctl import render
from ebsctl.app import App, UsageFailure
from ebsctl.commands.keys import check_sources, key, passphrase_options
from ebsctl.terminal import passphrase_pipe, read_passphrase
from ebsctl.waiting import wait_until_running
from ebsd.domain.errors import DaemonUnreachable


@key.command("unlock", short_help="Give the key service the passphrase of its root key.")
@passphrase_options
@click.pass_obj
def key_unlock(app: App, passphrase_fd: int | None, passphrase_file: str | None) -> None:
    """Give the key service the passphrase of its root key, which each of its starts needs. Only for administrators.

    Only with `root_key = "passphrase"` in the configuration. The first passphrase that is given is chosen by that.
    Ends when ebsd serves.

    \b
    Examples:
      ebsctl key unlock
      systemd-ask-password "Passphrase of ebsd:" | ebsctl key unlock --passphrase-fd 0
    """
    check_sources(passphrase_fd, passphrase_file)
    status = app.client.key_service("GetStatus")
    new = status.get("PassphraseSet") is False
    text = read_passphrase(
        descriptor=passphrase_fd, path=passphrase_file, twice=new, prompt="Passphrase of the key service"
    )
    reply = with_passphrase(app, "Unlock", text)
    app.emit(reply, "")
    app.note(f"note: unlocked, keys: {reply['Keys']}")
    if new:
        app.note("note: this passphrase opens the root key from now on; without it or a key backup, all data is lost")
    try:
        app.client.control("GetStatus")
    except DaemonUnreachable:
        return  # a key service without its ebsd, which looks when it starts
    wait_until_running(app, "Unlocking")


@key.group("root", short_help="Change the root key, which all keys are under.")
def key_root() -> None:
    """The root key, under which the key service keeps everything; `ebsctl status` shows where it is."""


@key_root.command("change", short_help="Put the keys under another root key.")
@click.option("--to", "target", metavar="PLACE", required=True, help="file:PATH, credential:NAME or passphrase.")
@passphrase_options
@click.pass_obj
def root_change(app: App, target: str, passphrase_fd: int | None, passphrase_file: str | None) -> None:
    """Put everything of the key service under another root key, while volumes are attached. Only for administrators.

    A root key file is made where there is none, never replaced. A credential must be given to the service already (a
    further LoadCredentialEncrypted=, and a restart). What the old root key opened is destroyed on this disk: then

    \b
      1. set root_key in the configuration ([key_service.local]); until then the old place is still needed at each start
      2. restart ebsd; `ebsctl doctor` is content
      3. remove the old root key, and make a new key backup

    \b
    Examples:
      ebsctl key root change --to passphrase
      ebsctl key root change --to file:/media/stick/root.key
      ebsctl key root change --to credential:ebsd-root
    """
    check_sources(passphrase_fd, passphrase_file)
    members = _place(target)
    if members["Kind"] != "passphrase":
        if passphrase_fd is not None or passphrase_file is not None:
            raise UsageFailure("Only --to passphrase takes a passphrase.", "Leave --passphrase-fd and -file out.")
        changed = app.client.key_service("ChangeRootKey", **members)
    else:
        app.client.key_service("GetStatus")  # before a passphrase is typed
        text = read_passphrase(
            descriptor=passphrase_fd, path=passphrase_file, twice=True, prompt="New passphrase of the key service"
        )
        changed = with_passphrase(app, "ChangeRootKey", text, **members)
    now, former = render.printable(changed["RootKey"]), render.printable(changed["FormerRootKey"])
    app.emit(changed, now)
    if now == former:
        app.note("note: the old passphrase opens nothing any more")
        return
    app.note(f'note: now set root_key = "{now}" under [key_service.local] in the configuration and restart ebsd')
    if former == "passphrase":  # nothing that could be removed
        app.note("note: until then each start needs the old passphrase, too")
        return
    app.note(f"note: until then each start needs the old one, too; remove it afterwards: {former}")


def _place(target: str) -> dict[str, Any]:
    """Return the members that name a place."""
    kind, colon, rest = target.partition(":")
    if kind == "passphrase" and not colon:
        return {"Kind": kind}
    if kind == "credential" and rest:
        return {"Kind": kind, "Name": rest}
    if kind == "file" and rest:
        return {"Kind": kind, "Path": os.path.abspath(rest)}
    raise UsageFailure(f"{target!r} is no place of a root key.", "Write file:PATH, credential:NAME or passphrase.")


def with_passphrase(app: App, method: str, passphrase: bytes, **members: object) -> dict[str, Any]:
    """Call a method of the key service that takes a passphrase and no other descriptor."""
    pipe = passphrase_pipe(passphrase)
    try:
        return app.client.key_service(method, (pipe,), PassphraseDescriptor=0, **members)
    finally:
        os.close(pipe)
