"""``python -m ebsd.kms``: the key broker process."""

from ebsd.kms.main import main

if __name__ == "__main__":
    raise SystemExit(main())
