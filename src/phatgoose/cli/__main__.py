"""`python -m phatgoose.cli`."""

import sys

from phatgoose.cli.main import main

sys.exit(main())
