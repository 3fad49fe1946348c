"""How the processes speak: Varlink servers and clients, channels between parent and child, process start."""
