"""The files of the state directory: layers, maps, records and recovery; ciphertext and opaque signatures only."""
