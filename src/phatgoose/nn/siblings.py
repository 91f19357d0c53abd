"""Which linear layers read the same input, told by their names."""

from collections.abc import Iterable

# The last parts of their names, as transformers' models have them.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
    ("w1", "w3"),
)
# In these, queries come from the decoder, keys and values from the encoder.
CROSS_ATTENTION = {"EncDecAttention", "encoder_attn", "crossattention", "cross_attn"}


def group_siblings(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Put the names of layers that read the same input together, in the order they run.

    A wrong guess costs time, never a wrong result: see `Site`.
    """
    groups: dict[tuple[str, int], list[str]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        number = next((i for i, known in enumerate(SIBLINGS) if last in known), -1)
        queries = number >= 0 and last == SIBLINGS[number][0]
        alone = number < 0 or (queries and not CROSS_ATTENTION.isdisjoint(parent.split(".")))
        groups.setdefault((name if alone else parent, number), []).append(name)
    order = {last: place for known in SIBLINGS for place, last in enumerate(known)}
    return [
        tuple(sorted(group, key=lambda name: order.get(name.rpartition(".")[2], 0)))
        for group in groups.values()
    ]
