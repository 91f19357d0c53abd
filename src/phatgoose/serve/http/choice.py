"""What one request wants of the pool, said by its model's name or its field `phatgoose`."""

import hashlib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phatgoose.serve.http.refusal import Refusal

FIELD = "phatgoose"  # of a request's body; also of vLLM's extra arguments, and of the answer
BASE = "base"  # the model's name of the bare base
KEYS = ("allow", "deny", "base", "routing")
ROUTING = ("shares", "tokens")


@dataclass(frozen=True)
class Choice:
    """Which experts may serve a request, and what to tell of it."""

    experts: tuple[str, ...] | None = None  # sorted; none at all is the bare base; None: the pool
    routing: str | None = None  # "shares" or "tokens"

    def for_worker(self) -> str | None:
        """What the workers want to know, if anything."""
        wanted: dict[str, Any] = {}
        if self.experts is not None:
            wanted = {"allow": list(self.experts)} if self.experts else {"base": True}
        if self.routing:
            wanted["routing"] = self.routing
        return json.dumps(wanted) if wanted else None

    def salt(self, fingerprint: str, given: str | None) -> str:
        """The prefix cache's key beside the tokens: prompts seen by other experts are others.

        Who asks for tokens wants all of them, so nothing is to come from the cache.
        """
        parts: list[Any] = [fingerprint, self.experts, given]
        if self.routing == "tokens":
            parts.append(secrets.token_hex(16))
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def choose(body: dict[str, Any], *, served: str, names: Sequence[str]) -> Choice:
    """The choice of a request among the experts `names` of the pool `served`. Raises Refusal."""
    field = _field(body.get(FIELD))
    routing = field.get("routing")
    if routing is not None and routing not in ROUTING:
        raise _bad(f"{FIELD}.routing is one of {', '.join(ROUTING)}, got {routing!r}.")
    restricts = [key for key in KEYS[:3] if field.get(key) not in (None, False)]
    by_name = _by_name(body.get("model"), served, names)
    if by_name is not None:
        if restricts:
            raise _bad(
                f"model {body['model']!r} says which experts to use, and so does "
                f"{FIELD}.{restricts[0]}. Ask for model {served!r}, or leave {FIELD} out."
            )
        return Choice(by_name, routing)
    if not isinstance(field.get("base", False), bool | None):
        raise _bad(f"{FIELD}.base is true or false, got {field['base']!r}.")
    if field.get("base"):
        if len(restricts) > 1:
            raise _bad(f"{FIELD}.base leaves no experts to allow or deny.")
        return Choice((), routing)
    allow = _names(field, "allow", names)
    deny = _names(field, "deny", names)
    left = [name for name in names if (allow is None or name in allow) and name not in (deny or ())]
    if not left and (allow is not None or deny is not None):
        raise _bad(f'{FIELD} leaves no expert. For the bare base say {{"base": true}}.')
    # Cached prompts are shared with requests that restrict nothing.
    return Choice(None if len(left) == len(names) else tuple(sorted(left)), routing)


def _field(found: Any) -> dict[str, Any]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise _bad(f"{FIELD} is an object, got {type(found).__name__}.")
    unknown = sorted(set(found) - set(KEYS))
    if unknown:
        raise _bad(f"{FIELD} has no {unknown[0]!r}. Choose from {', '.join(KEYS)}.")
    return found


def _by_name(model: Any, served: str, names: Sequence[str]) -> tuple[str, ...] | None:
    if model is None or model == served:
        return None
    if model == BASE:
        return ()
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
    return (name,)


def _names(field: dict[str, Any], key: str, known: Sequence[str]) -> set[str] | None:
    found = field.get(key)
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise _bad(f"{FIELD}.{key} is a list of experts' names, got {str(found)[:200]!r}.")
    unknown = [name for name in found if name not in known]
    if unknown:
        raise _bad(
            f"{FIELD}.{key}: the pool has no expert {unknown[0][:200]!r}. It has {_some(known)}."
        )
    return set(found)


def _some(names: Sequence[str], most: int = 50) -> str:
    return ", ".join([*names[:most], *(["..."] if len(names) > most else [])]) or "none"


def _bad(message: str) -> Refusal:
    return Refusal(400, message, reason="bad_request", param=FIELD)
