"""The tables of encryption outcomes that AWS publishes, as text: one line a row of the page.

Written from AWS's pages, not from ebsd's code, and completed by the columns that the pages do not have: an explicit
false, and a key without Encrypted. Columns are those of ``REQUESTS``.

U: unencrypted; DEF: the account's default key; SAME: the source's key; K: the named key;
DEP: InvalidParameterDependency; VAL: InvalidParameterValue; VALIDATION: ValidationException.
"""

from __future__ import annotations

from collections.abc import Iterator

REQUESTS = [(None, False), (None, True), (True, False), (True, True), (False, False), (False, True)]
"""(Encrypted, KmsKeyId given)."""

CREATE_VOLUME = """
off | none                     | U    | DEP | DEF  | K | U    | DEP
off | unencrypted, own         | U    | DEP | DEF  | K | U    | DEP
off | unencrypted, another's   | U    | DEP | DEF  | K | U    | DEP
off | encrypted, own           | SAME | DEP | SAME | K | SAME | DEP
off | encrypted, another's     | DEF  | DEP | DEF  | K | DEF  | DEP
on  | none                     | DEF  | DEP | DEF  | K | DEF  | DEP
on  | unencrypted, own         | DEF  | DEP | DEF  | K | DEF  | DEP
on  | unencrypted, another's   | DEF  | DEP | DEF  | K | DEF  | DEP
on  | encrypted, own           | SAME | DEP | SAME | K | SAME | DEP
on  | encrypted, another's     | DEF  | DEP | DEF  | K | DEF  | DEP
"""

COPY_SNAPSHOT = """
off | unencrypted, own         | U    | DEP | DEF  | K | VAL  | VAL
off | unencrypted, another's   | U    | DEP | DEF  | K | VAL  | VAL
off | encrypted, own           | DEF  | DEP | DEF  | K | VAL  | VAL
off | encrypted, another's     | DEF  | DEP | DEF  | K | VAL  | VAL
on  | unencrypted, own         | DEF  | DEP | DEF  | K | VAL  | VAL
on  | unencrypted, another's   | DEF  | DEP | DEF  | K | VAL  | VAL
on  | encrypted, own           | DEF  | DEP | DEF  | K | VAL  | VAL
on  | encrypted, another's     | DEF  | DEP | DEF  | K | VAL  | VAL
"""

# ParentSnapshotId, Encrypted, KmsKeyArn, encryption by default on, off: the layout of the EBS direct APIs' page.
START_SNAPSHOT = """
unencrypted | omitted | omitted   | VALIDATION | U
unencrypted | omitted | specified | VALIDATION | VALIDATION
unencrypted | true    | omitted   | VALIDATION | VALIDATION
unencrypted | true    | specified | VALIDATION | VALIDATION
unencrypted | false   | omitted   | VALIDATION | VALIDATION
unencrypted | false   | specified | VALIDATION | VALIDATION
encrypted   | omitted | omitted   | SAME       | SAME
encrypted   | omitted | specified | VALIDATION | VALIDATION
encrypted   | true    | omitted   | VALIDATION | VALIDATION
encrypted   | true    | specified | VALIDATION | VALIDATION
encrypted   | false   | omitted   | VALIDATION | VALIDATION
encrypted   | false   | specified | VALIDATION | VALIDATION
none        | true    | omitted   | DEF        | DEF
none        | true    | specified | K          | K
none        | false   | omitted   | VALIDATION | U
none        | false   | specified | VALIDATION | VALIDATION
none        | omitted | omitted   | DEF        | U
none        | omitted | specified | K          | K
"""


def rows(text: str) -> Iterator[list[str]]:
    """Yield the fields of each line."""
    for line in text.strip().splitlines():
        yield [field.strip() for field in line.split("|")]


def combinations(text: str) -> Iterator[tuple[bool, str, bool | None, bool, str]]:
    """Yield (encryption by default, source, Encrypted, key given, result) of a table with the columns ``REQUESTS``."""
    for default, source, *cells in rows(text):
        for (encrypted, key), result in zip(REQUESTS, cells, strict=True):
            yield default == "on", source, encrypted, key, result
