"""Keeps the sites of one routed model in step with its pool."""

import contextlib
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from phatgoose.errors import IncompatibleExpertError, RoutingError
from phatgoose.experts import Expert, identify_base
from phatgoose.experts.base import linear_sizes
from phatgoose.experts.bases import tell_bases
from phatgoose.experts.delta import Delta
from phatgoose.experts.renames import renamed_for
from phatgoose.experts.resolve import resolve
from phatgoose.experts.verify import check_modules, check_range
from phatgoose.nn import (
    NO_RULES,
    Bank,
    ContextKeeper,
    Forwards,
    RoutingSettings,
    RoutingState,
    Rules,
    Site,
    WholeSite,
    group_siblings,
)
from phatgoose.pool.pool import ExpertPool
from phatgoose.routers import Router

COMPUTE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

LEAST_RANK = 1  # of a bank: kernels are not made for none
_Ready = dict[str, tuple[Tensor, Delta]]  # signature, and what it comes to, by site


class RoutedModel:
    """The sites of one model, kept in step with the pool."""

    def __init__(
        self,
        model: nn.Module,
        pool: ExpertPool,
        router: Router,
        settings: RoutingSettings,
        room: tuple[int, int],
        same_base: bool = False,
    ) -> None:
        self.model = model
        self.pool = pool
        self.room = room  # the least capacity and rank of a bank
        self.sites: dict[str, Site] = {}
        self._layers = dict(model.named_modules())
        self._identity = identify_base(model)
        self._same_base = same_base or pool.same_base  # whatever it is called
        self._ready: dict[str, _Ready] = {}  # of experts about to be added
        self._adapted: dict[str, frozenset[str]] = {}  # sites, by the expert's name
        self._blocks: list[Rules] = []  # that some thread is in, in the order they began
        self._mirrored: frozenset[str] | None = None  # what compiled models may use
        self._mutex = threading.Lock()
        self.state = RoutingState(router, settings, ContextKeeper(model, Forwards(pool.lock)), [])
        try:
            for expert in pool:
                self._check(expert)
            tell_bases(pool, self._identity, same_base=self._same_base)
            router.prepare(model, pool.experts)
            for expert in pool:
                self._sign(expert)
            self._reserve(pool)
            for expert in pool:
                self.add(expert)
        except BaseException:
            self.close()
            raise
        pool.follow(self)

    def close(self) -> None:
        """Take every hook and bank off the model."""
        self.pool.unfollow(self)
        _forget_compiled()
        for site in self.sites.values():
            site.close()
        self.state.keeper.close()

    def renamed(self, expert: Expert) -> Expert:
        """The expert by the names of the model's modules."""
        return renamed_for(expert, self.model)

    def prepare_add(self, expert: Expert) -> None:
        """Check an expert and make room for it. What can fail does so here, changing nothing."""
        self._check_change(f"pool.add({expert.name})")
        self._check(expert)
        tell_bases([expert], self._identity, same_base=self._same_base)
        with self.state.forwards.ruled(Rules(allowed=frozenset())):
            self.state.router.prepare(self.model, [expert])
        self._sign(expert)
        self._reserve([expert])

    def cancel_add(self, expert: Expert) -> None:
        """Give back what `prepare_add` took, if it got that far."""
        self._ready.pop(expert.name, None)
        self._tidy()

    def add(self, expert: Expert) -> None:
        """Give the expert the next slot at each site it adapts."""
        index, ready = len(self.state.experts), self._ready.pop(expert.name)
        self.state.experts.append(expert)
        self._adapted[expert.name] = frozenset(ready)
        parts: dict[Bank, dict[int, tuple[Tensor, Delta]]] = {}
        for name, signed in ready.items():
            site = self.sites[name]
            parts.setdefault(site.bank, {})[site.part] = signed
        for bank, mine in parts.items():
            bank.append(index, mine)
        self._changed()

    @contextlib.contextmanager
    def ruled(self, rules: Rules, what: str) -> Iterator[None]:
        """Let the forwards of this thread, or task, inside the block follow `rules`."""
        forwards = self.state.forwards
        with self.pool.lock.reading(), self._mutex:
            self.state.check_own(what)
            if self.state.compiled_by and self._blocks and self._blocks[-1] is not forwards.rules():
                raise RoutingError(
                    f"{what}: this model is compiled, or captured in a CUDA graph, and another "
                    "task is inside a block of its own. Leave that block first."
                )
            self._blocks.append(rules)
            self._mirror()
        try:
            with forwards.ruled(rules):
                yield
        finally:
            with self.pool.lock.reading(), self._mutex:
                self._blocks.remove(rules)
                self._mirror()

    def _mirror(self) -> None:
        """Have compiled models and CUDA graphs follow the block that began last.

        They do not ask which thread they run in, so only one may be in a block then.
        """
        rules = self._blocks[-1] if self._blocks else NO_RULES
        traced = self.state.forwards.traced
        traced.bare, traced.trace = rules.bare, rules.trace
        with contextlib.suppress(RoutingError):  # names that are gone: its own forwards say so
            traced.rows = self.state.rows_by(rules)
        if rules.allowed != self._mirrored:
            self._mirrored = rules.allowed
            self._allow()

    def _allow(self) -> None:
        names = self._mirrored
        members = None if names is None else self.state.indices(names)
        for bank in self._banks():
            bank.allow(members)

    def _changed(self) -> None:
        """The pool's experts are other ones now."""
        self.state.changed()
        with self._mutex:
            self._mirror()
            self._allow()
        self._wait_for_devices()

    def _wait_for_devices(self) -> None:
        """Threads may compute on streams of their own, which do not wait for one another."""
        for device in {bank.a.device for bank in self._banks()}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)

    def prepare_remove(self, name: str) -> None:
        self._check_change(f"pool.remove({name})")
        if len(self.pool) == 1:
            raise RoutingError(
                f"{name}: it is the last expert of a pool that routes a model. Add another first, "
                "or call phatgoose.unroute(model)."
            )
        self.state.settings.note_size(len(self.pool) - 1)

    def remove(self, index: int) -> None:
        for bank in self._banks():
            bank.remove(index)
        del self._adapted[self.state.experts[index].name]
        del self.state.experts[index]
        self._tidy()
        self._changed()

    def _tidy(self) -> None:
        """Leave no spare ranks, and no site without experts."""
        for bank in self._banks():
            bank.trim(max(self.room[1], LEAST_RANK))
        for name in set(self.sites).difference(*self._adapted.values()):
            self.sites.pop(name).close()
            _forget_compiled()

    def _check_change(self, what: str) -> None:
        """Raise RoutingError where this thread must not change the pool; else wait for devices."""
        self.state.check_own(what)
        rules = self.state.forwards.rules()
        for held, block in ((rules.trace, "record"), (rules.rows, "assign")):
            if held is not None:
                raise RoutingError(
                    f"the pool cannot change inside a {block} block of a model it routes: indices "
                    "there would change their meaning. Leave the block first."
                )
        self._wait_for_devices()

    def _check(self, expert: Expert) -> None:
        difference = expert.base and expert.base.difference(self._identity)
        if difference:
            raise IncompatibleExpertError(
                f"{expert.name}: was made for another base than this model: {difference}."
            )
        for problem in check_modules(expert, self.model):
            raise IncompatibleExpertError(problem)
        for dtype in {_dtype(self._layers[name], self.model) for name in expert.modules}:
            check_range(expert, dtype)

    def _sign(self, expert: Expert) -> None:
        """Find out what the expert comes to on the model, and its signatures. Either may fail."""
        resolved = resolve(expert, self.model)
        expert = resolved.expert
        ready = {}
        for name, delta in expert.modules.items():
            signature = self.state.router.signature(expert, resolved.signed_by.get(name, name))
            ready[name] = signature, delta
        self._ready[expert.name] = ready

    def _reserve(self, experts: Iterable[Expert]) -> None:
        """Size every bank for these experts on top of those it has, in one go."""
        waiting = [self._ready[expert.name] for expert in experts]
        self._make_sites({name: delta for ready in waiting for name, (_, delta) in ready.items()})
        needed: dict[Bank, list[tuple[int, int]]] = {}
        for ready in waiting:
            sizes: dict[Bank, tuple[int, int]] = {}
            for name, (signature, delta) in ready.items():
                bank = self.sites[name].bank
                rank, widest = sizes.get(bank, (0, 0))
                sizes[bank] = (max(rank, delta.rank), max(widest, len(signature)))
            for bank, size in sizes.items():
                needed.setdefault(bank, []).append(size)
        for bank, every in needed.items():
            ranks, widths = zip(*every, strict=True)
            capacity = max(len(bank) + len(every), self.room[0])
            bank.reserve(capacity, max(*ranks, self.room[1], LEAST_RANK), max(widths))

    def _make_sites(self, adapted: Mapping[str, Delta]) -> None:
        """Make the sites that are not there yet; layers that read one input share a bank."""
        new = set(adapted) - set(self.sites)
        if new:
            _forget_compiled()
        linear = {name for name in new if linear_sizes(self._layers[name]) is not None}
        for group in group_siblings(name for name in self._layers if name in linear):
            for together in self._alike(group):
                self._make_bank(Site, {name: adapted[name] for name in together})
        for name in sorted(new - linear):
            self._make_bank(WholeSite, {name: adapted[name]})

    def _make_bank(self, kind: type[Site], together: Mapping[str, Delta]) -> None:
        layers = [self._layers[name] for name in together]
        deltas = list(together.values())
        bank = Bank(
            deltas[0].in_features,
            [delta.out_features for delta in deltas],
            device=_device(layers[0]),
            dtype=_dtype(layers[0], self.model),
            backend=self.state.settings.backend,
            standardises=self.state.router.standardises,
        )
        for part, (name, layer) in enumerate(zip(together, layers, strict=True)):
            self.sites[name] = kind(name, layer, bank, part, self.state)

    def _alike(self, group: tuple[str, ...]) -> list[tuple[str, ...]]:
        """The group, or each of it alone where input size, device or dtype tell them apart."""
        kinds = set()
        for name in group:
            layer = self._layers[name]
            sizes = linear_sizes(layer)
            kinds.add((sizes and sizes[0], _device(layer), _dtype(layer, self.model)))
        return [group] if len(kinds) == 1 else [(name,) for name in group]

    def _banks(self) -> list[Bank]:
        return list(dict.fromkeys(site.bank for site in self.sites.values()))


def _forget_compiled() -> None:
    """Have torch.compile look again: it does not notice hooks that come or go."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _device(layer: nn.Module) -> torch.device:
    return next((p.device for p in layer.parameters()), torch.device("cpu"))


def _dtype(layer: nn.Module, model: nn.Module) -> torch.dtype:
    """The dtype to compute LoRA products in: the layer's own, or the model's if it is quantised."""
    found: list[torch.dtype | None] = [
        getattr(getattr(layer, "weight", None), "dtype", None),
        getattr(model, "dtype", None),
    ]
    for dtype in found:
        if dtype is not None and dtype in COMPUTE_DTYPES:
            return dtype
    return torch.get_default_dtype()
