"""What one request wants of the pool, said by its model's name or its field `phatgoose`."""

import secrets
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from phatgoose.errors import ConfigError
from phatgoose.serve.http.refusal import Refusal
from phatgoose.serve.http.workers import Contents
from phatgoose.serve.pool.choice import Request

FIELD = "phatgoose"  # of a request's body; also of vLLM's extra arguments, and of the answer
BASE = "base"  # the model's name of the bare base


def choose(body: dict[str, Any], *, served: str, names: Sequence[str]) -> Request:
    """The choice of a request among the experts `names` of the pool `served`. Raises Refusal."""
    by_name = _by_name(body.get("model"), served, names)
    wanted = body.get(FIELD) or {}
    if isinstance(wanted, str):  # which `read` would parse once more, past the checks of the body
        raise Refusal(400, f"{FIELD} is an object, not a text.", reason="bad_request", param=FIELD)
    try:
        choice = Request.read(wanted)
        if by_name is None:
            choice.routed(names)
            return choice
    except ConfigError as error:
        raise Refusal(400, str(error), reason="bad_request", param=FIELD) from None
    if replace(choice, routing=None, scale=None) != Request():
        raise Refusal(
            400,
            f"model {body['model']!r} says which experts to use, and so does {FIELD}. Ask for "
            f"model {served!r}, or leave {FIELD} out.",
            reason="bad_request",
            param=FIELD,
        )
    try:
        return replace(by_name, routing=choice.routing, scale=choice.scale)
    except ConfigError as error:
        raise Refusal(400, str(error), reason="bad_request", param=FIELD) from None


def salt(choice: Request, pool: Contents, given: str | None) -> str:
    """The prefix cache's key beside the tokens: prompts seen by other experts are others.

    Who asks for tokens wants all of them, so nothing is to come from the cache.
    """
    unique = secrets.token_hex(16) if choice.routing == "tokens" else ""
    return choice.salt(asdict(pool), f"{given or ''} {unique}")


def _by_name(model: Any, served: str, names: Sequence[str]) -> Request | None:
    if model is None or model == served:
        return None
    if model == BASE:
        return Request(base=True)
    name = model.removeprefix(f"{served}/") if isinstance(model, str) else None
    if name is None or name == model or name not in names:
        raise Refusal(
            404,
            f"The model {str(model)[:200]!r} does not exist. There are {served!r} (every token "
            f"routed), {BASE!r}, and {served + '/'!r} with the name of an expert: "
            f"{_some(names)}.",
            reason="unknown_model",
            param="model",
        )
    return Request(allow=(name,))


def _some(names: Sequence[str], most: int = 50) -> str:
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])]) or "none"
