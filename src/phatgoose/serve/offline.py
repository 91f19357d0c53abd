"""The pool of a `vllm.LLM` whose workers are ours: requests that choose, experts that come and go.

llm = LLM(..., load_format="phatgoose", worker_cls="phatgoose.serve.worker.Worker")
pool = ServedPool(llm)
prompts, wanted = pool.ask(["..."], allow=["snips"], routing="shares")
[answer] = llm.generate(prompts, SamplingParams(extra_args=wanted))
pool.routing(answer)
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from phatgoose.errors import ConfigError, RoutingError
from phatgoose.experts.sources import default_name, split_name
from phatgoose.serve.names import REQUEST
from phatgoose.serve.pool.choice import Request


class ServedPool:
    """The pool that the engine serves now. It keeps nothing itself, so two are as good as one.

    Raises RoutingError if the engine's workers are not ours.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        try:
            self.describe()
        except Exception as error:  # of a kind that depends on how vLLM runs its workers
            raise RoutingError(
                "phatgoose: this engine's workers are not ours, so requests cannot choose and the "
                'pool cannot change. Start it with worker_cls="phatgoose.serve.worker.Worker".'
            ) from error

    @property
    def names(self) -> list[str]:
        return [expert["name"] for expert in self.describe()["experts"]]

    def describe(self) -> dict[str, Any]:
        """Return experts, capacity, max_rank, generation and fingerprint."""
        description: dict[str, Any] = self._call("phatgoose_pool")[0]
        return description

    def ask(
        self, prompts: Iterable[str | Mapping[str, Any]], **choice: Any
    ) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """The prompts and the `extra_args` of requests that choose; `choice` as in `Request`.

        The prompts get a cache salt, so that vLLM's prefix cache keeps apart what other experts
        computed. Raises ConfigError for experts that are not there, and what `Request` raises.
        """
        wanted = Request.read(choice)
        pool, salted = self.describe(), []
        wanted.check_room(pool)
        for prompt in prompts:
            given = {"prompt": prompt} if isinstance(prompt, str) else dict(prompt)
            salt = wanted.salt(pool, given.get("cache_salt") or "")
            salted.append({**given, "cache_salt": salt})
        if wanted.routing and not pool["routing"]:
            raise ConfigError('phatgoose: routing is not recorded. Set "routing": true at start.')
        return salted, {REQUEST: wanted.text()}

    def add(self, source: str | Path, *, name: str | None = None) -> None:
        """Serve an expert, a folder or a Hub id, from now on; on all ranks, or else on none.

        Raises RoutingError with the reason of the first rank that cannot.
        """
        given, place = split_name(source)
        name = name or given or default_name(place)
        answers = self._call("phatgoose_prepare", name, str(place))
        try:
            _check(answers)
            if len({answer["sha256"] for answer in answers}) > 1:
                raise RoutingError(f"{name}: {source} is not the same on all ranks.")
        except RoutingError:
            self._call("phatgoose_abort")
            raise
        _check(self._call("phatgoose_commit"))
        self._forget_prompts()

    def remove(self, name: str) -> None:
        """Serve an expert no longer. Raises RoutingError if it is not there."""
        _check(self._call("phatgoose_remove", name))
        self._forget_prompts()

    def routing(self, answer: Any) -> dict[str, Any]:
        """Which experts served a `RequestOutput`: {"shares": ..., "tokens": ...}; only once.

        Raises RoutingError if that was not recorded.
        """
        [report, *_] = self._call("phatgoose_routing", answer.request_id)
        _check([report])
        return dict(report)

    def totals(self) -> dict[str, Any]:
        """Return counts since the start: tokens by expert and by the base alone, mean entropy."""
        [totals, *_] = self._call("phatgoose_totals")
        _check([totals])
        return dict(totals)

    def _forget_prompts(self) -> None:
        if not self._llm.reset_prefix_cache():
            raise RoutingError(
                "phatgoose: the pool has changed, but vLLM keeps prompts that the old one computed "
                "while requests are running. Call reset_prefix_cache when they are done."
            )

    def _call(self, method: str, *arguments: str) -> list[dict[str, Any]]:
        answers: list[dict[str, Any]] = self._llm.collective_rpc(method, args=arguments)
        return answers


def _check(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        if answer.get("error"):
            raise RoutingError(answer["error"])
