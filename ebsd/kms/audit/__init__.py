"""The audit log of the key broker: who asked for which key, when, and what came of it. FORMAT.md, "Audit log"."""
