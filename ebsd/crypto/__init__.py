"""Cryptography of volumes and wrapped keys: XTS kernel, key derivation, wrapping, sealing, secret memory."""
