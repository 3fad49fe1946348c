"""Commands that bring images in and out: import, export."""

from __future__ import annotations

import contextlib
from typing import Any

import click

from ebsctl import render
from ebsctl.app import App, Command, Interruption, UsageFailure, parse_pairs, tag_list
from ebsctl.following import follow_job, job_failure, note_running, refreshed, what_is_left
from ebsctl.images import AUTO, FORMATS, RAW, STREAM, Image, open_image, output
from ebsctl.lookup import SNAPSHOT, VOLUME, Found, complete_job, complete_resource, describe, describe_volume
from ebsctl.mounting import with_more_hint
from ebsd.domain.errors import EbsdError, IncorrectState
from ebsd.domain.states import JobState
from ebsd.domain.units import format_size, parse_size

NBD = "nbd"


# --- import -----------------------------------------------------------------------------------------------


@click.command("import", cls=Command, short_help="Make a volume from an image: a file, a device or a stream.")
@click.argument("image", metavar="FILE|DEVICE|-", type=click.Path(allow_dash=True))
@click.argument("name")
@click.option(
    "--size", metavar="SIZE", help="Of a file or device: make the volume larger than it. Of a stream: its exact size."
)
@click.option(
    "--format",
    "form",
    type=click.Choice((AUTO, *FORMATS)),
    default=AUTO,
    help="What the image is; auto tells by its first bytes. Others than raw need qemu-utils.",
)
@click.option(
    "--detect-zeros", is_flag=True, help="Store no blocks of zeros; without it only holes of a file are left out."
)
@click.option("--encrypted/--no-encrypted", default=None, help="As for `ebsctl create`.")
@click.option("--key", metavar="KEY", help="Encrypt under this key; needs --encrypted.")
@click.option("--tag", "tags", multiple=True, metavar="K=V", help="Add a tag; may be repeated.")
@click.option(
    "--context", "context_pairs", multiple=True, metavar="K=V", help="Add a pair to the encryption context; not secret."
)
@click.option("--rate", metavar="RATE", help="Bytes per second at most, such as 50M; 0 for no limit.")
@click.option("--no-wait", is_flag=True, help="Do not wait until all is imported.")
@click.option("--resume", metavar="JOB", shell_complete=complete_job, help="Go on with an import that was interrupted.")
@click.pass_obj
def import_image(
    app: App,
    image: str,
    name: str,
    size: str | None,
    form: str,
    detect_zeros: bool,
    encrypted: bool | None,
    key: str | None,
    tags: tuple[str, ...],
    context_pairs: tuple[str, ...],
    rate: str | None,
    no_wait: bool,
    resume: str | None,
) -> None:
    """Make the volume NAME from an image and print its id.

    The image is read with your rights and must not change meanwhile. Its holes stay holes. An image of another format
    that needs further files, such as a backing file, is refused.
    Ctrl-C ends the command, and an import of a stream; others go on. One that a restart of ebsd interrupted goes on
    with --resume, from the same image.

    \b
    Examples:
      ebsctl import disk.img data --encrypted
      ebsctl import server.qcow2 server --size 40G
      zcat disk.img.gz | ebsctl import - data --size 10G
      ebsctl import disk.img data --resume job-0123456789abcdef0
    """
    if resume is not None and (size, encrypted, key) != (None, None, None):
        raise UsageFailure("--resume takes no --size, --encrypted or --key.", "The volume is there already.")
    if image == STREAM and size is None:
        raise UsageFailure("A stream needs --size.", "Give the exact number of bytes that will come.")
    if image == STREAM and resume is not None:
        raise UsageFailure("A stream cannot be resumed.", "Import it anew.")
    if image == STREAM and no_wait:
        raise UsageFailure("--no-wait cannot be used with a stream.", "Whether it came to its end is known then only.")
    opened = open_image(app, image, form)
    try:
        if resume is not None:
            job = _resume(app, opened, resume, name)
            made = Found(VOLUME, describe_volume(app.client, job["DestinationId"]))
            ident = job["JobId"]
        else:
            reply = app.client.control(
                "ImportVolume",
                descriptors=opened.fds,
                Name=name,
                Image=0,
                Server=1 if len(opened.fds) > 1 else None,
                ImageBytes=opened.size,
                SizeBytes=None if size is None else parse_size(size),
                DetectZeros=True if detect_zeros else None,
                Encrypted=encrypted,
                KmsKeyId=key,
                EncryptionContext=parse_pairs("--context", context_pairs) or None,
                Tags=tag_list(tags),
                Rate=None if rate is None else parse_size(rate),
            )
            app.note_of(reply)
            ident = reply["JobId"]
            made = Found(VOLUME, describe_volume(app.client, reply["VolumeId"]))
    except BaseException:
        opened.end_server()
        raise
    finally:
        opened.close()
    if no_wait:
        note_running(app, ident, made)
    else:
        try:
            made = _await(app, ident, made, is_stream=image == STREAM)
        except EbsdError:  # and not Ctrl-C, after which the job goes on
            opened.end_server()
            raise
    app.emit(made.document, made.ident)


def _resume(app: App, opened: Image, ident: str, name: str) -> render.Document:
    job: render.Document = app.client.control("DescribeJobs", JobIds=[ident])["Jobs"][0]
    volume = describe_volume(app.client, name)
    if job["DestinationId"] != volume["VolumeId"]:
        raise UsageFailure(f"{ident} does not make {name}.", f"It makes {job['DestinationId']}.")
    resumed: render.Document = app.client.control(
        "ResumeJob", descriptors=opened.fds, JobId=ident, Descriptors=list(range(len(opened.fds)))
    )["Job"]
    return resumed


def _await(app: App, job: str, made: Found, *, is_stream: bool) -> Found:
    try:
        ended = follow_job(app, job)
        if ended["State"] == JobState.INTERRUPTED:
            raise IncorrectState(reason=f"The import {job} was interrupted")
        if failure := job_failure(ended):
            raise failure
    except Interruption:
        if not is_stream:
            raise
        _cancel(app, job)
        raise Interruption("The volume is removed: a stream cannot be read again.") from None
    except EbsdError as error:
        raise with_more_hint(error, what_is_left(app, made)) from error.__cause__
    return refreshed(app, made)


def _cancel(app: App, job: str) -> None:
    with contextlib.suppress(EbsdError):  # it has ended, or ebsd has
        app.client.control("CancelJob", JobId=job)


# --- export -----------------------------------------------------------------------------------------------


@click.command("export", cls=Command, short_help="Write a volume or snapshot, decrypted, into a file, device or pipe.")
@click.argument("resource", metavar="VOLUME|SNAPSHOT", shell_complete=complete_resource)
@click.argument("file", metavar="FILE|DEVICE|-", type=click.Path(allow_dash=True))
@click.option("--format", "form", type=click.Choice(FORMATS), default=RAW, help="Others than raw need qemu-utils.")
@click.option("--sparse/--no-sparse", default=True, help="Leave holes in a raw file, or write zeros there.")
@click.option("--force", is_flag=True, help="Replace FILE, or overwrite DEVICE.")
@click.option(
    "--allow-damaged",
    is_flag=True,
    help="Go on at damaged chunks, and name them: what they held cannot be told from what is there now.",
)
@click.option("--rate", metavar="RATE", help="Bytes per second at most, such as 50M; 0 for no limit.")
@click.pass_obj
def export(
    app: App, resource: str, file: str, form: str, sparse: bool, force: bool, allow_damaged: bool, rate: str | None
) -> None:
    """Write what VOLUME or SNAPSHOT holds into an image, which is not encrypted.

    Of a volume a snapshot is taken for the time of the export; an attached one goes on. What is read is compared with
    its digests: damage ends the export with exit status 7. A new file is readable by you alone, appears when it is
    whole and on the disk, and else not at all.

    \b
    Examples:
      ebsctl export data data.img
      ebsctl export monday monday.qcow2 --format qcow2
      ebsctl export data - | zstd -o data.img.zst
    """
    found = describe(app, resource)
    if found.kind not in (VOLUME, SNAPSHOT):
        raise UsageFailure(f"{resource} is neither a volume nor a snapshot.", "`ebsctl list` shows what there is.")
    size = int(found.document["SizeBytes"])
    with output(app, file, form, size, force=force) as opened:
        reply = app.client.control(
            "ExportImage",
            descriptors=opened.image.fds[-1:],
            Resource=found.ident,
            Target=0,
            Served=True if opened.image.server is not None else None,
            Sparse=sparse,
            AllowDamaged=True if allow_damaged else None,
            Rate=None if rate is None else parse_size(rate),
        )
        job: render.Document = _await_export(app, reply["JobId"])
        opened.finish()
    _tell_damage(app, job)
    if file == STREAM:
        return
    told: dict[str, Any] = {
        "JobId": job["JobId"], "ResourceId": found.ident, "File": file, "Format": form, "SizeBytes": size,
    }  # fmt: skip
    app.emit(told, file)
    app.note(f"note: {render.printable(file)} holds {format_size(size)}, not encrypted")


def _tell_damage(app: App, job: render.Document) -> None:
    found = app.client.control("DescribeExport", JobId=job["JobId"])
    if found["DamagedChunks"]:
        named = ", ".join(str(chunk) for chunk in found["Damaged"][:10])
        more = ", ..." if found["DamagedChunks"] > 10 else ""
        app.note(f"warning: {found['DamagedChunks']} chunks of 64 KiB are damaged: {named}{more}")


def _await_export(app: App, job: str) -> render.Document:
    try:
        ended = follow_job(app, job)
    except Interruption:
        _cancel(app, job)
        raise Interruption("The export was ended, and what there was of it is removed.") from None
    if failure := job_failure(ended):
        raise failure
    return ended
