"""All commands of `ebsctl key`: importing the modules that add to the group is what makes it whole."""

from __future__ import annotations

from ebsctl.commands import keyaccess, keydeletion, keyrotation, rootkey
from ebsctl.commands.keys import key

__all__ = ["key", "keyaccess", "keydeletion", "keyrotation", "rootkey"]
