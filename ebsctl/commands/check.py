"""The command check: the whole store examined, repaired where that is safe, the catalog rebuilt."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import click

from ebsctl import render
from ebsctl.app import App, Command, UsageFailure
from ebsctl.terminal import ProgressBar, confirm, is_interactive
from ebsctl.waiting import wait_until_running
from ebsd.domain.errors import ExitStatus, ProtocolError
from ebsd.domain.units import CHUNK

_HEADER = ("SEVERITY", "CODE", "RESOURCE", "FILE", "WHAT")


@click.command(cls=Command, short_help="Examine the files of the store, and mend what is safe.")
@click.argument("resources", nargs=-1, metavar="[RESOURCE]...")
@click.option("--repair", is_flag=True, help="Do what is safe, and say each step. Nothing damaged is touched.")
@click.option("--rebuild-catalog", is_flag=True, help="Make a new catalog of what else is in the store.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.pass_obj
def check(app: App, resources: tuple[str, ...], repair: bool, rebuild_catalog: bool, yes: bool) -> int:
    """Examine the whole store, or what shares a data key with RESOURCE; volumes may be in use.

    No key is needed, so data itself is not looked at: `ebsctl verify` does that.

    The exit status is 0 when all is well, 7 when something is damaged, and 1 when there are only inconsistencies or
    leftover files, none of which affects data. Space that a later deletion or start gives back is shown, and is well.

    --repair sets modes, finishes or removes what was left half made, gives back space that nothing uses, and moves
    what nobody names to the directory `aside` of the state directory. It deletes nothing but temporary files.

    --rebuild-catalog is for an ebsd in rescue mode, whose catalog is lost or damaged. Volumes, snapshots, their names,
    keys, sizes and layers come from the other files, attached volumes included; tags, jobs and some times are lost. The
    old catalog is kept beside the new one.
    """
    if rebuild_catalog:
        if repair or resources:
            raise UsageFailure("--rebuild-catalog stands alone.", "Check and repair afterwards.")
        return _rebuild(app, yes)
    found = _check(app, resources, repair=False)
    if repair and (mendable := [f for f in found["Findings"] if f["Repairable"]]):
        if not yes:
            if not is_interactive():
                raise UsageFailure("--repair asks before it changes anything.", "Without a terminal, add --yes.")
            app.note(_text(app, mendable))
            if not confirm(f"Repair {len(mendable)} of {len(found['Findings'])} findings?"):
                app.note("Nothing was changed.")
                return ExitStatus.FAILED
        found = _check(app, resources, repair=True)
        for step in found["Steps"]:
            app.note(f"repaired: {render.printable(step)}")
    app.emit(found, _text(app, found["Findings"]))
    if found["Omitted"]:
        app.note(f"note: {found['Omitted']} more findings are not shown")
    if not found["Findings"] and app.for_people:
        app.note("Nothing was found.")
    return _status(found["Findings"])


def _check(app: App, resources: Sequence[str], *, repair: bool) -> dict[str, Any]:
    bar = ProgressBar(wanted=not app.as_json)
    last: dict[str, Any] | None = None
    members = {"Resources": list(resources) or None, "Repair": repair or None}
    try:
        with contextlib.closing(app.client.control_stream("CheckStore", **members)) as replies:
            for reply in replies:
                last = reply
                if reply["Total"]:
                    bar.show(reply["Done"] * CHUNK, reply["Total"] * CHUNK)
    finally:
        bar.clear()
    if last is None:
        raise ProtocolError(reason="it said nothing about the store")
    return {name: last[name] for name in ("Findings", "Steps", "Omitted")}


def _rebuild(app: App, yes: bool) -> ExitStatus:
    if not yes:
        if not is_interactive():
            raise UsageFailure("--rebuild-catalog asks before it changes anything.", "Without a terminal, add --yes.")
        if not confirm("Make a new catalog? The old one is kept; tags and jobs are lost."):
            app.note("Nothing was changed.")
            return ExitStatus.FAILED
    made = app.client.control("RebuildCatalog")
    app.emit(made)
    app.note(f"rebuilt: {made['Volumes']} volumes ({made['AttachedVolumes']} attached), {made['Snapshots']} snapshots")
    if made.get("Kept"):
        app.note(f"the old catalog is kept: {render.printable(made['Kept'])}")
    for text in made["Lost"]:
        app.note(f"lost: {render.printable(text)}")
    for text in made["Notes"]:
        app.note(f"note: {render.printable(text)}")
    for left in made["Left"]:
        app.note(f"not recovered: {render.printable(left['ResourceId'])}: {render.printable(left['Reason'])}")
    wait_until_running(app, "Leaving rescue mode")
    return ExitStatus.DONE


def _status(findings: Sequence[render.Document]) -> ExitStatus:
    # Space that a later sweep gives back is there in any store that is in use.
    severities = {finding["Severity"] for finding in findings if finding["Code"] != "leaked-space"}
    if "damage" in severities:
        return ExitStatus.INTEGRITY
    return ExitStatus.FAILED if severities - {"note"} else ExitStatus.DONE


def _text(app: App, findings: Sequence[render.Document]) -> str:
    names = ("Severity", "Code", "ResourceId", "File", "Detail")
    if not app.for_people:
        rows = [(*(f.get(name) for name in names), f.get("Advice")) for f in findings]
        return render.table((*_HEADER, "ADVICE"), rows, for_people=False)
    text = render.table(_HEADER, [tuple(f.get(name) for name in names) for f in findings], for_people=True)
    advice = {f["Code"]: f["Advice"] for f in findings if f.get("Advice") and f["Severity"] != "note"}
    return "\n".join([text, *(f"{code}: {render.printable(what)}" for code, what in advice.items())])
