"""Commands on the root key of the key service: unlock it."""

from __future__ import annotations

import os
from typing import Any

import click

from ebsctl.app import App
from ebsctl.commands.keys import check_sources, key, passphrase_options
from ebsctl.terminal import passphrase_pipe, read_passphrase
from ebsctl.waiting import wait_until_running
from ebsd.domain.errors import DaemonUnreachable


@key.command("unlock")
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


def with_passphrase(app: App, method: str, passphrase: bytes, **members: object) -> dict[str, Any]:
    """Call a method of the key service that takes a passphrase and no other descriptor."""
    pipe = passphrase_pipe(passphrase)
    try:
        return app.client.key_service(method, (pipe,), PassphraseDescriptor=0, **members)
    finally:
        os.close(pipe)
