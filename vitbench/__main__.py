"""`python -m vitbench`, the same as the command `vitbench`."""

import sys

from vitbench.cli.program import main

if __name__ == "__main__":
    sys.exit(main())
