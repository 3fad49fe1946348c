"""Entry point of a volume process: ``python -m ebsd.volume``, started by ebsd with a socket as descriptor 0."""

from ebsd.volume.process import main

main()
