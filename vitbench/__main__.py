"""`python -m vitbench`, the same as the command `vitbench`."""

import sys

from vitbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
