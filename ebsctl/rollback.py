"""Telling an administrator what accepting a rollback means, and asking him."""

from __future__ import annotations

from typing import NamedTuple

from ebsctl import render
from ebsctl.app import App, UsageFailure
from ebsctl.terminal import confirm, is_interactive


class Rollback(NamedTuple):
    ident: str
    generation: int
    """Of its record as it is."""
    is_back: bool
    """Whether that is below what the key service remembers."""


def confirmed_rollback(app: App, resource: str, *, yes: bool) -> Rollback | None:
    """Return what is to be accepted once it was confirmed; None for a no. Raises UsageFailure without a terminal."""
    told = app.client.control("AcceptRollback", Resource=resource)
    found = Rollback(told["ResourceId"], told["Generation"], told["Generation"] < told["Floor"])
    if not found.is_back:
        app.note(f"note: {render.printable(found.ident)} did not go back: there is nothing to accept")
        return found
    app.note(
        f"note: the record of {render.printable(found.ident)} has generation {found.generation}, written "
        f"{render.printable(told['RecordTime'])}; generation {told['Floor']} was reached: what was written in between "
        "is lost, and stays refused"
    )
    if yes:
        return found
    if not is_interactive():
        raise UsageFailure("--accept-rollback asks before it changes anything.", "Without a terminal, add --yes.")
    if confirm(f"Accept that {render.printable(found.ident)} went back to generation {found.generation}?"):
        return found
    app.note("Nothing was changed.")
    return None
