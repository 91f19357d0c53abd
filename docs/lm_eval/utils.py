"""The paper's rank classification for lm_eval: log-likelihood a token, end of sequence included.

lm_eval compares sums of log-likelihoods (acc), or divides them by characters (acc_norm).
"""

from typing import Any

from transformers import AutoTokenizer

from phatgoose.default.tiny import BASE  # folder or Hub id of the base whose tokens count

TOKENIZER = AutoTokenizer.from_pretrained(BASE)


def with_answers(rows: Any) -> Any:
    """Each row with its answers, their tokens, and the right one's place.

    The newline before an answer belongs to the prompt, but lm_eval counts it to the answer, so the
    last answer is that newline alone.
    """

    def extend(row: dict[str, Any]) -> dict[str, Any]:
        answers = [choice + TOKENIZER.eos_token for choice in row["choices"]]
        tokens = [len(TOKENIZER(answer, add_special_tokens=False).input_ids) for answer in answers]
        return {
            "answers": [*(f"\n{answer}" for answer in answers), "\n"],
            "tokens": tokens,
            "gold": row["choices"].index(row["targets"]),
        }

    return rows.map(extend)


def rank(row: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, float]:
    """1 where the right answer has the highest log-likelihood a token; ties go to the first."""
    *sums, newline = [total for total, _ in results]
    means = [(total - newline) / count for total, count in zip(sums, row["tokens"], strict=True)]
    return {"acc": float(means.index(max(means)) == row["gold"])}
