"""``python -m mupx`` is the ``mupx`` command."""

from mupx.cli import main

if __name__ == "__main__":
    main()
