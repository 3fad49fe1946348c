"""The protocol of the sockets, without input or output of its own: framing, messages, interface files.

Shared by the daemons and by ``ebsctl``, whose start-up time it is part of: standard library and
``ebsd.domain`` only.
"""
