"""``python -m raysft.cli``: the command without its script."""

import sys

from raysft.cli import main

if __name__ == "__main__":
    sys.exit(main())
