"""What the key service knows, in memory: every document by its name, with the indexes that look-ups need.

1. Filled once from the verified documents; afterwards changed only by ``Store`` after a commit.
2. ``resolve`` is the only place that reads a KeyId parameter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from ebsd.domain.errors import AliasNotFound, InvalidKeyArn, KeyNotFound, KmsValidation
from ebsd.domain.ids import (
    MANAGED_ALIAS,
    REGION,
    AccountId,
    KeyId,
    alias_arn,
    is_alias,
    is_key_id,
    key_arn,
    split_alias_arn,
    split_key_arn,
)
from ebsd.kms.policy import NO_FACTS, Action, Facts, Requester, authorise, denied_abroad, may_touch_account
from ebsd.kms.records import Account, Admission, Alias, Anchor, Cmk, Document, Grant, Kind, to_json


class ManagedKeyMissing(Exception):
    """The name is the requester's own alias/aws/ebs, which does not exist yet: whoever may make it asks again."""

    def __init__(self, account: AccountId) -> None:
        super().__init__(account)
        self.account = account


@dataclass(slots=True)
class Model:
    keys: dict[KeyId, Cmk] = field(default_factory=dict)
    grants: dict[str, Grant] = field(default_factory=dict)
    aliases: dict[tuple[AccountId, str], Alias] = field(default_factory=dict)
    accounts: dict[AccountId, Account] = field(default_factory=dict)
    anchors: dict[str, Anchor] = field(default_factory=dict)
    admissions: dict[str, Admission] = field(default_factory=dict)
    _grants_of: dict[KeyId, dict[str, None]] = field(default_factory=dict)
    _grant_of_token: dict[str, str] = field(default_factory=dict)
    _grants_by: Counter[AccountId] = field(default_factory=Counter)
    _bytes_of: Counter[AccountId] = field(default_factory=Counter)

    # --- change ---------------------------------------------------------------------------------------------

    def put(self, document: Document) -> None:
        """Take a document, in place of an earlier one of the same name."""
        match document:
            case Cmk():
                self._count(document)
                self.keys[document.id] = document
            case Grant():
                self.drop(Kind.GRANT, document.id)
                self._count(document)
                self.grants[document.id] = document
                self._grants_of.setdefault(document.key, {})[document.id] = None
                self._grants_by[document.issuing_account] += 1
                self._grant_of_token.update(dict.fromkeys(document.token_hashes, document.id))
            case Alias():
                self._count(document)
                self.aliases[document.account, document.name] = document
            case Account():
                self.accounts[document.id] = document
            case Anchor():
                self.anchors[document.resource] = document
            case Admission():
                self.admissions[document.account] = document
            case _:
                raise AssertionError(f"BUG: a document of type {type(document).__name__}")

    def drop(self, kind: Kind, doc_id: str) -> None:
        """Forget a document; one that is not there is already forgotten."""
        if kind is Kind.GRANT:
            grant = self.grants.pop(doc_id, None)
            if grant is not None:
                siblings = self._grants_of[grant.key]
                siblings.pop(doc_id, None)
                if not siblings:
                    del self._grants_of[grant.key]
                self._grants_by[grant.issuing_account] -= 1
                self._uncount(grant)
                for token in grant.token_hashes:
                    self._grant_of_token.pop(token, None)
        elif kind is Kind.ALIAS:
            account, _, name = doc_id.partition("/")
            alias = self.aliases.pop((AccountId(account), name), None)
            if alias is not None:
                self._uncount(alias)
        elif kind is Kind.ANCHOR:
            self.anchors.pop(doc_id, None)
        elif kind is Kind.ADMISSION:
            self.admissions.pop(doc_id, None)
        elif kind is Kind.KEY:
            key = self.keys.pop(KeyId(doc_id), None)
            if key is not None:
                self._uncount(key)
        else:
            raise AssertionError(f"BUG: documents of kind {kind.value} are not deleted")

    def _count(self, document: Cmk | Alias | Grant) -> None:
        """Take a document into its account's bytes, in place of the present one, which has the same account."""
        account, size = document_bytes(document)
        self._bytes_of[account] += size - self.present_bytes(document)

    def _uncount(self, gone: Cmk | Alias | Grant) -> None:
        account, size = document_bytes(gone)
        self._bytes_of[account] -= size

    # --- look-up --------------------------------------------------------------------------------------------

    def key(self, key_id: KeyId) -> Cmk:
        """Return a key by its id; raises KeyNotFound, as for one that was deleted since it was looked up."""
        key = self.keys.get(key_id)
        if key is None:
            raise KeyNotFound(key=key_id)
        return key

    def key_of_arn(self, arn: str) -> Cmk:
        """Return the key of an ARN; raises InvalidKeyArn or KeyNotFound."""
        region, account, key_id = split_key_arn(arn)
        key = self.keys.get(key_id)
        if key is None or region != REGION or key.account != account:
            raise KeyNotFound(key=arn)
        return key

    def keys_of(self, account: AccountId) -> list[Cmk]:
        """Return an account's keys, oldest first."""
        mine = (key for key in self.keys.values() if key.account == account)
        return sorted(mine, key=lambda key: (key.created, key.id))

    def aliases_of(self, account: AccountId) -> list[Alias]:
        mine = (alias for alias in self.aliases.values() if alias.account == account)
        return sorted(mine, key=lambda alias: alias.name)

    def anchored_by(self, arn: str) -> list[Anchor]:
        """Return the anchors of the volumes and snapshots whose data keys this CMK wraps, in order of their ids."""
        mine = (anchor for anchor in self.anchors.values() if anchor.key_arn == arn)
        return sorted(mine, key=lambda anchor: anchor.resource)

    def grants_of(self, key_id: KeyId) -> Iterator[Grant]:
        return (self.grants[grant_id] for grant_id in self._grants_of.get(key_id, ()))

    def grant_count(self, key_id: KeyId) -> int:
        return len(self._grants_of.get(key_id, ()))

    def grants_issued(self, account: AccountId) -> int:
        """Return how many grants an account has made, over all keys."""
        return self._grants_by[account]

    def account_bytes(self, account: AccountId) -> int:
        """Return how many bytes of keys, aliases and grants an account has made."""
        return self._bytes_of[account]

    def present_bytes(self, document: Cmk | Alias | Grant) -> int:
        """Return how many bytes the document of this name has now, 0 when there is none."""
        present: Cmk | Alias | Grant | None
        match document:
            case Cmk():
                present = self.keys.get(document.id)
            case Alias():
                present = self.aliases.get((document.account, document.name))
            case Grant():
                present = self.grants.get(document.id)
        return 0 if present is None else document_bytes(present)[1]

    def grant_of_token(self, token_hash: str) -> Grant | None:
        grant_id = self._grant_of_token.get(token_hash)
        return None if grant_id is None else self.grants[grant_id]

    def account(self, account: AccountId) -> Account:
        """Return an account's settings; the defaults where it has none."""
        return self.accounts.get(account) or Account(account)

    def managed_key(self, account: AccountId) -> Cmk | None:
        alias = self.aliases.get((account, MANAGED_ALIAS))
        return None if alias is None else self.keys[alias.target]

    def dangling(self) -> Iterator[str]:
        """Yield a sentence for each document that names a key which is not there."""
        for alias in self.aliases.values():
            if alias.target not in self.keys:
                yield f"alias {alias.doc_id} names the key {alias.target}, which is not there"
        for grant in self.grants.values():
            if grant.key not in self.keys:
                yield f"grant {grant.id} names the key {grant.key}, which is not there"

    # --- names of keys --------------------------------------------------------------------------------------

    def resolve(self, requester: Requester, name: str, action: Action, facts: Facts = NO_FACTS) -> Cmk:
        """Return the key that a KeyId parameter names, once the requester is allowed the action on it.

        ``name`` is a key id, a key ARN, ``alias/NAME``, an alias ARN, or a bare word, which is tried as
        ``alias/<word>``. Aliases are taken by every action: the command line promises names everywhere,
        where the KMS API takes only ids for some. Ids and alias names are of the caller's account; other
        accounts' keys are reached by ARN.

        Raises KeyNotFound, AliasNotFound, InvalidKeyArn, AccessDenied, and ManagedKeyMissing when the name
        is the caller's own alias/aws/ebs and nobody used it yet. Foreign keys are refused alike whether
        they exist or not.
        """
        key = self.find(requester, name, action)
        alias = split_alias_arn(name)
        by_alias = alias[1] if alias is not None else None if _names_a_key(name) else _alias_name(name)
        self.authorise(requester, action, key, replace(facts, request_alias=by_alias))
        return key

    def authorise(self, requester: Requester, action: Action, key: Cmk, facts: Facts = NO_FACTS) -> None:
        """Ask the key's policy and its grants; raises AccessDenied."""
        aliases = tuple(alias.name for alias in self.aliases_of(key.account) if alias.target == key.id)
        authorise(requester, action, key, replace(facts, resource_aliases=aliases), self.grants_of(key.id))

    def find(self, requester: Requester, name: str, action: Action) -> Cmk:
        """Return the key that a name means, before anybody asked whether the requester may; raises as ``resolve``."""
        if not name or len(name) > 2048:
            raise KmsValidation(reason="KeyId must have 1 to 2048 characters")
        if name.startswith("arn:"):
            alias = split_alias_arn(name)
            account = split_key_arn(name)[1] if alias is None else alias[0]
            try:
                return self.key_of_arn(name) if alias is None else self._by_alias(requester, *alias)
            except (KeyNotFound, AliasNotFound):
                if may_touch_account(requester, account):
                    raise
                raise denied_abroad(requester, action) from None
        if is_key_id(name):
            key = self.keys.get(KeyId(name))
            if key is None or key.account != requester.account:
                raise KeyNotFound(key=key_arn(requester.account, KeyId(name)))
            return key
        alias_name = _alias_name(name)
        if not is_alias(alias_name):
            raise InvalidKeyArn(key=name)
        return self._by_alias(requester, requester.account, alias_name)

    def _by_alias(self, requester: Requester, account: AccountId, alias_name: str) -> Cmk:
        alias = self.aliases.get((account, alias_name))
        if alias is not None:
            return self.keys[alias.target]
        if alias_name == MANAGED_ALIAS and account == requester.account:
            raise ManagedKeyMissing(account)
        raise AliasNotFound(alias=alias_arn(account, alias_name))


def document_bytes(document: Cmk | Alias | Grant) -> tuple[AccountId, int]:
    """Return whose document it is, a grant being that of who made it, and the length of its JSON."""
    account = document.issuing_account if isinstance(document, Grant) else document.account
    return account, len(to_json(document))


def _names_a_key(name: str) -> bool:
    return name.startswith("arn:") or is_key_id(name)


def _alias_name(name: str) -> str:
    return name if name.startswith("alias/") else f"alias/{name}"


def model_of(documents: Iterable[Document]) -> Model:
    """Return the model of a complete set of documents."""
    model = Model()
    for document in documents:
        model.put(document)
    return model
