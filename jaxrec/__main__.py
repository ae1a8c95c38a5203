"""`python -m jaxrec` is the command `jaxrec`."""

import sys

from jaxrec.cli.main import main

sys.exit(main())
