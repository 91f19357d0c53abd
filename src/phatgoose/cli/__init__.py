"""The command line. A command parses, calls the library, prints; results go to stdout."""

from phatgoose.cli.main import main

__all__ = ["main"]
