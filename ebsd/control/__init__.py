"""Use cases of the daemon: load, decide (pure), commit, act."""
