"""`python -m pgolf` is the `pgolf` command."""

import sys

from pgolf.cli import main

sys.exit(main())
