"""The volume process: the block engine, what carries requests to it, and the helpers that touch devices."""
