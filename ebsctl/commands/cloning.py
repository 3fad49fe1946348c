"""The command clone: a volume made from a volume."""

from __future__ import annotations

import click

from ebsctl.app import App, Command, client_token_option, tag_list
from ebsctl.following import await_result, note_running
from ebsctl.lookup import VOLUME, Found, complete_volume
from ebsd.domain.units import check_volume_size, parse_size


@click.command(cls=Command, short_help="Make a volume from another one as it is now.")
@click.argument("volume", shell_complete=complete_volume)
@click.argument("name")
@click.option("--size", metavar="SIZE", help="Make it larger than VOLUME; its file system does not grow by itself.")
@click.option("--key", metavar="KEY", help="Re-encrypt all data under this key; without it a clone is instant.")
@click.option("--tag", "tags", multiple=True, metavar="K=V", help="Add a tag; may be repeated.")
@click.option("--copy-tags", is_flag=True, help="Add the tags of VOLUME, too.")
@click.option("--no-wait", is_flag=True, help="Do not wait until the data are re-encrypted.")
@client_token_option()
@click.pass_obj
def clone(
    app: App,
    volume: str,
    name: str,
    size: str | None,
    key: str | None,
    tags: tuple[str, ...],
    copy_tags: bool,
    no_wait: bool,
    client_token: str | None,
) -> None:
    """Make the volume NAME from VOLUME as it is now, attached or not, and print its id.

    Both share what neither has written since, and nothing else: each can be deleted without the other. What had not
    reached an attached VOLUME is not in the clone, as after a power cut.

    \b
    Examples:
      ebsctl clone data trial
      ebsctl clone data theirs --key other --no-wait
    """
    reply = app.client.ec2(
        "CopyVolumes",
        SourceVolumeId=volume,
        Name=name,
        SizeBytes=None if size is None else check_volume_size(parse_size(size)),
        KmsKeyId=key,
        Tags=tag_list(tags),
        CopyTags=True if copy_tags else None,
        ClientToken=client_token,
    )
    made, job = Found(VOLUME, reply["Volumes"][0]), reply.get("JobId")
    app.note_of(reply)
    if job is not None:
        if no_wait:
            note_running(app, job, made)
        else:
            made = await_result(app, job, made)
    app.emit(made.document, made.ident)
