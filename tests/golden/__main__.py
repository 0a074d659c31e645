"""Entry point of `python -m tests.golden DIR...`."""

import sys

from tests.golden.run import main

sys.exit(main(sys.argv[1:]))
