"""Commands that make snapshots: snapshot, copy."""

from __future__ import annotations

import click

from ebsctl.app import App, Command, UsageFailure, client_token_option, parse_rate, rate_option, tag_list
from ebsctl.following import await_result, note_running
from ebsctl.lookup import SNAPSHOT, Found, complete_snapshot, complete_volume


@click.command(cls=Command)
@click.argument("volumes", metavar="VOLUME...", nargs=-1, shell_complete=complete_volume)
@click.option("--all-attached", is_flag=True, help="Of all volumes of yours that are attached.")
@click.option(
    "--tagged", "targets", multiple=True, metavar="K=V", help="Of your volumes with this tag, or another one."
)
@click.option("--exclude", multiple=True, metavar="VOLUME", shell_complete=complete_volume, help="But not of this one.")
@click.option("--name", metavar="NAME", help="Name of the snapshot; of several, what stands before -VOLUME in theirs.")
@click.option("--description", metavar="TEXT", help="What it is for.")
@click.option("--tag", "tags", multiple=True, metavar="K=V", help="Add a tag; may be repeated.")
@click.option("--copy-tags", is_flag=True, help="Add the tags of the volume, too.")
@client_token_option()
@click.pass_obj
def snapshot(
    app: App,
    volumes: tuple[str, ...],
    all_attached: bool,
    targets: tuple[str, ...],
    exclude: tuple[str, ...],
    name: str | None,
    description: str | None,
    tags: tuple[str, ...],
    copy_tags: bool,
    client_token: str | None,
) -> None:
    """Take a snapshot of VOLUME and print its id.

    An attached volume goes on; the snapshot has what had reached the volume at the time of the call. Snapshots of
    several volumes are of one moment, and all of them are taken or none. Their ids are printed one a line.

    \b
    Examples:
      ebsctl snapshot data --name monday
      ebsctl create again --from monday
      ebsctl snapshot data log --name tuesday
      ebsctl snapshot --all-attached --exclude scratch
    """
    one = len(volumes) == 1 and not (all_attached or targets or exclude or copy_tags)
    if sum((bool(volumes), all_attached, bool(targets))) != 1:
        raise UsageFailure("say which volumes", "Name volumes, or give --all-attached, or --tagged K=V.")
    if client_token is not None and not one:
        raise UsageFailure("--client-token is for one volume", "EC2's CreateSnapshots has no client token either.")
    if one:
        made = [
            app.client.ec2(
                "CreateSnapshot",
                VolumeId=volumes[0],
                Name=name,
                Description=description,
                Tags=tag_list(tags),
                ClientToken=client_token,
            )["Snapshot"]
        ]
    else:
        made = app.client.ec2(
            "CreateSnapshots",
            VolumeIds=list(volumes) or None,
            AllAttached=True if all_attached else None,
            TargetTags=tag_list(targets),
            ExcludeVolumeIds=list(exclude) or None,
            NamePrefix=name,
            Description=description,
            Tags=tag_list(tags),
            CopyTagsFromSource="volume" if copy_tags else None,
        )["Snapshots"]
    app.emit(made[0] if one else {"Snapshots": made}, "\n".join(each["SnapshotId"] for each in made))
    for each in made:
        where = "the volume" if one else each["VolumeId"]
        pause = each.get("PauseMicroseconds")
        if pause is not None:
            app.note(f"note: I/O on {where} was held for {pause / 1000:.2f} ms")
        if each["Integrity"] == "unverified":
            app.note(f"note: {where} was not verified since an unclean stop, and so is its snapshot")


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
@rate_option()
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
    rate: str | None,
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
        Rate=parse_rate(rate),
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
