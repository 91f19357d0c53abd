"""Every route of vLLM's server, and what we let it do. A route that is not listed is closed."""

import re
from collections.abc import Iterable
from enum import Enum, auto
from typing import Any, NamedTuple

from starlette.routing import compile_path
from starlette.types import Scope

from phatgoose.serve.http.refusal import Refusal


class Rule(Enum):
    OPEN = auto()  # needs no key: it tells nothing of prompts and answers, and changes nothing
    KEY = auto()  # needs the API key; runs no model
    CHOOSES = auto()  # needs the API key; a request may choose its experts
    WHOLE = auto()  # needs the API key; served by the whole pool and by nothing else
    CLOSED = auto()  # refused: it would change the engine under the pool, or slip past our rules


# What a request may choose experts on, and what vLLM calls it inside the engine.
CHOOSES = {
    "/v1/completions": "cmpl-{}",
    "/v1/chat/completions": "chatcmpl-{}",
    "/v1/responses": None,  # one answer may be many requests of the engine
}

RULES: dict[Rule, tuple[str, ...]] = {
    Rule.OPEN: (
        "GET /health",
        "GET /ping",
        "POST /ping",
        "GET /version",
        "GET /load",
        "GET /metrics",
        "GET /metrics/",
        "GET /docs",
        "GET /docs/oauth2-redirect",
        "GET /redoc",
        "GET /openapi.json",
        "GET /static/{path:path}",  # of /docs, where vLLM is told to have them offline
    ),
    Rule.KEY: (
        "GET /v1/models",
        "GET /v1/responses/{response_id}",
        "POST /v1/responses/{response_id}/cancel",
        "POST /v1/messages/count_tokens",
        "POST /v1/completions/render",
        "POST /v1/chat/completions/render",
        "POST /v1/messages/render",
        "POST /v1/responses/render",
        "POST /cohere/v2/chat/render",
        "POST /v1/completions/derender",
        "POST /v1/chat/completions/derender",
        "POST /tokenize",
        "POST /detokenize",
        "GET /tokenizer_info",
        "POST /start_profile",
        "POST /stop_profile",
    ),
    Rule.CHOOSES: tuple(f"POST {path}" for path in CHOOSES),
    Rule.WHOLE: (
        "POST /v1/chat/completions/batch",
        "POST /v1/messages",
        "POST /v1/systemone",
        "POST /cohere/v2/chat",
        "POST /v1/embeddings",
        "POST /v2/embed",
        "POST /pooling",
        "POST /classify",
        "POST /score",
        "POST /v1/score",
        "POST /rerank",
        "POST /v1/rerank",
        "POST /v2/rerank",
        "POST /generative_scoring",
    ),
    Rule.CLOSED: (
        # These pass a request on to other routes, by a model that a header may name.
        "POST /invocations",
        "POST /inference/v1/generate",
        # Sound comes as forms, not as the JSON that we read.
        "POST /v1/audio/transcriptions",
        "POST /v1/audio/translations",
        "WEBSOCKET /v1/realtime",
        # Adapters of vLLM's own would be served in the pool's place.
        "POST /v1/load_lora_adapter",
        "POST /v1/unload_lora_adapter",
        "POST /adapters",
        "DELETE /adapters/{adapter_name}",
        # These stop, change or question the engine behind the pool's back.
        "POST /scale_elastic_ep",
        "POST /is_scaling_elastic_ep",
        "GET /kv_event_sources",
        "POST /inference/v1/abort_requests",
        "POST /abort_requests",
        "POST /fault_tolerance/apply",
        "GET /fault_tolerance/status",
        "GET /server_info",
        "POST /reset_prefix_cache",
        "POST /reset_mm_cache",
        "POST /reset_encoder_cache",
        "POST /collective_rpc",
        "POST /sleep",
        "POST /wake_up",
        "POST /release_kv_cache_memory",
        "GET /is_sleeping",
        "POST /pause",
        "POST /resume",
        "GET /is_paused",
        "POST /init_weight_transfer_engine",
        "POST /shutdown_weight_transfer_engine",
        "POST /start_weight_update",
        "POST /start_draft_weight_update",
        "POST /update_weights",
        "POST /finish_weight_update",
        "POST /update_weight_version",
        "GET /weight_info",
        "POST /weight_checker",
        "GET /get_world_size",
    ),
}


class _Known(NamedTuple):
    method: str
    path: str
    pattern: re.Pattern[str]
    rule: Rule


def _known(line: str, rule: Rule) -> _Known:
    method, path = line.split(" ")
    return _Known(method, path, compile_path(path)[0], rule)


_KNOWN = [_known(line, rule) for rule, lines in RULES.items() for line in lines]


def path_of(scope: Scope) -> str:
    """The path below the one that the server is mounted at, as starlette takes it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    rest = path.removeprefix(root)
    return rest if rest[:1] in ("", "/") else path


def rule_of(method: str, path: str) -> Rule:
    """Find the rule of a request. Raises Refusal if there is no such route, or it is closed."""
    method = "GET" if method == "HEAD" else method
    found = {known.method: known.rule for known in _KNOWN if known.pattern.match(path)}
    found.pop("WEBSOCKET", None)
    if not found:
        raise Refusal(404, f"{path[:200]}: this server has no such route.", reason="closed")
    if method not in found:
        allowed = ", ".join(sorted(found))
        raise Refusal(
            405,
            f"{path[:200]} takes {allowed}, not {method}.",
            reason="bad_request",
            headers={"Allow": allowed},
        )
    if found[method] is Rule.CLOSED:
        raise Refusal(
            403,
            f"{method} {path[:200]} is closed on this server, for it knows nothing of the pool. "
            f"Ask by {', '.join(CHOOSES)}.",
            reason="closed",
        )
    return found[method]


def unknown(routes: Iterable[Any], before: str = "") -> list[str]:
    """Routes of vLLM's application that are not listed, each as "METHOD path"."""
    known = {(one.method, one.path) for one in _KNOWN}
    found = []
    for route in routes:
        path = before + str(getattr(route, "path", ""))
        inner = getattr(route, "routes", None)
        methods = getattr(route, "methods", None)
        if inner:
            found += unknown(inner, path)
        elif methods is None and "WebSocket" in type(route).__name__:
            methods = {"WEBSOCKET"}
        elif methods is None:
            methods = {"GET"}  # a mounted application
            path = path if (("GET", path) in known) else f"{path}/{{path:path}}"
        for method in sorted(set(methods or ()) - {"HEAD"}):
            if (method, path) not in known:
                found.append(f"{method} {path}")
    return found
