"""The key broker: root key, CMKs, grants, account settings and anchors, served on kms.sock and keys.sock."""
