"""`python -m mmpack`: the command line, for torchrun and environments without the script."""

import sys

from mmpack.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
