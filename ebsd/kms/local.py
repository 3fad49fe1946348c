"""The local back end: CMKs, aliases and grants of this host, and the wrapping of data keys under them.

1. Order of checks: name, authorisation, key state, then the request's own parameters, then cryptography.
2. Backing keys are opened for one operation and wiped after it; nothing here keeps one.
3. An anchor's CMK is always named, never taken "from the blob" (a blob can be swapped for one of the
   attacker's own CMK).
Source: KMS API reference, the page of each action.
"""

from __future__ import annotations

import base64
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import msgspec

from ebsd.crypto import wrap
from ebsd.crypto.secret import Buffer, Secret
from ebsd.domain.errors import (
    AccessDenied,
    CiphertextAccessDenied,
    EbsdError,
    ForeignAccessDenied,
    IncorrectKey,
    InvalidCiphertext,
    InvalidGrantId,
    InvalidKeyUsage,
    KeyNotFound,
    KmsValidation,
)
from ebsd.domain.ids import MANAGED_ALIAS, AccountId, KeyId, alias_arn, format_uuid, parse_uuid
from ebsd.kms import aliases, anchors, budget, grants, keys, rotation
from ebsd.kms.documents import SECRET_BYTES, Drop, Put
from ebsd.kms.keystates import Group, KeyState, check_state
from ebsd.kms.model import ManagedKeyMissing, Model
from ebsd.kms.policy import (
    EXPLICIT_DENY,
    MANAGED_DIRECT,
    NO_FACTS,
    SHARED_USE,
    Action,
    Facts,
    Requester,
    check_replacement,
    denied,
    is_denied,
)
from ebsd.kms.records import Alias, Anchor, Cmk, Grant, Kind
from ebsd.kms.service import (
    Context,
    GrantMade,
    KeyDescription,
    KeyService,
    SessionRequest,
    Unwrapped,
    Wrapped,
)
from ebsd.kms.store import Commit, Store

MAX_DATA_KEY: Final = 1024
_GRANT_ID_BYTES: Final = 32
_TOKEN_BYTES: Final = 32

Clock = Callable[[], str]
"""Returns the time as RFC 3339 UTC text."""
RandomBytes = Callable[[int], bytes]
"""Returns random bytes for ids and tokens; keys come from ``Secret.random``."""


class LocalKeys:
    """``KeyService`` over the broker's own documents, and the actions that only this back end has."""

    def __init__(self, store: Store, clock: Clock, random: RandomBytes) -> None:
        self._store = store
        self._clock = clock
        self._random = random

    @property
    def _model(self) -> Model:
        return self._store.model

    # --- names ----------------------------------------------------------------------------------------------

    async def key(self, requester: Requester, name: str, action: Action, facts: Facts = NO_FACTS) -> Cmk:
        """Return the key of a name once the action on it is allowed.

        alias/aws/ebs of the requester is made when it is wanted through ebsd or described (KMS Developer Guide,
        "AWS managed keys": they come into being on first use).
        """
        await self._named(requester, name, action)
        return self._model.resolve(requester, name, action, facts)

    async def _named(self, requester: Requester, name: str, action: Action) -> Cmk:
        """Return what a name means, allowed or not; the requester's own alias/aws/ebs is made if need be."""
        try:
            return self._model.find(requester, name, action)
        except ManagedKeyMissing as missing:
            if not (requester.via_service or action is Action.DESCRIBE_KEY):
                raise denied(requester, action, alias_arn(missing.account, MANAGED_ALIAS), MANAGED_DIRECT) from None
            account = missing.account
        await self._make_managed_key(account)
        return self._model.find(requester, name, action)

    async def _make_managed_key(self, account: AccountId) -> None:
        async with self._store.mutation() as commit:
            if self._model.managed_key(account) is None:  # another request may have been quicker
                now = self._clock()
                key = keys.managed_key(self._new_key_id(), account, self._random(32), now)
                with Secret.random(SECRET_BYTES) as backing:
                    await commit(Put(key, (backing,)), Put(aliases.managed(account, key, now)))

    def _new_key_id(self) -> KeyId:
        return KeyId(str(uuid.UUID(bytes=self._random(16), version=4)))

    # --- keys -----------------------------------------------------------------------------------------------

    async def create_key(self, requester: Requester, request: keys.KeyRequest) -> Cmk:
        """Make a customer managed key of the requester's account; raises KmsLimitExceeded."""
        async with self._store.mutation() as commit:
            keys.check_key_quota(len(self._model.keys_of(requester.account)))
            now = self._clock()
            key = keys.customer_key(self._new_key_id(), requester.account, request, self._random(32), now)
            if request.policy is not None:
                check_replacement(requester, key, request.policy, bypass=request.bypass_lockout_check)
            with Secret.random(SECRET_BYTES) as backing:
                await commit(Put(budget.within(self._model, key), (backing,)))
            return key

    async def describe(
        self, requester: Requester, key_name: str, action: Action = Action.DESCRIBE_KEY
    ) -> KeyDescription:
        key = await self.key(requester, key_name, action)
        return KeyDescription(key.id, key.arn, key.account, key.state.value, key.manager.value, key.spec, key.usage)

    def list_keys(self, requester: Requester) -> list[Cmk]:
        return self._model.keys_of(requester.account)

    async def set_enabled(self, requester: Requester, key_name: str, *, enabled: bool) -> None:
        """EnableKey and DisableKey; a key that is so already stays so. What is attached goes on."""
        action, state = (Action.ENABLE_KEY, KeyState.ENABLED) if enabled else (Action.DISABLE_KEY, KeyState.DISABLED)
        key_id = (await self.key(requester, key_name, action)).id
        async with self._store.mutation() as commit:
            key = self._model.key(key_id)
            check_state(key.arn, key.state, Group.SWITCH)
            if key.state is not state:
                await commit(Put(msgspec.structs.replace(key, state=state)))

    async def policy(self, requester: Requester, key_name: str) -> str:
        """Return the key policy, as it was put."""
        return (await self.key(requester, key_name, Action.GET_KEY_POLICY)).policy

    async def put_policy(self, requester: Requester, key_name: str, document: str, *, bypass: bool) -> None:
        """Give the key another policy, in every key state. Raises MalformedPolicy."""
        facts = Facts(bypass_lockout_check=bypass)
        async with self._store.mutation() as commit:
            key = self.resolve_existing(requester, key_name, Action.PUT_KEY_POLICY, facts)
            check_replacement(requester, key, document, bypass=bypass)
            await commit(Put(budget.within(self._model, msgspec.structs.replace(key, policy=document))))

    # --- rotation -------------------------------------------------------------------------------------------

    async def enable_rotation(self, requester: Requester, key_name: str, period: int | None) -> None:
        """Have the key rotate by itself. Raises KmsValidation, KeyDisabled, KmsInvalidState."""
        facts = Facts(rotation_period=rotation.DEFAULT_PERIOD if period is None else period)
        async with self._store.mutation() as commit:
            key = self.resolve_existing(requester, key_name, Action.ENABLE_KEY_ROTATION, facts)
            changed = rotation.enabled(key, period, self._clock())
            if changed is not key:
                await commit(Put(changed))

    async def disable_rotation(self, requester: Requester, key_name: str) -> None:
        async with self._store.mutation() as commit:
            key = self.resolve_existing(requester, key_name, Action.DISABLE_KEY_ROTATION)
            await commit(Put(rotation.disabled(key)))

    async def rotate_on_demand(self, requester: Requester, key_name: str) -> Cmk:
        """Give the key a new backing key now. Raises KmsConflict, KmsLimitExceeded, KeyDisabled, KmsInvalidState."""
        async with self._store.mutation() as commit:
            key = self.resolve_existing(requester, key_name, Action.ROTATE_KEY_ON_DEMAND)
            now = self._clock()
            rotation.check_on_demand(key, now)
            return await self._rotate(commit, key, rotation.ON_DEMAND, now)

    async def rotate_due(self) -> list[Cmk]:
        """Rotate every key whose time has come; return them."""
        now = self._clock()
        done = []
        for key_id in [key.id for key in self._model.keys.values() if rotation.is_due(key, now)]:
            async with self._store.mutation() as commit:
                key = self._model.key(key_id)
                if rotation.is_due(key, now):  # it may have been disabled meanwhile
                    done.append(await self._rotate(commit, key, rotation.AUTOMATIC, now))
        return done

    async def _rotate(self, commit: Commit, key: Cmk, kind: str, now: str) -> Cmk:
        changed = rotation.rotated(key, self._random(32), kind, now)
        secrets = self._store.secrets(Kind.KEY, key.id)
        try:
            with Secret.random(SECRET_BYTES) as backing:
                await commit(Put(changed, (*secrets, backing)))
        finally:
            for secret in secrets:
                secret.wipe()
        return changed

    # --- aliases --------------------------------------------------------------------------------------------

    async def create_alias(self, requester: Requester, alias: str, target_name: str) -> None:
        async with self._store.mutation() as commit:
            target = self.resolve_existing(requester, target_name, Action.CREATE_ALIAS)
            made = aliases.create(self._model, requester, alias, target, self._clock())
            await commit(Put(budget.within(self._model, made)))

    async def update_alias(self, requester: Requester, alias: str, target_name: str) -> None:
        async with self._store.mutation() as commit:
            target = self.resolve_existing(requester, target_name, Action.UPDATE_ALIAS)
            changed = aliases.update(self._model, requester, alias, target, self._clock())
            self._model.authorise(requester, Action.UPDATE_ALIAS, self._present_target(changed))
            await commit(Put(changed))

    async def delete_alias(self, requester: Requester, alias: str) -> None:
        async with self._store.mutation() as commit:
            gone = aliases.delete(self._model, requester, alias)
            self._model.authorise(requester, Action.DELETE_ALIAS, self._present_target(gone))
            await commit(Drop(Kind.ALIAS, gone.doc_id))

    def _present_target(self, alias: Alias) -> Cmk:
        """Return the key that an alias names now: who takes it away needs the key's permission, too."""
        return self._model.key(self._model.aliases[alias.account, alias.name].target)

    async def list_aliases(self, requester: Requester, key_name: str | None) -> list[Alias]:
        """Return the account's aliases, or those of one key."""
        if key_name is None:
            return self._model.aliases_of(requester.account)
        key = await self.key(requester, key_name, Action.LIST_ALIASES)
        return [alias for alias in self._model.aliases_of(key.account) if alias.target == key.id]

    def resolve_existing(self, requester: Requester, name: str, action: Action, facts: Facts = NO_FACTS) -> Cmk:
        """Resolve inside a mutation, where an AWS managed key is not made: no such action takes one."""
        try:
            return self._model.resolve(requester, name, action, facts)
        except ManagedKeyMissing as missing:
            raise denied(requester, action, alias_arn(missing.account, MANAGED_ALIAS)) from None

    # --- data keys ------------------------------------------------------------------------------------------

    async def _usable(self, requester: Requester, name: str, action: Action, facts: Facts) -> Cmk:
        key = await self.key(requester, name, action, facts)
        _check_crypto(key, action.value)
        return key

    async def generate_data_key(
        self, requester: Requester, key_name: str, length: int, context: Context
    ) -> tuple[Wrapped, Secret]:
        key = await self._usable(requester, key_name, Action.GENERATE_DATA_KEY, Facts(context))
        return self._generate(key, length, context)

    async def generate_data_key_without_plaintext(
        self, requester: Requester, key_name: str, length: int, context: Context
    ) -> Wrapped:
        key = await self._usable(requester, key_name, Action.GENERATE_DATA_KEY_WITHOUT_PLAINTEXT, Facts(context))
        wrapped, plaintext = self._generate(key, length, context)
        plaintext.wipe()
        return wrapped

    def _generate(self, key: Cmk, length: int, context: Context) -> tuple[Wrapped, Secret]:
        if not 1 <= length <= MAX_DATA_KEY:
            raise KmsValidation(reason=f"NumberOfBytes must be between 1 and {MAX_DATA_KEY}")
        data_key = Secret.random(length)
        try:
            return self._wrap(key, data_key.view, context), data_key
        except BaseException:
            data_key.wipe()
            raise

    async def encrypt(self, requester: Requester, key_name: str, plaintext: Buffer, context: Context) -> Wrapped:
        key = await self._usable(requester, key_name, Action.ENCRYPT, Facts(context))
        return self._wrap(key, plaintext, context)

    async def decrypt(self, requester: Requester, key_name: str | None, blob: bytes, context: Context) -> Unwrapped:
        key = await self._key_of_blob(requester, key_name, blob, Action.DECRYPT, Facts(context))
        return self._unwrap(key, blob, context)

    async def decrypt_for_archive(self, requester: Requester, key_arn: str, blob: bytes, context: Context) -> Secret:
        return (await self.decrypt(requester, key_arn, blob, context)).plaintext

    async def re_encrypt(
        self,
        requester: Requester,
        blob: bytes,
        source_key_name: str | None,
        source_context: Context,
        key_name: str,
        context: Context,
    ) -> tuple[Wrapped, Wrapped]:
        same = await self._is_key_of_blob(requester, key_name, blob)
        from_facts, to_facts = Facts(source_context, on_same_key=same), Facts(context, on_same_key=same)
        source = await self._key_of_blob(requester, source_key_name, blob, Action.RE_ENCRYPT_FROM, from_facts)
        destination = await self._usable(requester, key_name, Action.RE_ENCRYPT_TO, to_facts)
        opened = self._unwrap(source, blob, source_context)
        with opened.plaintext as plaintext:
            wrapped = self._wrap(destination, plaintext.view, context)
        return Wrapped(blob, opened.key_arn, opened.material_id), wrapped

    async def _is_key_of_blob(self, requester: Requester, name: str, blob: bytes) -> bool:
        """Say whether a name means the CMK of a blob; a name that means nothing is somebody else's finding."""
        try:
            return self._model.find(requester, name, Action.RE_ENCRYPT_TO).id == _cmk_id(blob)
        except (EbsdError, ManagedKeyMissing):
            return False

    async def _key_of_blob(
        self, requester: Requester, name: str | None, blob: bytes, action: Action, facts: Facts
    ) -> Cmk:
        cmk_id = _cmk_id(blob)
        if name is not None:
            key = await self.key(requester, name, action, facts)
            if key.id != cmk_id:
                raise IncorrectKey()
        else:
            known = self._model.keys.get(cmk_id)
            if known is None:
                raise CiphertextAccessDenied()
            key = known
            try:
                self._model.authorise(requester, action, key, facts)
            except ForeignAccessDenied:
                raise CiphertextAccessDenied() from None  # whether the key exists is its account's business
        _check_crypto(key, action.value)
        return key

    async def check_value(
        self, requester: Requester, key_name: str, blob: bytes, context: Context
    ) -> tuple[str, bytes]:
        key = await self._usable(requester, key_name, Action.GENERATE_DATA_KEY_WITHOUT_PLAINTEXT, Facts(context))
        with self._unwrap(key, blob, context).plaintext as data_key:
            return key.arn, anchors.check_value(data_key)

    def material_of(self, blob: bytes) -> tuple[str, str, str] | None:
        """Return (KeyMaterialId, when it was made, KeyMaterialState) of what wrapped a blob; None: unknown here."""
        try:
            header = wrap.parse_blob(blob)
        except InvalidCiphertext:
            return None
        key = self._model.keys.get(KeyId(format_uuid(header.cmk_id)))
        if key is None:
            return None
        for material in key.backing:
            if material.raw_id == header.backing_id:
                return material.id, material.created, rotation.material_state(key, material)
        return None

    def _wrap(self, key: Cmk, plaintext: Buffer, context: Context) -> Wrapped:
        material = key.current
        with self._backing_key(key, len(key.backing) - 1) as backing:
            blob = wrap.wrap_fresh(backing, parse_uuid(key.id), material.raw_id, plaintext, context)
        return Wrapped(blob, key.arn, material.id)

    def _unwrap(self, key: Cmk, blob: bytes, context: Context) -> Unwrapped:
        header = wrap.parse_blob(blob)
        if header.cmk_id != parse_uuid(key.id):
            raise IncorrectKey()
        for index, material in enumerate(key.backing):
            if material.raw_id == header.backing_id:
                with self._backing_key(key, index) as backing:
                    return Unwrapped(wrap.unwrap(backing, blob, context), key.arn, material.id)
        raise InvalidCiphertext()

    @contextmanager
    def _backing_key(self, key: Cmk, index: int) -> Iterator[Secret]:
        secrets = self._store.secrets(Kind.KEY, key.id)
        try:
            yield secrets[index]
        finally:
            for secret in secrets:
                secret.wipe()

    # --- grants ---------------------------------------------------------------------------------------------

    async def create_grant(self, requester: Requester, key_name: str, request: grants.GrantRequest) -> GrantMade:
        key_id = (await self.key(requester, key_name, Action.CREATE_GRANT, grants.grant_facts(request))).id
        token = base64.b64encode(self._random(_TOKEN_BYTES)).decode("ascii")
        async with self._store.mutation() as commit:
            key = self._model.key(key_id)
            check_state(key.arn, key.state, Group.CREATE_GRANT)
            # An administrator acts under the owner's principal, so such a grant is the owner's.
            issuer = key.account if requester.caller.is_admin else requester.account
            grant = grants.create(
                self._model, key, issuer, request, self._random(_GRANT_ID_BYTES), token, self._clock()
            )
            await commit(Put(budget.within(self._model, grant)))
        return GrantMade(grant.id, token)

    async def create_attach_grant(
        self, requester: Requester, key_name: str, context: Context, name: str | None
    ) -> GrantMade:
        key = await self._named(requester, key_name, Action.CREATE_GRANT)
        return await self.create_grant(requester, key.arn, grants.attach_request(key.account, context, name))

    async def list_grants(
        self, requester: Requester, key_name: str, grant_id: str | None, grantee: str | None
    ) -> list[Grant]:
        """Return the grants of a key, oldest first, perhaps only one of them or one grantee's."""
        key = await self.key(requester, key_name, Action.LIST_GRANTS)
        found = (
            grant
            for grant in self._model.grants_of(key.id)
            if grant_id in (None, grant.id) and grantee in (None, grant.grantee)
        )
        return sorted(found, key=lambda grant: (grant.created, grant.id))

    async def revoke_grant(self, requester: Requester, key_name: str, grant_id: str) -> None:
        """Remove a grant of the key. Raises InvalidGrantId. What was attached by it goes on."""
        async with self._store.mutation() as commit:
            key = self.resolve_existing(requester, key_name, Action.REVOKE_GRANT)
            if grants.of_key(self._model, key.id, grant_id) is None:
                raise InvalidGrantId(grant=grant_id[:128])
            await commit(Drop(Kind.GRANT, grant_id))

    async def retire_grant(
        self, requester: Requester, key_name: str | None, grant_id: str | None, token: str | None
    ) -> None:
        async with self._store.mutation() as commit:
            grant = grants.check_may_retire(
                self._model, requester, self._named_grant(requester, key_name, grant_id, token), grant_id or "given"
            )
            await commit(Drop(Kind.GRANT, grant.id))

    def _named_grant(
        self, requester: Requester, key_name: str | None, grant_id: str | None, token: str | None
    ) -> Grant | None:
        if token is not None:
            if key_name is not None or grant_id is not None:
                raise KmsValidation(reason="Give either GrantToken, or KeyId and GrantId")
            return self._model.grant_of_token(grants.token_hash(token))
        if key_name is None or grant_id is None:
            raise KmsValidation(reason="RetireGrant needs GrantToken, or KeyId and GrantId")
        grant = self._model.grants.get(grant_id)
        if grant is None:
            return None
        # The retiring principal may have no right on the key, so the ARN is compared, not resolved.
        key = self._model.key(grant.key)
        if key_name == key.arn:
            return grant
        try:
            named = self._model.resolve(requester, key_name, Action.RETIRE_GRANT)
        except (ManagedKeyMissing, EbsdError):
            return None
        return grant if named.id == key.id else None

    async def retire_attach_grant(self, key_arn: str, grant_id: str) -> None:
        async with self._store.mutation() as commit:
            try:
                key = self._model.key_of_arn(key_arn)
            except KeyNotFound:  # deleted while the volume was attached, and its grants with it
                return
            if grants.of_key(self._model, key.id, grant_id) is not None:
                await commit(Drop(Kind.GRANT, grant_id))

    # --- key sessions ---------------------------------------------------------------------------------------

    async def check_shared_use(self, requester: Requester, key_name: str, context: Context) -> None:
        account = self._model.find(requester, key_name, Action.DESCRIBE_KEY).account
        facts = {
            Action.DESCRIBE_KEY: NO_FACTS,
            Action.CREATE_GRANT: grants.grant_facts(grants.attach_request(account, context, None)),
        }
        for action in SHARED_USE:
            key = await self.key(requester, key_name, action, facts.get(action, Facts(context)))
        _check_crypto(key, Action.DECRYPT.value)

    async def check_session(self, anchor: Anchor, request: SessionRequest) -> None:
        self._session_key(anchor, request)

    async def decrypt_for_session(self, anchor: Anchor, request: SessionRequest) -> Secret:
        key = self._session_key(anchor, request)
        _check_crypto(key, "Decrypt")
        data_key = self._unwrap(key, request.blob, request.context).plaintext
        try:
            anchors.check_data_key(anchor, data_key)
        except BaseException:
            data_key.wipe()
            raise
        return data_key

    def _session_key(self, anchor: Anchor, request: SessionRequest) -> Cmk:
        key = self._model.key_of_arn(request.key_name)
        anchors.check_session(anchor, key.arn, request.context)
        grants.session_grant(self._model, key, request.grant_id, request.context)
        principal = grants.infrastructure_principal(key.account)
        if is_denied(principal, Action.DECRYPT, key, Facts(request.context)):
            raise AccessDenied(principal=principal, action="kms:Decrypt", resource=key.arn, reason=EXPLICIT_DENY)
        return key


def _check_crypto(key: Cmk, operation: str) -> None:
    check_state(key.arn, key.state, Group.CRYPTO)
    if key.usage != keys.ENCRYPT_DECRYPT or key.spec != keys.SYMMETRIC:
        raise InvalidKeyUsage(key=key.arn, usage=key.usage, operation=operation)


def _cmk_id(blob: bytes) -> KeyId:
    return KeyId(format_uuid(wrap.parse_blob(blob).cmk_id))


def data_key_length(number_of_bytes: int | None, key_spec: str | None) -> int:
    """Return the length that NumberOfBytes or KeySpec ask for; exactly one must be given. Raises KmsValidation."""
    specs: dict[str, int] = {"AES_128": 16, "AES_256": 32}
    if (number_of_bytes is None) == (key_spec is None):
        raise KmsValidation(reason="Please specify either number of bytes or key spec")
    if number_of_bytes is not None:
        return number_of_bytes
    if key_spec not in specs:
        raise KmsValidation(reason=f"KeySpec must be one of {', '.join(specs)}")
    return specs[key_spec]


if TYPE_CHECKING:

    def _conforms(keys: LocalKeys) -> KeyService:
        return keys
