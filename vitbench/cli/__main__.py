"""`python -m vitbench.cli`."""

import sys

from vitbench.cli import main

if __name__ == "__main__":
    sys.exit(main())
