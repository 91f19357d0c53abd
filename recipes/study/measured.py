"""A phatgoose command, and how much of a GPU's memory it took at most.

python measured.py MEMORY.json COMMAND ...
"""

import sys
import time
from pathlib import Path

import torch

from phatgoose.cli.main import main
from phatgoose.files import write_json

if __name__ == "__main__":
    path, started = Path(sys.argv[1]), time.monotonic()
    code = main(sys.argv[2:])
    found = {"command": sys.argv[2:4], "seconds": round(time.monotonic() - started, 1)}
    if torch.cuda.is_available():
        found["allocated"] = torch.cuda.max_memory_allocated()
        found["reserved"] = torch.cuda.max_memory_reserved()
    if not path.exists():  # a command that finds all done says nothing of memory
        write_json(path, found)
    sys.exit(code)
