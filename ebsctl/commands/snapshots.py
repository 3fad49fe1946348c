"""Commands that make snapshots: snapshot, copy."""

from __future__ import annotations

import click

from ebsctl.app import App, Command, client_token_option, tag_list
from ebsctl.following import await_result, note_running
from ebsctl.lookup import SNAPSHOT, Found, complete_snapshot, complete_volume


@click.command(cls=Command)
@click.argument("volume", shell_complete=complete_volume)
@click.option("--name", metavar="NAME", help="Name of the snapshot.")
@click.option("--description", metavar="TEXT", help="What it is for.")
@click.option("--tag", "tags", multiple=True, metavar="K=V", help="Add a tag; may be repeated.")
@client_token_option()
@click.pass_obj
def snapshot(
    app: App,
    volume: str,
    name: str | None,
    description: str | None,
    tags: tuple[str, ...],
    client_token: str | None,
) -> None:
    """Take a snapshot of VOLUME and print its id.

    An attached volume goes on; the snapshot has what had reached the volume at the time of the call.

    \b
    Examples:
      ebsctl snapshot data --name monday
      ebsctl create again --from monday
    """
    made = app.client.ec2(
        "CreateSnapshot",
        VolumeId=volume,
        Name=name,
        Description=description,
        Tags=tag_list(tags),
        ClientToken=client_token,
    )["Snapshot"]
    app.emit(made, made["SnapshotId"])
    pause = made.get("PauseMicroseconds")
    if pause is not None:
        app.note(f"note: I/O on the volume was held for {pause / 1000:.2f} ms")
    if made["Integrity"] == "unverified":
        app.note("note: the volume was not verified since an unclean stop, and so is its snapshot")


@click.command(cls=Command)
@click.argument("source", metavar="SNAPSHOT", shell_complete=complete_snapshot)
@click.option("--name", metavar="NAME", help="Name of the copy.")
@click.option("--description", metavar="TEXT", help="What it is for.")
@click.option(
    "--encrypted/--no-encrypted",
    default=None,
    help="Encrypt the copy of an unencrypted snapshot. As in EC2, --no-encrypted is refused.",
)
@click.option(
    "--key",
    metavar="KEY",
    help="Encrypt under this key instead of your default key; needs --encrypted. Under the source's own key "
    "a copy is instant.",
)
@click.option("--tag", "tags", multiple=True, metavar="K=V", help="Add a tag; may be repeated.")
@click.option("--no-wait", is_flag=True, help="Do not wait until the data are re-encrypted.")
@click.option(
    "--allow-damaged",
    is_flag=True,
    help="Although `ebsctl verify` found damage; only under the source's own key, and what is damaged stays so.",
)
@client_token_option()
@click.pass_obj
def copy(
    app: App,
    source: str,
    name: str | None,
    description: str | None,
    encrypted: bool | None,
    key: str | None,
    tags: tuple[str, ...],
    no_wait: bool,
    allow_damaged: bool,
    client_token: str | None,
) -> None:
    """Copy SNAPSHOT and print the id of the copy.

    As in EC2, the copy is made under your default key where --key names none. Under another key than the
    source's all data are re-encrypted, and the command waits for that. Ctrl-C ends the command, not the copy.

    \b
    Examples:
      ebsctl copy monday --name off-site --encrypted --key backup
      ebsctl wait "$(ebsctl copy monday --no-wait)" --for completed
    """
    reply = app.client.ec2(
        "CopySnapshot",
        SourceSnapshotId=source,
        Name=name,
        Description=description,
        Encrypted=encrypted,
        KmsKeyId=key,
        Tags=tag_list(tags),
        AllowDamaged=True if allow_damaged else None,
        ClientToken=client_token,
    )
    made, job = Found(SNAPSHOT, reply["Snapshot"]), reply.get("JobId")
    app.note_of(reply)
    if job is not None:
        if no_wait:
            note_running(app, job, made)
        else:
            made = await_result(app, job, made)
    app.emit(made.document, made.ident)
