"""`python -m jpd` is the command `jpd`."""

import sys

from jpd.cli import main

sys.exit(main())
