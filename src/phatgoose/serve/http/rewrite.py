"""Writes requests in vLLM's own fields, and refuses what these cannot say."""

from dataclasses import asdict
from typing import Any

from phatgoose.errors import ConfigError
from phatgoose.serve.http.choice import FIELD, salt
from phatgoose.serve.http.refusal import Refusal
from phatgoose.serve.http.routes import CHOOSES
from phatgoose.serve.http.workers import Contents
from phatgoose.serve.pool.choice import Request

# What vLLM's scheduler reads among the extra arguments as objects of its own making.
INTERNAL = {"kv_transfer_params", "ec_transfer_params"}


def rewritten(
    body: dict[str, Any], choice: Request, contents: Contents, *, served: str
) -> dict[str, Any]:
    """The body for vLLM: the pool's model, a salt for its prefix cache, and what workers need."""
    new = {key: value for key, value in body.items() if key != FIELD}
    if "model" in new:
        new["model"] = served
    new["cache_salt"] = salt(choice, contents, body.get("cache_salt"))
    if choice != Request():
        new["vllm_xargs"] = {**(body.get("vllm_xargs") or {}), FIELD: choice.text()}
    return new


def check(body: dict[str, Any], choice: Request, contents: Contents, *, path: str) -> None:
    """Raise Refusal for a field that would not do what it says."""

    def no(message: str) -> Refusal:
        return Refusal(400, message, reason="bad_request", param=FIELD)

    extra = body.get("vllm_xargs")
    if extra is not None and not isinstance(extra, dict):
        raise Refusal(400, "vllm_xargs is an object.", reason="bad_request", param="vllm_xargs")
    if extra and FIELD in extra:
        raise no(f"Say {FIELD} beside vllm_xargs, not in it.")
    for name in INTERNAL & set(extra or ()):
        raise Refusal(
            400,
            f"{name} is no extra argument. Say it beside vllm_xargs, if this server takes it.",
            reason="bad_request",
            param="vllm_xargs",
        )
    given = body.get("cache_salt")
    if given is not None and not (isinstance(given, str) and given):
        raise Refusal(
            400, "cache_salt is a text, not empty.", reason="bad_request", param="cache_salt"
        )
    if choice != Request() and body.get("use_beam_search"):
        raise no("Beam search takes no choice of experts: vLLM does not tell the workers of it.")
    if path.endswith("/responses") and body.get("background"):
        raise Refusal(
            400,
            "A request in the background might outlive the pool that it asks. Leave it out.",
            reason="bad_request",
            param="background",
        )
    try:
        choice.check_room(asdict(contents))
    except ConfigError as error:
        raise no(str(error)) from None
    if choice.routing and not contents.routing:
        raise no("This server does not note which experts serve what.")
    if choice.routing and path.endswith("/responses"):
        raise no(f"{FIELD}.routing is not told by this route. Use /v1/chat/completions.")


def check_whole(body: dict[str, Any], *, served: str) -> None:
    """Raise Refusal if a request wants other experts than all, on a route that serves by all."""
    model = body.get("model")
    if model is not None and model != served:
        raise Refusal(
            404,
            f"The model {str(model)[:200]!r} is not served by this route, which asks the whole "
            f"pool: {served!r}. Ask for others by {', '.join(CHOOSES)}.",
            reason="unknown_model",
            param="model",
        )
    check_no_choice(body)


def check_no_choice(body: dict[str, Any]) -> None:
    """Raise Refusal for a choice on a route that takes none: the cache's key would not have it."""
    if mentions(body):
        raise Refusal(
            400, f"{FIELD} is for {', '.join(CHOOSES)}.", reason="bad_request", param=FIELD
        )


def mentions(found: Any) -> bool:
    """Whether a body says `phatgoose` anywhere, because workers read it in several places."""
    if isinstance(found, dict):
        return FIELD in found or any(map(mentions, found.values()))
    return isinstance(found, list) and any(map(mentions, found))
