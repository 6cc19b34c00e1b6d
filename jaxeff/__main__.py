"""`python -m jaxeff`, the same as the `jaxeff` command."""

import sys

from jaxeff.cli import main

if __name__ == "__main__":
    sys.exit(main())
