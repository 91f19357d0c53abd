"""serve."""

from collections.abc import Sequence
from dataclasses import dataclass

from phatgoose.cli.fields import Command, option, the_rest
from phatgoose.cli.options import ROUTER, KnobOptions, PoolOptions

EPILOG = """Every further option goes to vLLM (--dtype, --max-model-len and so on).

The pool in the package, and a question to it; docs/serving.md has the rest:

  phatgoose serve

  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{
    "model": "pool", "prompt": "Give the plural of each word: ink, eruption\\n",
    "max_tokens": 16, "temperature": 0, "phatgoose": {"routing": "shares"}}'
"""


@dataclass(frozen=True, kw_only=True)
class Serve(KnobOptions, PoolOptions):
    """Serve a pool with vLLM, behind OpenAI's API. Experts may come and go meanwhile."""

    router: str | None = option(
        "how tokens choose their experts: a router's name (docs/serving.md has those that can be "
        f"served); without it, {ROUTER}",
        default=None,
    )
    top_k: int | None = option(
        "how many experts a token uses in each layer; without it, what the router's paper says",
        default=None,
    )
    background: str | None = option(
        "file of ordinary text, which adapter_evidence compares the prompt with",
        default=None,
        metavar="FILE",
    )
    capacity: int | None = option(
        "experts to have room for; without it, as many as there are, and 8 more with an admin key",
        default=None,
        least=1,
    )
    max_rank: int | None = option(
        "largest rank to have room for; without it, that of the experts there are",
        default=None,
        least=1,
    )
    max_mixture: int | None = option(
        "most experts that one request may mix by weights, or use by a top_k of its own; without "
        "it, requests have no weights, scale, top_k and temperature, and choosing is faster on a "
        "GPU",
        default=None,
        least=1,
    )
    host: str = option("address to listen on", default="127.0.0.1")
    port: int = option("port to listen on", default=8000)
    api_key: str | None = option(
        "key that every request needs; without it, that of $VLLM_API_KEY, or none", default=None
    )
    allow_no_key: bool = option(
        "listen beyond this machine although there is no API key; $PHATGOOSE_ALLOW_NO_KEY=1 says "
        "the same",
        default=False,
    )
    admin_key: str | None = option(
        "key that adding and removing experts needs; without it, that of $PHATGOOSE_ADMIN_KEY, or "
        "nobody may",
        default=None,
    )
    experts_root: str | None = option(
        "folder that experts may be added from; without it, $PHATGOOSE_EXPERTS_ROOT", default=None
    )
    allow_hub: Sequence[str] | None = option(
        "owners on the Hub, or owner/name, that experts may be added from; without it, "
        "$PHATGOOSE_ALLOW_HUB",
        default=None,
        metavar="ORG_OR_ID",
    )
    more: Sequence[str] = the_rest()


COMMANDS = (Command("serve", Serve, run="serving:serve", epilog=EPILOG),)
