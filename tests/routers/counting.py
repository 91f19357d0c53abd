"""A router for tests whose prior depends on every token read so far."""

import torch

from phatgoose.routers import PhatgooseRouter, Router


class CountingRouter(Router):
    """PHATGOOSE's scores, plus `strength` for each real token so far whose id suits an expert.

    It has no `name`, so it is not registered. `seen` keeps the context of every forward.
    """

    def __init__(self, strength=0.5):
        self.strength = strength
        self.seen = []
        self._published = PhatgooseRouter()

    def signature(self, expert, module):
        return self._published.signature(expert, module)

    def score(self, x, signatures):
        return self._published.score(x, signatures)

    def prior(self, context, experts):
        self.seen.append(context)
        if context.ids is None:
            return None
        suits = context.ids.unsqueeze(-1) % len(experts) == torch.arange(len(experts))
        counts = (suits & context.real.unsqueeze(-1)).cumsum(1)[:, -context.length :]
        return self.strength * counts.reshape(-1, len(experts))
