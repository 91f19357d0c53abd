"""Figures for Prometheus, which vLLM's own /metrics shows beside its own."""

import contextlib
from collections.abc import Mapping
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge


class Metrics:
    """The figures of one server."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        gauge: dict[str, Any] = {"registry": registry, "multiprocess_mode": "mostrecent"}
        self.loaded = Gauge("phatgoose_experts_loaded", "Experts in the pool.", **gauge)
        self.capacity = Gauge(
            "phatgoose_experts_capacity", "Experts that the pool has room for.", **gauge
        )
        self.generation = Gauge(
            "phatgoose_pool_generation", "Changes of the pool since the start.", **gauge
        )
        self.entropy = Gauge(
            "phatgoose_routing_entropy",
            "Entropy of the weights of a token at a layer, in nats, mean over the last minutes.",
            **gauge,
        )
        self.tokens = Counter(
            "phatgoose_expert_tokens",
            "Tokens that an expert served, weighted by its share of each.",
            ["expert"],
            registry=registry,
        )
        self.changes = Counter(
            "phatgoose_pool_changes", "Experts added and removed.", ["action"], registry=registry
        )
        self.refusals = Counter(
            "phatgoose_refusals", "Requests that we refused.", ["reason"], registry=registry
        )

    def pool(self, *, loaded: int, capacity: int, generation: int) -> None:
        self.loaded.set(loaded)
        self.capacity.set(capacity)
        self.generation.set(generation)

    def forget(self, name: str) -> None:
        """End the counter of an expert that is gone. One that has not served yet has none."""
        with contextlib.suppress(KeyError):
            self.tokens.remove(name)

    def routed(self, tokens: Mapping[str, float], entropy: float | None) -> None:
        """Add the tokens of a while. If no token was routed, the entropy stays as it was."""
        for name, count in tokens.items():
            self.tokens.labels(name).inc(count)
        if entropy is not None:
            self.entropy.set(entropy)
