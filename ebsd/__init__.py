"""ebsd: encrypted block volumes, snapshots and a key service for one Linux host."""

__version__ = "0.1.0"
