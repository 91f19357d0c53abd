"""base: the default base model on this machine."""

import json
from argparse import Namespace
from dataclasses import asdict

from phatgoose.models import DEFAULT
from phatgoose.models.named import fetch_default, find_base


def fetch(arguments: Namespace) -> None:
    """Bring the default base onto this disk, if it is not there, and say where it comes from."""
    base = find_base(DEFAULT) if arguments.source == "any" else fetch_default(arguments.source)
    if arguments.json:
        print(json.dumps(asdict(base)))
    else:
        print(f"{base.name}: {base.origin}")
