"""Which experts served the tokens of the last minutes, from totals that only grow."""

import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

WINDOW = 300.0  # seconds
EVERY = 5.0  # seconds between samples


@dataclass(frozen=True)
class Totals:
    """Counts since the workers started."""

    tokens: Mapping[str, float] = field(default_factory=dict)  # by expert, weighted
    entropy: float = 0.0  # summed over tokens
    count: float = 0.0  # tokens routed

    def since(self, earlier: "Totals") -> "Totals":
        """The counts that came on top. An expert removed and added again starts from zero."""
        grown = {name: t - earlier.tokens.get(name, 0.0) for name, t in self.tokens.items()}
        fresh = {name: g if g >= 0 else self.tokens[name] for name, g in grown.items()}
        return Totals(fresh, self.entropy - earlier.entropy, self.count - earlier.count)


class Recent:
    """Samples of the totals over the window."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, Totals]] = deque()

    def add(self, totals: Totals, now: float | None = None) -> Totals:
        """Take a sample; return what came since the one before."""
        now = time.monotonic() if now is None else now
        grown = totals.since(self._samples[-1][1]) if self._samples else totals
        self._samples.append((now, totals))
        # One sample as old as the window stays, to count from.
        while len(self._samples) > 2 and self._samples[1][0] <= now - WINDOW:
            self._samples.popleft()
        return grown

    def grown(self) -> Totals:
        """The counts over the window, as of the last sample."""
        if not self._samples:
            return Totals()
        return self._samples[-1][1].since(self._samples[0][1])

    def shares(self) -> dict[str, float]:
        """Shares of the experts that served anything, which add up to 1."""
        tokens = {name: t for name, t in self.grown().tokens.items() if t > 0}
        total = sum(tokens.values())
        return {name: t / total for name, t in tokens.items()}
