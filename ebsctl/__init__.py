"""ebsctl: the command line of ebsd, and a client library for its sockets (``ebsctl.client``)."""
