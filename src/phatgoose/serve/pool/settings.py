"""The settings of a served pool, from vLLM's `additional_config["phatgoose"]`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from phatgoose.errors import ConfigError
from phatgoose.nn import RoutingSettings
from phatgoose.routers import Router, make_router, router_kinds

ROUTING = tuple(field.name for field in fields(RoutingSettings))


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Experts, router and room. All of it enters the key of vLLM's compile cache."""

    experts: tuple[str, ...]  # folders, folders of such folders, or Hub ids
    router: str = "phatgoose"
    routing: RoutingSettings
    capacity: int | None = None  # experts a layer has room for; None: as many as it has
    max_rank: int | None = None  # None: the longest of the layer's experts
    # Experts that one request may mix, or keep by a top_k of its own; None: it may do neither.
    max_mixture: int | None = None
    targets: tuple[str, ...] = ()  # kinds of layers, "q_proj" say, with room for experts to come
    record_routing: bool = False  # "routing" in the configuration: keep shares; see `Usage`
    background: str | None = None  # a file of ordinary text; adapters' evidence needs it
    base_load_format: str = "auto"  # how vLLM is to load the base
    same_base: bool = False  # whether the base is that of the experts, whatever they call it

    def mixture(self, capacity: int) -> int:
        """The most experts that a token may use, if requests say it; 0: they may not."""
        return max(self.max_mixture, self.routing.kept(capacity)) if self.max_mixture else 0

    @classmethod
    def read(cls, config: Any) -> "ServeSettings":
        """Check the settings. Raises ConfigError for what is missing, unknown or out of range."""
        if not isinstance(config, Mapping):
            raise ConfigError(
                'phatgoose: load_format="phatgoose" wants its settings in additional_config='
                '{"phatgoose": {"experts": [...]}}, and there are '
                + ("none." if config is None else f"{type(config).__name__} in their place.")
            )
        own = [f.name for f in fields(cls) if f.name not in ("routing", "record_routing")]
        known = (*own, "routing", *ROUTING)
        unknown = sorted(set(config) - set(known))
        if unknown:
            raise ConfigError(
                f"phatgoose: there is no setting {unknown[0]!r} in additional_config. Choose from: "
                f"{', '.join(known)}."
            )
        lists = {"experts": "folders or Hub ids", "targets": "the last parts of modules' names"}
        for key, what in lists.items():
            value = config.get(key, [] if key == "targets" else None)
            if not (isinstance(value, list | tuple) and all(isinstance(e, str) for e in value)):
                raise ConfigError(f"phatgoose: {key} must be a list of {what}, got {value!r}.")
        if not config["experts"] and not all(
            config.get(key) for key in ("targets", "capacity", "max_rank")
        ):
            raise ConfigError(
                "phatgoose: experts is empty. To start without any, say what there is to be room "
                "for: targets, capacity and max_rank."
            )
        for key in ("routing", "same_base"):
            if not isinstance(config.get(key, False), bool):
                raise ConfigError(f"phatgoose: {key} is true or false, got {config[key]!r}.")
        for key in ("capacity", "max_rank", "max_mixture"):
            value = config.get(key)
            if value is not None and not (type(value) is int and value >= 1):
                raise ConfigError(f"phatgoose: {key} must be at least 1, got {value!r}.")
        router = served_router(config.get("router", cls.router))
        background = config.get("background")
        if background is not None and not isinstance(background, str):
            raise ConfigError(f"phatgoose: background must be a file's name, got {background!r}.")
        if router.wants_background and background is None:
            raise ConfigError(
                f"phatgoose: the router {config['router']!r} tells what an adapter is for by how "
                "it differs from ordinary text. Give it a file of some thousand words as the base "
                'has read them: "background" in additional_config, phatgoose serve --background.'
            )
        given = {key: config[key] for key in ROUTING if config.get(key) is not None}
        mine = {key: config[key] for key in own if config.get(key) is not None}
        mine["targets"] = tuple(mine.get("targets", ()))
        if router.weighs_ids and given.get("null_score") is not None:
            raise ConfigError(
                "phatgoose: with evidence there is no null_score, which would need text that the "
                "base writes. Leave it out, or use phatgoose.route with transformers."
            )
        return cls(
            **{**mine, "experts": tuple(config["experts"])},
            record_routing=config.get("routing", False),
            routing=RoutingSettings.of(router, **given),
        )


def served_router(name: Any) -> Router:
    """The router of this name, if an engine can run it. Raises ConfigError for others.

    vLLM puts tokens of many requests into one forward, so a layer can only look at single tokens.
    What the context says is counted before the forward (`pool.evidence`), by the worth of token
    ids. Making that table takes the base's first layer.
    """
    if not isinstance(name, str):
        raise ConfigError(f"phatgoose: router must be a name, got {name!r}.")
    router = make_router(name)
    if router.prepares_on == "base" or (router.has_prior and not router.weighs_ids):
        raise ConfigError(
            f"phatgoose: the router {name!r} wants to run the base first, which vLLM does not let "
            f"it. Choose from {', '.join(_servable())}, alone or with evidence of one kind "
            "(+evidence, say), or use phatgoose.route with transformers."
        )
    return router


def gated(router: Router) -> bool:
    """Whether kernels score by the router's signatures: gates, or zeros if evidence is alone."""
    return router.standardises or not router.scores


def _servable() -> list[str]:
    """Names of the routers that need not run the base."""
    return [name for name, kind in router_kinds().items() if kind.prepare is Router.prepare]
