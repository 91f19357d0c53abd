"""`python -m tests.fuzz`: see `fuzz`."""

import multiprocessing
import sys

from tests.fuzz.fuzz import main

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")  # torch has threads, which a fork does not survive
    sys.exit(main())
