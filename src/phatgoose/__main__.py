"""`python -m phatgoose`: the command line where its script is not on PATH."""

import sys

from phatgoose.cli.main import main

sys.exit(main())
