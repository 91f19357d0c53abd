"""What requests ask for themselves, by token, where every layer reads it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from phatgoose.nn import Choice, RoutingSettings
from phatgoose.ops import Rows


class RowTable:
    """The mixtures and knobs of a running model's requests: a row for each token of a forward.

    These are buffers that stay where they are, so CUDA graphs read them too. A token whose request
    asks for nothing has the pool's own knobs.
    """

    def __init__(
        self, tokens: int, places: int, *, routing: RoutingSettings, device: torch.device
    ) -> None:
        self.places = places  # the most experts that a token may use
        self.routing = routing
        self._usual = self._row(Choice(), [])
        self.rows = Rows(*(t.expand(tokens, *t.shape[1:]).to(device).clone() for t in self._usual))
        self._written = 0  # tokens that may be other than usual

    def place(
        self,
        choices: Sequence[Choice | None],
        counts: Sequence[int],
        names: Sequence[str | None],
        there: Callable[[Tensor], Tensor],
    ) -> None:
        """Write the rows of the next forward; `names` are the experts by slot.

        Give each request's choice, or None, and how many tokens it has. `there` copies to the
        device.
        """
        tokens = 0
        if any(choice is not None and choice.is_own for choice in choices):
            made = [self._row(choice or Choice(), names) for choice in choices]
            which = there(torch.arange(len(made)).repeat_interleave(torch.tensor(counts)))
            tokens = len(which)
            for buffer, *tables in zip(self.rows, *made, strict=True):
                buffer[:tokens] = there(torch.cat(tables))[which]
        if self._written > tokens:
            for buffer, usual in zip(self.rows, self._usual, strict=True):
                buffer[tokens : self._written] = usual.to(buffer.device)
        self._written = tokens

    def _row(self, choice: Choice, names: Sequence[str | None]) -> Rows:
        """One request's row [1, ...], on the host."""
        slots = torch.full((1, self.places), -1)
        weights = torch.zeros(1, self.places)
        mixture = {n: w for n, w in (choice.weights or {}).items() if n in names}
        # In the order of the slots, as a mixture is summed everywhere.
        for place, name in enumerate(sorted(mixture, key=names.index)):
            slots[0, place], weights[0, place] = names.index(name), mixture[name]
        kept = choice.top_k or self.routing.top_k
        top_k = self.places if kept == "all" else min(kept, self.places)
        if choice.weights is not None:
            top_k = 0
        scale = 1.0 if choice.scale is None else choice.scale
        return Rows(
            slots,
            weights,
            torch.tensor([top_k]),
            torch.tensor([choice.temperature or self.routing.temperature]),
            torch.tensor([scale]),
        )
