"""Key policies: what documents are taken, and what each says of a request, as AWS documents it.

Rows cite by their section: [grammar] IAM User Guide, "Grammar of the IAM JSON policy language"; [logic] "Policy
evaluation logic"; [operators] "Condition operators"; [multi] "Multivalued context keys"; [keys] KMS Developer Guide,
"Condition keys for AWS KMS"; [policy] "Key policies in AWS KMS"; [ebs] the policy of alias/aws/ebs.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from ebsd.domain.errors import AccessDenied, MalformedPolicy
from ebsd.domain.ids import AccountId, KeyId, key_arn
from ebsd.domain.model import Caller
from ebsd.kms.grants import check_request, create, grant_facts
from ebsd.kms.keys import KeyRequest, customer_key, managed_key
from ebsd.kms.model import Model
from ebsd.kms.policy import Action, Facts, Requester, access_request, authorise, check_replacement, is_denied
from ebsd.kms.policydocument import MAX_POLICY, AccessRequest, Effect, parse_policy
from ebsd.kms.policyvocabulary import ACTIONS, CONDITION_KEYS
from ebsd.kms.records import Cmk, Constraints

ALICE, BOB = AccountId("000000001001"), AccountId("000000001002")
ALICE_ARN, BOB_ARN = f"arn:aws:iam::{ALICE}:user/alice", f"arn:aws:iam::{BOB}:user/bob"
ALICE_ROOT, BOB_ROOT = f"arn:aws:iam::{ALICE}:root", f"arn:aws:iam::{BOB}:root"
INFRASTRUCTURE = f"arn:aws:sts::{ALICE}:assumed-role/aws:ec2-infrastructure/ebsd"
KEY = KeyId("12345678-1234-1234-1234-123456789abc")
ARN = key_arn(ALICE, KEY)
EC2 = "ec2.local.amazonaws.com"

ALLOW, DENY, SILENT = Effect.ALLOW, Effect.DENY, None


def statement(effect: str = "Allow", **members: Any) -> dict[str, Any]:
    base = {"Effect": effect, "Principal": {"AWS": BOB_ARN}, "Action": "kms:Decrypt", "Resource": "*"}
    for name in ("Principal", "Action", "Resource"):
        if f"Not{name}" in members:
            del base[name]
    return {**base, **members}


def document(*statements: dict[str, Any], **members: Any) -> str:
    return json.dumps({"Version": "2012-10-17", "Statement": list(statements), **members})


def request(
    principal: str = BOB_ARN, account: str = BOB, action: str = "kms:Decrypt", **keys: str | list[str]
) -> AccessRequest:
    """A request; ``keys`` in Python spelling: ``kms__ViaService`` for kms:ViaService."""
    found = {
        name.replace("__", ":").lower(): (value,) if isinstance(value, str) else tuple(value)
        for name, value in keys.items()
    }
    return AccessRequest(principal, AccountId(account), action, ARN, found)


def when(operator: str, key: str, *values: Any) -> dict[str, Any]:
    return statement(Condition={operator: {key: list(values) if len(values) != 1 else values[0]}})


WITH = "kms__EncryptionContext__"
DEPT = when("StringEquals", "kms:EncryptionContext:Dept", "IT")
DENY_DEPT = {**DEPT, "Effect": "Deny"}
DENY_OTHERS = statement("Deny", Condition={"StringNotEquals": {"kms:EncryptionContext:Dept": "IT"}})
DENY_IF_EXISTS = statement("Deny", Condition={"StringEqualsIfExists": {"kms:ViaService": "ec2.local.amazonaws.com"}})
VIA = {"kms__ViaService": EC2}

TABLE: list[tuple[str, list[dict[str, Any]], AccessRequest, Effect | None]] = [
    # principals [grammar], [policy]
    ("the user named", [statement()], request(), ALLOW),
    ("another user", [statement()], request(ALICE_ARN, ALICE), SILENT),
    ("the user's number decides, not the name", [statement()], request(f"arn:aws:iam::{BOB}:user/robert"), ALLOW),
    ("the user's account root", [statement(Principal={"AWS": BOB_ROOT})], request(), ALLOW),
    ("the user's account number", [statement(Principal={"AWS": BOB})], request(), ALLOW),
    ("another account's root", [statement(Principal={"AWS": ALICE_ROOT})], request(), SILENT),
    ("another account's number", [statement(Principal={"AWS": ALICE})], request(), SILENT),
    ("everybody", [statement(Principal="*")], request(), ALLOW),
    ("everybody, as an AWS principal", [statement(Principal={"AWS": "*"})], request(), ALLOW),
    ("one of a list", [statement(Principal={"AWS": [ALICE_ARN, BOB_ARN]})], request(), ALLOW),
    ("none of a list", [statement(Principal={"AWS": [ALICE_ARN, ALICE_ROOT]})], request(), SILENT),
    ("a service is no user", [statement(Principal={"Service": EC2})], request(), SILENT),
    ("a service and a user", [statement(Principal={"Service": EC2, "AWS": BOB_ARN})], request(), ALLOW),
    ("a role that is named", [statement(Principal={"AWS": INFRASTRUCTURE})], request(INFRASTRUCTURE, ALICE), ALLOW),
    ("a role is not its account", [statement(Principal={"AWS": ALICE_ROOT})], request(INFRASTRUCTURE, ALICE), SILENT),
    ("everybody is a role, too", [statement("Deny", Principal="*")], request(INFRASTRUCTURE, ALICE), DENY),
    ("Deny with NotPrincipal spares the named", [statement("Deny", NotPrincipal={"AWS": BOB_ARN})], request(), SILENT),
    ("Deny with NotPrincipal denies others", [statement("Deny", NotPrincipal={"AWS": ALICE_ARN})], request(), DENY),
    # actions [grammar]
    ("the action named", [statement(Action="kms:Decrypt")], request(), ALLOW),
    ("actions are compared without case", [statement(Action="kms:dECRYPT")], request(), ALLOW),
    ("the prefix, too", [statement(Action="KMS:Decrypt")], request(), ALLOW),
    ("another action", [statement(Action="kms:Encrypt")], request(), SILENT),
    ("all of KMS", [statement(Action="kms:*")], request(), ALLOW),
    ("all actions", [statement(Action="*")], request(), ALLOW),
    ("a wildcard at the end", [statement(Action="kms:Dec*")], request(), ALLOW),
    ("a wildcard that fits others", [statement(Action="kms:Describe*")], request(), SILENT),
    ("a wildcard in the middle", [statement(Action="kms:D*t")], request(), ALLOW),
    ("one character", [statement(Action="kms:Decryp?")], request(), ALLOW),
    ("one character is not none", [statement(Action="kms:Decrypt?")], request(), SILENT),
    ("ReEncrypt* is both halves", [statement(Action="kms:ReEncrypt*")], request(action="kms:ReEncryptFrom"), ALLOW),
    ("ReEncryptTo is one half", [statement(Action="kms:ReEncryptTo")], request(action="kms:ReEncryptFrom"), SILENT),
    (
        "GenerateDataKey* is more than GenerateDataKey",
        [statement(Action="kms:GenerateDataKey*")],
        request(action="kms:GenerateDataKeyWithoutPlaintext"),
        ALLOW,
    ),
    (
        "GenerateDataKey is only itself",
        [statement(Action="kms:GenerateDataKey")],
        request(action="kms:GenerateDataKeyWithoutPlaintext"),
        SILENT,
    ),
    ("one of a list of actions", [statement(Action=["kms:Encrypt", "kms:Decrypt"])], request(), ALLOW),
    ("NotAction allows the others", [statement(NotAction="kms:Encrypt")], request(), ALLOW),
    ("NotAction does not allow the named", [statement(NotAction=["kms:De*"])], request(), SILENT),
    # resources [policy]: in a key policy "*" means the key itself
    ("the key itself", [statement(Resource="*")], request(), ALLOW),
    ("the key by its ARN", [statement(Resource=ARN)], request(), ALLOW),
    ("another key's ARN", [statement(Resource=ARN[:-1] + "0")], request(), SILENT),
    ("keys of the account", [statement(Resource=f"arn:aws:kms:local:{ALICE}:key/*")], request(), ALLOW),
    ("NotResource of the key", [statement(NotResource=ARN)], request(), SILENT),
    ("NotResource of another", [statement(NotResource=ARN[:-1] + "0")], request(), ALLOW),
    # evaluation [logic]
    (
        "nothing that fits",
        [statement(Action="kms:Encrypt"), statement(Principal={"AWS": ALICE_ARN})],
        request(),
        SILENT,
    ),
    ("one of two allows", [statement(Action="kms:Encrypt"), statement()], request(), ALLOW),
    ("a deny wins over an earlier allow", [statement(), statement("Deny")], request(), DENY),
    ("a deny wins over a later allow", [statement("Deny"), statement()], request(), DENY),
    ("a deny alone", [statement("Deny")], request(), DENY),
    ("a deny of somebody else", [statement("Deny", Principal={"AWS": ALICE_ARN}), statement()], request(), ALLOW),
    ("a deny of another action", [statement("Deny", Action="kms:Encrypt"), statement()], request(), ALLOW),
    (
        "a deny whose condition fails",
        [statement("Deny", Condition={"Bool": {"kms:GrantIsForAWSResource": "false"}}), statement()],
        request(kms__GrantIsForAWSResource="true"),
        ALLOW,
    ),
    # strings [operators]
    ("StringEquals", [when("StringEquals", "kms:ViaService", EC2)], request(**VIA), ALLOW),
    (
        "StringEquals, another value",
        [when("StringEquals", "kms:ViaService", "s3.local.amazonaws.com")],
        request(**VIA),
        SILENT,
    ),
    ("StringEquals, the key is not there", [when("StringEquals", "kms:ViaService", EC2)], request(), SILENT),
    ("StringEquals, one of several values", [when("StringEquals", "kms:ViaService", "x", EC2)], request(**VIA), ALLOW),
    ("StringEquals has case", [when("StringEquals", "kms:ViaService", EC2.upper())], request(**VIA), SILENT),
    ("StringEquals has no wildcards", [when("StringEquals", "kms:ViaService", "ec2.*")], request(**VIA), SILENT),
    ("names of keys have no case", [when("StringEquals", "KMS:viaservice", EC2)], request(**VIA), ALLOW),
    ("StringEqualsIgnoreCase", [when("StringEqualsIgnoreCase", "kms:ViaService", EC2.upper())], request(**VIA), ALLOW),
    ("StringNotEquals", [when("StringNotEquals", "kms:ViaService", "x")], request(**VIA), ALLOW),
    ("StringNotEquals, equal", [when("StringNotEquals", "kms:ViaService", EC2)], request(**VIA), SILENT),
    ("StringNotEquals, the key is not there", [when("StringNotEquals", "kms:ViaService", EC2)], request(), ALLOW),
    (
        "StringNotEquals means none of the values",
        [when("StringNotEquals", "kms:ViaService", "x", EC2)],
        request(**VIA),
        SILENT,
    ),
    (
        "StringNotEqualsIgnoreCase",
        [when("StringNotEqualsIgnoreCase", "kms:ViaService", EC2.upper())],
        request(**VIA),
        SILENT,
    ),
    ("StringLike", [when("StringLike", "kms:ViaService", "ec2.*.amazonaws.com")], request(**VIA), ALLOW),
    ("StringLike, another", [when("StringLike", "kms:ViaService", "s3.*")], request(**VIA), SILENT),
    (
        "StringLike, one character",
        [when("StringLike", "kms:ViaService", "ec?.local.amazonaws.com")],
        request(**VIA),
        ALLOW,
    ),
    (
        "StringLike takes brackets as themselves",
        [when("StringLike", "kms:ViaService", "ec[0-9].local.amazonaws.com")],
        request(**VIA),
        SILENT,
    ),
    ("StringLike is the whole text", [when("StringLike", "kms:ViaService", "ec2")], request(**VIA), SILENT),
    ("StringNotLike", [when("StringNotLike", "kms:ViaService", "s3.*")], request(**VIA), ALLOW),
    ("StringNotLike, alike", [when("StringNotLike", "kms:ViaService", "ec2.*")], request(**VIA), SILENT),
    # Bool, Null, IfExists, numbers, ARNs [operators]
    (
        "Bool true",
        [when("Bool", "kms:GrantIsForAWSResource", "true")],
        request(kms__GrantIsForAWSResource="true"),
        ALLOW,
    ),
    (
        "Bool takes JSON's true",
        [when("Bool", "kms:GrantIsForAWSResource", True)],
        request(kms__GrantIsForAWSResource="true"),
        ALLOW,
    ),
    (
        "Bool, the other",
        [when("Bool", "kms:GrantIsForAWSResource", "true")],
        request(kms__GrantIsForAWSResource="false"),
        SILENT,
    ),
    ("Bool false, the key is not there", [when("Bool", "kms:GrantIsForAWSResource", "false")], request(), SILENT),
    (
        "BoolIfExists, the key is not there",
        [when("BoolIfExists", "kms:GrantIsForAWSResource", "true")],
        request(),
        ALLOW,
    ),
    (
        "BoolIfExists, the other",
        [when("BoolIfExists", "kms:GrantIsForAWSResource", "true")],
        request(kms__GrantIsForAWSResource="false"),
        SILENT,
    ),
    ("Null true: it must not be there", [when("Null", "kms:ViaService", "true")], request(), ALLOW),
    ("Null true, it is there", [when("Null", "kms:ViaService", "true")], request(**VIA), SILENT),
    ("Null false: it must be there", [when("Null", "kms:ViaService", "false")], request(**VIA), ALLOW),
    ("Null false, it is not there", [when("Null", "kms:ViaService", False)], request(), SILENT),
    ("StringEqualsIfExists, not there", [when("StringEqualsIfExists", "kms:ViaService", EC2)], request(), ALLOW),
    ("StringEqualsIfExists, another", [when("StringEqualsIfExists", "kms:ViaService", "x")], request(**VIA), SILENT),
    ("StringLikeIfExists", [when("StringLikeIfExists", "kms:ViaService", "ec2.*")], request(**VIA), ALLOW),
    (
        "NumericLessThan",
        [when("NumericLessThan", "kms:RotationPeriodInDays", "100")],
        request(kms__RotationPeriodInDays="90"),
        ALLOW,
    ),
    (
        "NumericLessThan, equal",
        [when("NumericLessThan", "kms:RotationPeriodInDays", 90)],
        request(kms__RotationPeriodInDays="90"),
        SILENT,
    ),
    (
        "NumericGreaterThanEquals",
        [when("NumericGreaterThanEquals", "kms:RotationPeriodInDays", 90)],
        request(kms__RotationPeriodInDays="90"),
        ALLOW,
    ),
    (
        "NumericEquals compares numbers",
        [when("NumericEquals", "kms:RotationPeriodInDays", "90.0")],
        request(kms__RotationPeriodInDays="90"),
        ALLOW,
    ),
    (
        "NumericNotEquals",
        [when("NumericNotEquals", "kms:RotationPeriodInDays", "90")],
        request(kms__RotationPeriodInDays="90"),
        SILENT,
    ),
    ("a number that is none", [when("NumericEquals", "kms:ViaService", "1")], request(**VIA), SILENT),
    (
        "ArnLike",
        [when("ArnLike", "aws:PrincipalArn", f"arn:aws:iam::{BOB}:user/*")],
        request(aws__PrincipalArn=BOB_ARN),
        ALLOW,
    ),
    (
        "ArnEquals takes wildcards, too",
        [when("ArnEquals", "aws:PrincipalArn", "arn:aws:iam::*:user/bob")],
        request(aws__PrincipalArn=BOB_ARN),
        ALLOW,
    ),
    (
        "ArnNotLike",
        [when("ArnNotLike", "aws:PrincipalArn", f"arn:aws:iam::{BOB}:*")],
        request(aws__PrincipalArn=BOB_ARN),
        SILENT,
    ),
    # several conditions are "and" [logic]
    (
        "two keys of one operator",
        [statement(Condition={"StringEquals": {"kms:ViaService": EC2, "kms:CallerAccount": BOB}})],
        request(**VIA, kms__CallerAccount=BOB),
        ALLOW,
    ),
    (
        "one of two keys fails",
        [statement(Condition={"StringEquals": {"kms:ViaService": EC2, "kms:CallerAccount": ALICE}})],
        request(**VIA, kms__CallerAccount=BOB),
        SILENT,
    ),
    (
        "two operators",
        [statement(Condition={"StringEquals": {"kms:ViaService": EC2}, "Null": {"kms:RequestAlias": "true"}})],
        request(**VIA),
        ALLOW,
    ),
    (
        "one of two operators fails",
        [statement(Condition={"StringEquals": {"kms:ViaService": EC2}, "Null": {"kms:RequestAlias": "true"}})],
        request(**VIA, kms__RequestAlias="alias/x"),
        SILENT,
    ),
    # encryption context [keys]
    (
        "a pair of the context",
        [when("StringEquals", "kms:EncryptionContext:aws:ebs:id", "vol-1")],
        request(**{f"{WITH}aws:ebs:id": "vol-1"}),
        ALLOW,
    ),
    (
        "another value of the pair",
        [when("StringEquals", "kms:EncryptionContext:aws:ebs:id", "vol-1")],
        request(**{f"{WITH}aws:ebs:id": "vol-2"}),
        SILENT,
    ),
    (
        "values of the context have case",
        [when("StringEquals", "kms:EncryptionContext:Dept", "it")],
        request(**{f"{WITH}Dept": "IT"}),
        SILENT,
    ),
    (
        "names of the context have none",
        [when("StringEquals", "kms:EncryptionContext:dept", "IT")],
        request(**{f"{WITH}Dept": "IT"}),
        ALLOW,
    ),
    (
        "a context without the pair",
        [when("StringEquals", "kms:EncryptionContext:Dept", "IT")],
        request(**{f"{WITH}x": "IT"}),
        SILENT,
    ),
    (
        "StringLike on a pair",
        [when("StringLike", "kms:EncryptionContext:aws:ebs:id", "vol-*")],
        request(**{f"{WITH}aws:ebs:id": "vol-1"}),
        ALLOW,
    ),
    # multivalued keys [multi]
    (
        "ForAnyValue, one fits",
        [when("ForAnyValue:StringEquals", "kms:EncryptionContextKeys", "Dept")],
        request(kms__EncryptionContextKeys=["x", "Dept"]),
        ALLOW,
    ),
    (
        "ForAnyValue, none fits",
        [when("ForAnyValue:StringEquals", "kms:EncryptionContextKeys", "Dept")],
        request(kms__EncryptionContextKeys=["x", "dept"]),
        SILENT,
    ),
    (
        "ForAnyValue of nothing",
        [when("ForAnyValue:StringEquals", "kms:EncryptionContextKeys", "Dept")],
        request(),
        SILENT,
    ),
    (
        "ForAllValues, all fit",
        [when("ForAllValues:StringEquals", "kms:GrantOperations", "Decrypt", "Encrypt")],
        request(kms__GrantOperations=["Decrypt"]),
        ALLOW,
    ),
    (
        "ForAllValues, one does not",
        [when("ForAllValues:StringEquals", "kms:GrantOperations", "Decrypt")],
        request(kms__GrantOperations=["Decrypt", "CreateGrant"]),
        SILENT,
    ),
    (
        "ForAllValues of nothing",
        [when("ForAllValues:StringEquals", "kms:GrantOperations", "Decrypt")],
        request(),
        ALLOW,
    ),
    (
        "ForAnyValue:StringNotEquals",
        [when("ForAnyValue:StringNotEquals", "kms:GrantOperations", "Decrypt")],
        request(kms__GrantOperations=["Decrypt", "Encrypt"]),
        ALLOW,
    ),
    (
        "ForAllValues:StringNotEquals",
        [when("ForAllValues:StringNotEquals", "kms:GrantOperations", "CreateGrant")],
        request(kms__GrantOperations=["Decrypt", "CreateGrant"]),
        SILENT,
    ),
    (
        "ForAnyValue:StringLike on aliases",
        [when("ForAnyValue:StringLike", "kms:ResourceAliases", "alias/prod-*")],
        request(kms__ResourceAliases=["alias/x", "alias/prod-1"]),
        ALLOW,
    ),
    (
        "ForAnyValue:StringNotEquals of nothing",
        [when("ForAnyValue:StringNotEquals", "kms:GrantOperations", "Decrypt")],
        request(),
        SILENT,
    ),
    # re-encryption, aliases [keys]
    (
        "ReEncryptOnSameKey",
        [when("Bool", "kms:ReEncryptOnSameKey", "true")],
        request(kms__ReEncryptOnSameKey="true"),
        ALLOW,
    ),
    (
        "ReEncryptOnSameKey, another key",
        [when("Bool", "kms:ReEncryptOnSameKey", "true")],
        request(kms__ReEncryptOnSameKey="false"),
        SILENT,
    ),
    (
        "RequestAlias",
        [when("StringEquals", "kms:RequestAlias", "alias/backup")],
        request(kms__RequestAlias="alias/backup"),
        ALLOW,
    ),
    ("RequestAlias, by id", [when("StringEquals", "kms:RequestAlias", "alias/backup")], request(), SILENT),
    # sets and ...IfExists [multi]: "ForAnyValue ... if there is no matching context key, the condition returns false"
    (
        "ForAnyValue with IfExists of nothing",
        [when("ForAnyValue:StringEqualsIfExists", "kms:GrantOperations", "Decrypt")],
        request(),
        SILENT,
    ),
    (
        "ForAllValues with IfExists of nothing",
        [when("ForAllValues:StringEqualsIfExists", "kms:GrantOperations", "Decrypt")],
        request(),
        ALLOW,
    ),
    ("IfExists on a Deny of what is not there", [DENY_IF_EXISTS, statement()], request(), DENY),
    ("Null with both values is always true", [when("Null", "kms:ViaService", "true", "false")], request(), ALLOW),
    ("Bool has no case", [when("Bool", "kms:MultiRegion", "FALSE")], request(kms__MultiRegion="false"), ALLOW),
    (
        "NumericLessThanEquals",
        [when("NumericLessThanEquals", "kms:RotationPeriodInDays", 90)],
        request(kms__RotationPeriodInDays="90"),
        ALLOW,
    ),
    (
        "NumericGreaterThan",
        [when("NumericGreaterThan", "kms:RotationPeriodInDays", 90)],
        request(kms__RotationPeriodInDays="90"),
        SILENT,
    ),
    # pairs whose names differ by case only [keys]: "do not use multiple encryption context pairs that differ only by
    # case"; whoever does gains nothing by it
    ("two spellings, one fits", [DEPT], request(**{f"{WITH}dept": ["IT", "HR"]}), SILENT),
    ("two spellings, both fit", [DEPT], request(**{f"{WITH}dept": ["IT", "IT"]}), ALLOW),
    ("a Deny on two spellings", [DENY_DEPT, statement()], request(**{f"{WITH}dept": ["IT", "HR"]}), DENY),
    ("a negated Deny on two spellings", [DENY_OTHERS, statement()], request(**{f"{WITH}dept": ["IT", "HR"]}), DENY),
    ("a negated Deny on what is allowed", [DENY_OTHERS, statement()], request(**{f"{WITH}dept": "IT"}), ALLOW),
]


def test_the_table_has_a_hundred_rows_and_no_two_of_one_name() -> None:
    assert len({row[0] for row in TABLE}) == len(TABLE) >= 100
    assert {row[3] for row in TABLE} == {ALLOW, DENY, SILENT}


@pytest.mark.parametrize(("statements", "asked", "expected"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_what_a_policy_says(statements: list[dict[str, Any]], asked: AccessRequest, expected: Effect | None) -> None:
    assert parse_policy(document(*statements)).decide(asked) is expected


MALFORMED: list[tuple[str, str]] = [
    ("", "not a JSON document"),
    ("[]", "not a JSON object"),
    ("{", "not a JSON document"),
    ("[" * 20000, "not a JSON document"),
    ('{"Version": "2012-10-17"}', "at least one statement"),
    ('{"Version": "2012-10-17", "Version": "2012-10-17", "Statement": []}', "there twice"),
    (document(), "at least one statement"),
    (document(statement(), Version="2020-01-01"), "Version must be"),
    (document(statement(), Extra=1), "unknown member 'Extra'"),
    (document(statement(), Id=5), "Id must be text"),
    (document(statement(Efect="Deny")), "unknown member 'Efect'"),
    (document(statement("allow")), "Effect must be"),
    (document({"Effect": "Allow", "Action": "kms:*", "Resource": "*"}), "must have Principal or NotPrincipal"),
    (document(statement(NotAction="kms:*") | {"Action": "kms:*"}), "Action or NotAction, and not both"),
    (document({"Effect": "Allow", "Principal": "*", "Action": "kms:*"}), "must have Resource or NotResource"),
    (document(statement(NotPrincipal={"AWS": BOB_ARN})), "goes with Deny"),
    (document(statement(Principal="bob")), "must be '*' or an object"),
    (document(statement(Principal={})), "must be '*' or an object"),
    (document(statement(Principal={"Federated": "x"})), "unknown member 'Federated'"),
    (document(statement(Principal={"AWS": "bob"})), "no account and no ARN"),
    (document(statement(Principal={"AWS": "arn:aws:iam::1:user/bob"})), "no account and no ARN"),
    (document(statement(Principal={"AWS": f"arn:aws:iam::{BOB}:user/*"})), "no account and no ARN"),
    (document(statement(Principal={"AWS": []})), "a text or a list of texts"),
    (document(statement(Principal={"Service": "ec2"})), "no service principal"),
    (document(statement(Action="s3:GetObject")), "no kms: action"),
    (document(statement(Action="Decrypt")), "no kms: action"),
    (document(statement(Action=[])), "a text or a list of texts"),
    (document(statement(Action=[1])), "a text or a list of texts"),
    (document(statement(Resource={})), "a text or a list of texts"),
    (document(statement(Sid="a\n")), "Sid"),
    (document(statement(Sid="a"), statement(Sid="a")), "same Sid"),
    (document(statement(Condition=[])), "Condition must be an object"),
    (document(statement(Condition={"StringEqual": {"kms:ViaService": "x"}})), "no condition operator"),
    (document(statement(Condition={"ForSomeValue:StringEquals": {"kms:ViaService": "x"}})), "no condition operator"),
    (document(statement(Condition={"ForAnyValue:Null": {"kms:ViaService": "true"}})), "no condition operator"),
    (document(statement(Condition={"NullIfExists": {"kms:ViaService": "true"}})), "no condition operator"),
    (document(statement(Condition={"StringEquals": {}})), "object of condition keys"),
    (document(statement(Condition={"StringEquals": {"ViaService": "x"}})), "no condition key"),
    (document(statement(Condition={"StringEquals": {"s3:prefix": "x"}})), "no condition key"),
    (document(statement(Condition={"StringEquals": {"kms:ViaService": []}})), "has no value"),
    (document(statement(Condition={"StringEquals": {"kms:ViaService": {}}})), "a list of them"),
    (document(statement(Condition={"Bool": {"kms:ViaService": "maybe"}})), "cannot compare with 'maybe'"),
    (document(statement(Condition={"Null": {"kms:ViaService": "x"}})), "cannot compare with 'x'"),
    (document(statement(Condition={"NumericEquals": {"kms:ViaService": "x"}})), "cannot compare with 'x'"),
    (document(statement(), Id="x" * MAX_POLICY), "longer than 32768 bytes"),
    (document(statement(Condition={"NumericEquals": {"kms:ViaService": "nan"}})), "cannot compare with 'nan'"),
    (document(statement(Condition={"NumericEquals": {"kms:ViaService": "1_000"}})), "cannot compare with '1_000'"),
    (document(statement(Condition={"NumericEquals": {"kms:ViaService": float("inf")}})), "Infinity is no JSON"),
    (document(statement(Condition={"NumericEquals": {"kms:ViaService": float("nan")}})), "NaN is no JSON"),
    (document(statement(Condition={"Bool": {"kms:ViaService": None}})), "a list of them"),
    (document(statement(Effect=["Allow"])), "Effect must be"),
    (document(statement(Effect={})), "Effect must be"),
    (document(statement(), Version=["2012-10-17"]), "Version must be"),
    (document(statement(Principal=["*"])), "must be '*' or an object"),
    (document(statement(Principal={"AWS": None})), "a text or a list of texts"),
    (json.dumps({"Version": "2012-10-17", "Statement": [[]]}), "not an object"),
    (json.dumps({"Version": "2012-10-17", "Statement": "x"}), "at least one statement"),
    ('{"Version": "2012-10-17", "Statement": ' + "9" * 5000 + "}", "not a JSON document"),
    (document(statement()).replace('"kms:Decrypt"', '"kms:Decrypt", "Action": "kms:Encrypt"'), "there twice"),
]


@pytest.mark.parametrize(("text", "reason"), MALFORMED, ids=range(len(MALFORMED)))
def test_a_document_that_is_not_understood_is_refused(text: str, reason: str) -> None:
    with pytest.raises(MalformedPolicy) as caught:
        parse_policy(text)
    assert reason in caught.value.message
    assert caught.value.code == "MalformedPolicyDocumentException"


def test_one_statement_may_stand_without_a_list() -> None:
    text = json.dumps({"Version": "2012-10-17", "Statement": statement()})
    assert parse_policy(text).decide(request()) is ALLOW


# --- authorise: policy, grants, administrators


def user(uid: int, *, via: bool = False, admin: bool = False) -> Requester:
    return Requester(Caller(uid, f"user{uid}", AccountId(f"{uid:012}"), admin), via_service=via)


def key_with(*statements: dict[str, Any]) -> Cmk:
    made = customer_key(KEY, ALICE, KeyRequest("", {}, document(*statements)), bytes(32), "2026-01-01T00:00:00Z")
    assert made.arn == ARN
    return made


OWNER = statement(Principal={"AWS": ALICE_ROOT}, Action="kms:*")


def refusal(requester: Requester, action: Action, key: Cmk, facts: Facts = Facts()) -> str:  # noqa: B008 - frozen
    with pytest.raises(AccessDenied) as caught:
        authorise(requester, action, key, facts)
    return caught.value.message


def test_the_default_policy_is_for_the_owner_alone() -> None:
    key = customer_key(KEY, ALICE, KeyRequest("", {}), bytes(32), "2026-01-01T00:00:00Z")
    for action in Action:
        authorise(user(1001), action, key)
        told = refusal(user(1002), action, key)
        assert f"kms:{action.value} on this resource because the resource does not exist in this Region" in told
        assert KEY not in told


def test_a_policy_lets_another_user_in_for_what_it_names() -> None:
    key = key_with(OWNER, statement())
    authorise(user(1002), Action.DECRYPT, key)
    refusal(user(1002), Action.ENCRYPT, key)
    refusal(user(1003), Action.DECRYPT, key)


def test_an_explicit_deny_is_told_as_one() -> None:
    key = key_with(OWNER, statement("Deny", Principal="*", Condition={"Null": {"kms:ViaService": "true"}}))
    assert refusal(user(1001), Action.DECRYPT, key).endswith(" with an explicit deny in a resource-based policy")
    authorise(user(1001, via=True), Action.DECRYPT, key)


def test_the_channel_and_the_caller_are_conditions() -> None:
    key = key_with(
        statement(Principal="*", Condition={"StringEquals": {"kms:ViaService": EC2, "kms:CallerAccount": BOB}})
    )
    authorise(user(1002, via=True), Action.DECRYPT, key)
    refusal(user(1002), Action.DECRYPT, key)
    refusal(user(1003, via=True), Action.DECRYPT, key)


def test_create_grant_for_the_service_only() -> None:
    rule = statement(Action="kms:CreateGrant", Condition={"Bool": {"kms:GrantIsForAWSResource": "true"}})
    key = key_with(rule)
    authorise(user(1002, via=True), Action.CREATE_GRANT, key)
    refusal(user(1002), Action.CREATE_GRANT, key)


def test_an_administrator_acts_under_the_owner_and_keeps_a_way_back() -> None:
    key = key_with(statement("Deny", Principal="*", Action="kms:*"))
    root = user(0, admin=True)
    assert "explicit deny" in refusal(root, Action.DECRYPT, key)
    for action in (Action.GET_KEY_POLICY, Action.PUT_KEY_POLICY):
        authorise(root, action, key)
        refusal(user(1001), action, key)
    authorise(root, Action.DECRYPT, key_with(OWNER))
    refusal(root, Action.DECRYPT, key_with(statement()))  # bob's right is not the owner's


def grant_to(
    grantee: str, *operations: str, equals: dict[str, str] | None = None, subset: dict[str, str] | None = None
):
    asked = check_request(
        grantee=grantee, operations=operations, equals=equals, subset=subset, retiring=None, name=None
    )
    return create(Model(), key_with(OWNER), ALICE, asked, bytes(32), "token", "2026-01-01T00:00:00Z")


@pytest.mark.parametrize(
    ("grant", "action", "context", "allowed"),
    [
        (grant_to(BOB_ARN, "Decrypt"), Action.DECRYPT, {"a": "b"}, True),
        (grant_to(BOB_ROOT, "Decrypt"), Action.DECRYPT, {}, True),
        (grant_to(BOB_ARN, "Decrypt"), Action.ENCRYPT, {}, False),
        (grant_to(ALICE_ARN, "Decrypt"), Action.DECRYPT, {}, False),
        (grant_to(BOB_ARN, "Decrypt", equals={"a": "b"}), Action.DECRYPT, {"a": "b"}, True),
        (grant_to(BOB_ARN, "Decrypt", equals={"a": "b"}), Action.DECRYPT, {"a": "b", "c": "d"}, False),
        (grant_to(BOB_ARN, "Decrypt", equals={"a": "b"}), Action.DECRYPT, {}, False),
        (grant_to(BOB_ARN, "Decrypt", subset={"a": "b"}), Action.DECRYPT, {"a": "b", "c": "d"}, True),
        (grant_to(BOB_ARN, "Decrypt", subset={"a": "b"}), Action.DECRYPT, {"a": "B"}, False),
        (grant_to(BOB_ARN, "DescribeKey", "Decrypt", equals={"a": "b"}), Action.DESCRIBE_KEY, {}, True),
        (grant_to(BOB_ARN, "ReEncryptFrom"), Action.RE_ENCRYPT_FROM, {}, True),
        (grant_to(BOB_ARN, "ReEncryptFrom"), Action.RE_ENCRYPT_TO, {}, False),
        (grant_to(BOB_ARN, "GenerateDataKey"), Action.GENERATE_DATA_KEY_WITHOUT_PLAINTEXT, {}, False),
    ],
)
def test_a_grant_allows_its_operations_within_its_constraints(
    grant: Any, action: Action, context: dict[str, str], allowed: bool
) -> None:
    key = key_with(OWNER)
    if allowed:
        authorise(user(1002), action, key, Facts(context), [grant])
    else:
        with pytest.raises(AccessDenied):
            authorise(user(1002), action, key, Facts(context), [grant])


@pytest.mark.parametrize(
    ("parent", "operations", "equals", "subset", "allowed"),
    [
        (grant_to(BOB_ARN, "CreateGrant", "Decrypt"), ("Decrypt",), None, None, True),
        (grant_to(BOB_ARN, "CreateGrant", "Decrypt"), ("CreateGrant", "Decrypt"), None, None, True),
        (grant_to(BOB_ARN, "CreateGrant", "Decrypt"), ("Encrypt",), None, None, False),
        (grant_to(BOB_ARN, "CreateGrant", "Decrypt"), ("Decrypt", "Encrypt"), None, None, False),
        (grant_to(BOB_ARN, "Decrypt"), ("Decrypt",), None, None, False),
        (grant_to(BOB_ARN, "CreateGrant", "Decrypt", subset={"a": "b"}), ("Decrypt",), None, None, False),
        (grant_to(BOB_ARN, "CreateGrant", "Decrypt", subset={"a": "b"}), ("Decrypt",), None, {"c": "d"}, False),
        (grant_to(BOB_ARN, "CreateGrant", "Decrypt", subset={"a": "b"}), ("Decrypt",), None, {"a": "b"}, True),
        (
            grant_to(BOB_ARN, "CreateGrant", "Decrypt", subset={"a": "b"}),
            ("Decrypt",),
            {"a": "b", "c": "d"},
            None,
            True,
        ),
        (grant_to(BOB_ARN, "CreateGrant", "Decrypt", equals={"a": "b"}), ("Decrypt",), None, {"a": "b"}, False),
        (grant_to(BOB_ARN, "CreateGrant", "Decrypt", equals={"a": "b"}), ("Decrypt",), {"a": "b"}, None, True),
        (grant_to(BOB_ARN, "CreateGrant", "Decrypt", equals={"a": "b"}), ("Decrypt",), {"a": "c"}, None, False),
    ],
)
def test_a_grant_makes_no_wider_grant(
    parent: Any,
    operations: tuple[str, ...],
    equals: dict[str, str] | None,
    subset: dict[str, str] | None,
    allowed: bool,
) -> None:
    asked = check_request(
        grantee=ALICE_ARN, operations=operations, equals=equals, subset=subset, retiring=None, name=None
    )
    key, facts = key_with(OWNER), grant_facts(asked)
    if allowed:
        authorise(user(1002), Action.CREATE_GRANT, key, facts, [parent])
    else:
        with pytest.raises(AccessDenied):
            authorise(user(1002), Action.CREATE_GRANT, key, facts, [parent])


def test_a_deny_of_the_policy_wins_over_a_grant() -> None:
    key = key_with(OWNER, statement("Deny"))
    with pytest.raises(AccessDenied):
        authorise(user(1002), Action.DECRYPT, key, Facts({}), [grant_to(BOB_ARN, "Decrypt")])


def test_the_managed_key_is_for_its_account_through_the_service() -> None:
    key = managed_key(KEY, ALICE, bytes(32), "2026-01-01T00:00:00Z")
    through_ebsd = (
        Action.ENCRYPT, Action.DECRYPT, Action.RE_ENCRYPT_FROM, Action.RE_ENCRYPT_TO, Action.GENERATE_DATA_KEY,
        Action.GENERATE_DATA_KEY_WITHOUT_PLAINTEXT, Action.CREATE_GRANT,
    )  # fmt: skip
    for action in through_ebsd:
        authorise(user(1001, via=True), action, key)
        assert "used through ebsd only" in refusal(user(1001), action, key)
        refusal(user(1002, via=True), action, key)
    for action in (Action.DESCRIBE_KEY, Action.GET_KEY_POLICY, Action.LIST_ALIASES, Action.LIST_GRANTS,
                   Action.REVOKE_GRANT):  # fmt: skip
        authorise(user(1001), action, key)
    for action in (Action.PUT_KEY_POLICY, Action.DISABLE_KEY, Action.CREATE_ALIAS):
        assert "only the service itself" in refusal(user(1001), action, key)
        assert "only the service itself" in refusal(user(0, admin=True), action, key)


def test_a_policy_can_shut_out_the_processes_that_serve_volumes() -> None:
    facts = Facts({"aws:ebs:id": "vol-1"})
    assert not is_denied(INFRASTRUCTURE, Action.DECRYPT, key_with(OWNER), facts)
    assert is_denied(
        INFRASTRUCTURE, Action.DECRYPT, key_with(OWNER, statement("Deny", Principal={"AWS": INFRASTRUCTURE})), facts
    )
    only_this = statement(
        "Deny", Principal="*", Condition={"StringEquals": {"kms:EncryptionContext:aws:ebs:id": "vol-1"}}
    )
    assert is_denied(INFRASTRUCTURE, Action.DECRYPT, key_with(OWNER, only_this), facts)
    assert not is_denied(INFRASTRUCTURE, Action.DECRYPT, key_with(OWNER, only_this), Facts({"aws:ebs:id": "vol-2"}))


def test_a_policy_that_locks_its_author_out_is_refused_unless_told_otherwise() -> None:
    key = key_with(OWNER)
    locked = document(statement(Principal={"AWS": BOB_ARN}, Action="kms:*"))
    with pytest.raises(MalformedPolicy, match="will not allow you to update the key policy"):
        check_replacement(user(1001), key, locked, bypass=False)
    check_replacement(user(1001), key, locked, bypass=True)
    check_replacement(user(1002), key, locked, bypass=False)
    with pytest.raises(MalformedPolicy):
        check_replacement(user(1001), key, "{}", bypass=True)


# --- what a policy that is put may name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"Action": "kms:Decypt"}, "'kms:Decypt' is no action of KMS"),
        ({"Action": ["kms:Decrypt", "kms:ReEncrypt"]}, "'kms:ReEncrypt' is no action of KMS"),
        ({"Action": "kms:Decrypt?"}, "is no action of KMS"),
        ({"NotAction": "kms:Xyz*"}, "'kms:Xyz*' is no action of KMS"),
        ({"Condition": {"StringEquals": {"kms:ViaServce": EC2}}}, "'kms:viaservce' is no condition key"),
        ({"Condition": {"StringEquals": {"aws:username": "bob"}}}, "'aws:username' is no condition key"),
        ({"Condition": {"StringEquals": {"kms:EncryptionContext:": "x"}}}, "is no condition key"),
        ({"Condition": {"StringLike": {"aws:PrincipalArn": "arn:aws:iam::*:user/${aws:username}"}}}, "variables"),
        ({"Resource": "arn:aws:kms:local:${aws:PrincipalAccount}:key/*"}, "variables"),
    ],
)
def test_a_name_that_nothing_has_is_refused_when_the_policy_is_put(change: dict[str, Any], reason: str) -> None:
    """In a Deny it would deny nothing, and nobody would see it. In place it is what it always was."""
    text = document(OWNER, statement("Deny", **change))
    with pytest.raises(MalformedPolicy) as caught:
        check_replacement(user(1001), key_with(OWNER), text, bypass=True)
    assert reason in caught.value.message
    assert parse_policy(text).decide(request(ALICE_ARN, ALICE)) is ALLOW


def test_names_of_aws_that_nothing_has_here_are_taken() -> None:
    text = document(
        OWNER,
        statement("Deny", Action=["kms:Sign*", "kms:Generate*", "kms:*Key", "*"], Condition={"Bool": NOT_HERE}),
        statement("Deny", Condition={"StringNotEquals": {"kms:EncryptionContext:Dept": "IT"}}),
        statement("Deny", Condition={"StringEquals": {"aws:ResourceTag/Env": "prod"}}),
    )
    check_replacement(user(1001), key_with(OWNER), text, bypass=False)


NOT_HERE = {"aws:MultiFactorAuthPresent": "true", "aws:ViaAWSService": "true"}


def test_every_action_of_ours_is_one_of_kms() -> None:
    assert {action.value for action in Action} <= ACTIONS


def test_every_condition_key_of_a_request_may_be_named() -> None:
    key = msgspec.structs.replace(key_with(OWNER), tags={"Env": "prod"})
    facts = Facts(
        context={"Dept": "IT"}, grant_operations=("Decrypt",), grantee=BOB_ARN, retiring=BOB_ARN,
        constraints=Constraints(subset={"a": "b"}), on_same_key=True, bypass_lockout_check=False, rotation_period=90,
        request_alias="alias/a", resource_aliases=("alias/a",),
    )  # fmt: skip
    names = access_request(user(1001, via=True), Action.CREATE_GRANT, key, facts).keys
    families = {name for name in names if name.startswith(("kms:encryptioncontext:", "aws:resourcetag/"))}
    assert families == {"kms:encryptioncontext:dept", "aws:resourcetag/env"}
    assert set(names) - families <= CONDITION_KEYS
    assert names["aws:resourcetag/env"] == ("prod",)


@pytest.mark.parametrize("action", [Action.CREATE_GRANT, Action.LIST_GRANTS, Action.REVOKE_GRANT])
def test_who_sends_requests_on_grants_is_a_condition(action: Action) -> None:
    """KMS Developer Guide: kms:GrantIsForAWSResource is of CreateGrant, ListGrants and RevokeGrant."""
    for wanted, via in (("true", True), ("false", False)):
        rule = statement(Action=f"kms:{action.value}", Condition={"Bool": {"kms:GrantIsForAWSResource": wanted}})
        authorise(user(1002, via=via), action, key_with(rule))
        refusal(user(1002, via=not via), action, key_with(rule))


def test_a_tag_of_the_key_is_a_condition() -> None:
    """Of two tags that differ by case only, one is enough for a Deny."""
    rule = statement("Deny", Principal="*", Condition={"StringEquals": {"aws:ResourceTag/env": "prod"}})
    for tags, denied in (({}, False), ({"Env": "prod"}, True), ({"env": "test"}, False)):
        key = msgspec.structs.replace(key_with(OWNER, rule), tags=tags)
        assert (access(key) is DENY) is denied
    assert access(msgspec.structs.replace(key_with(OWNER, rule), tags={"env": "test", "ENV": "prod"})) is DENY


def access(key: Cmk) -> Effect | None:
    return parse_policy(key.policy).decide(access_request(user(1001), Action.DECRYPT, key, Facts({})))


def test_two_spellings_of_a_pair_open_nothing() -> None:
    key = key_with(OWNER, DEPT, {**DENY_DEPT, "Principal": {"AWS": ALICE_ARN}})
    refusal(user(1002), Action.DECRYPT, key, Facts({"Dept": "HR", "dept": "IT"}))
    refusal(user(1002), Action.DECRYPT, key, Facts({"dept": "IT", "Dept": "HR"}))
    for context in ({"Dept": "IT", "dept": "x"}, {"dept": "x", "Dept": "IT"}):
        assert "explicit deny" in refusal(user(1001), Action.DECRYPT, key, Facts(context))


def test_the_processes_that_serve_volumes_are_a_role() -> None:
    rule = statement("Deny", Principal="*", Condition={"StringEquals": {"aws:PrincipalType": "AssumedRole"}})
    assert is_denied(INFRASTRUCTURE, Action.DECRYPT, key_with(OWNER, rule), Facts({"a": "b"}))
    authorise(user(1001), Action.DECRYPT, key_with(OWNER, rule), Facts({"a": "b"}))
