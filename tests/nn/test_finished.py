"""Sequences that end early in a batch: what generate appends to them is padding, not tokens."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from phatgoose.nn.context import ContextKeeper


def test_tokens_after_the_end_of_a_sequence_are_not_real() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=1,
        eos_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    keeper = ContextKeeper(model)
    seen: list[torch.Tensor] = []
    layer = model.model.layers[0].self_attn.q_proj

    def look(module: torch.nn.Module, args: tuple[torch.Tensor, ...], _: torch.Tensor) -> None:
        context = keeper.find("model.layers.0.self_attn.q_proj", args[0])[1]
        assert context is not None
        seen.append(context.new_real().clone())

    layer.register_forward_hook(look)

    def end_first_row(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[0, 0] = 0.0  # the first sequence ends at once
        forced[1:, 5] = 0.0  # the others never do
        return forced

    prompt = torch.tensor([[3, 4, 0], [1, 6, 7]])  # an end inside a prompt ends nothing
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    model.generate(
        prompt,
        attention_mask=mask,
        max_new_tokens=4,
        do_sample=False,
        logits_processor=[end_first_row],
    )
    assert torch.equal(seen[0], mask.bool())
    # The end itself is read once more, as a token; what follows it is not.
    assert [step[:, 0].tolist() for step in seen[1:]] == [
        [True, True],
        [False, True],
        [False, True],
    ]
