"""Evidence over the context (`routers.evidence`) for batches in which many requests take turns."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from phatgoose.errors import RoutingError

ROWS = 64  # requests at first


class Evidence:
    """Keeps for each running request the worth of the tokens it has read, summed by slot in fp64.

    So a token's prior costs a look-up and an addition, whatever came before it. If the prefix cache
    spared the model some tokens, they are summed when the request comes.

    `worth` is fp32 [V, C]; a slot without an expert is all zeros. `place` copies to its device.
    """

    def __init__(
        self,
        tokens: int,
        capacity: int,
        device: torch.device,
        *,
        strength: float,
        ahead: bool,
        place: Callable[[Tensor], Tensor],
    ) -> None:
        self.worth = torch.zeros(tokens, capacity, device=device)
        self._strength, self._ahead, self._place = strength, ahead, place
        self._sums = torch.zeros(ROWS, capacity, device=device, dtype=torch.float64)
        self._whole = self._sums.clone()  # means over the whole prompts, where `ahead`
        self._free = list(range(ROWS))
        self._rows: dict[str, int] = {}
        self._read: dict[str, int] = {}  # tokens that are in the sums
        self._prompts: dict[str, Sequence[int]] = {}

    def put(self, slot: int, worth: Float[Tensor, " V"] | None) -> None:
        """Put another expert, or none, into a slot. It starts at zero for requests under way."""
        self.worth[:, slot] = 0.0 if worth is None else worth.to(self.worth.device)
        self._sums[:, slot] = 0.0
        self._whole[:, slot] = 0.0

    def start(self, request: str, prompt: Sequence[int] | None) -> None:
        """A request has come. Raises RoutingError where there are only embeddings of its prompt."""
        if prompt is None:
            raise RoutingError(f"phatgoose: {request} gives embeddings, evidence needs token ids.")
        self.finish(request)
        if not self._free:
            count = len(self._sums)
            self._sums = torch.cat([self._sums, torch.zeros_like(self._sums)])
            self._whole = torch.cat([self._whole, torch.zeros_like(self._whole)])
            self._free = list(range(count, 2 * count))
        row = self._free.pop()
        self._rows[request], self._read[request], self._prompts[request] = row, 0, prompt
        self._sums[row] = 0.0
        if self._ahead:
            self._whole[row] = self._total(prompt) / max(1, len(prompt))

    def finish(self, request: str) -> None:
        if request in self._rows:
            self._free.append(self._rows.pop(request))
            del self._read[request], self._prompts[request]

    def read(
        self,
        requests: Sequence[str],
        counts: Sequence[int],
        ids: Int[Tensor, " T"],
        *,
        first: Mapping[str, int],
        known: Mapping[str, Sequence[int]],
    ) -> Float[Tensor, "T C"]:
        """The priors of a batch: `counts` tokens of each request, from its position `first` on.

        `known` are all ids of requests that were interrupted. Raises RoutingError where a request
        goes on from tokens that nobody here has read.
        """
        for request in requests:
            if self._read[request] != first[request]:
                self._return_to(request, first[request], known)
        rows, starts, ends, firsts, prompts = [], [], [], [], []
        end = 0
        for request, count in zip(requests, counts, strict=True):
            start, end = end, end + count
            rows.append(self._rows[request])
            starts.append(start)
            ends.append(end)
            firsts.append(first[request] - start)
            prompts.append(len(self._prompts[request]))
            self._read[request] = first[request] + count
        table = self._place(torch.tensor([rows, starts, ends, firsts, prompts]))
        row, starting, ending, shift, prompt = table
        which = self._place(torch.arange(len(rows)).repeat_interleave(torch.tensor(counts)))
        sums = self.worth[ids].double().cumsum(0)
        before = sums[starting - 1] * (starting > 0).unsqueeze(1)
        running = sums + (self._sums[row] - before)[which]
        self._sums[row] = running[ending - 1]
        read = torch.arange(1, end + 1, device=ids.device) + shift[which]  # tokens up to each
        means = running / read.unsqueeze(1)
        if self._ahead:
            inside = (read <= prompt[which]).unsqueeze(1)
            means = torch.where(inside, self._whole[row][which], means)
        prior: Tensor = (self._strength * means).float()
        return prior

    def _return_to(self, request: str, first: int, known: Mapping[str, Sequence[int]]) -> None:
        """Start a request's sums anew from its first tokens."""
        ids = known.get(request, self._prompts[request])
        if len(ids) < first:
            raise RoutingError(
                f"phatgoose: this vLLM goes on with {request} from tokens that evidence cannot "
                "see. Serve with a router that has none."
            )
        self._sums[self._rows[request]] = self._total(ids[:first])
        self._read[request] = first

    def _total(self, ids: Sequence[int]) -> Float[Tensor, " C"]:
        index = torch.tensor(ids, dtype=torch.long, device=self.worth.device)
        return self.worth[index].double().sum(0)
