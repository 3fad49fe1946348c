"""Composition root of the control daemon: configuration, sockets, logging, start and end."""
