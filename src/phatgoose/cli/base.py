"""base fetch: the default base model on this machine."""

import json
from dataclasses import asdict

from phatgoose.cli.arguments.base import Fetch
from phatgoose.models import SMOLLM2
from phatgoose.models.named import fetch_smollm2, find_base


def fetch(asked: Fetch) -> None:
    """Bring the default base onto this disk, if it is not there, and say where it comes from."""
    base = find_base(SMOLLM2) if asked.source == "any" else fetch_smollm2(asked.source)
    if asked.json:
        print(json.dumps(asdict(base)))
    else:
        print(f"{base.name}: {base.origin}")
