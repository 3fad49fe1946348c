"""``python -m ebsctl``: the same as the ``ebsctl`` program."""

from ebsctl.cli import main

if __name__ == "__main__":
    main()
