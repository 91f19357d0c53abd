"""Runs one vLLM engine in a process of its own: python -m tests.serve.run_engine JOB.json OUT.json.

The job has `llm`, the arguments of vllm.LLM; `tokens`, how many to generate; and `rounds`, each a
list of batches of prompts, as token ids. The answers have the same shape.
"""

import json
import sys
from pathlib import Path


def main(job_file, out_file):
    from vllm import LLM, SamplingParams

    job = json.loads(Path(job_file).read_text())
    llm = LLM(**job["llm"])
    sampling = SamplingParams(
        temperature=0.0,
        max_tokens=job["tokens"],
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
    )
    answers = []
    for batches in job["rounds"]:
        answers.append([])
        for prompts in batches:
            given = [{"prompt_token_ids": ids} for ids in prompts]
            for request in llm.generate(given, sampling, use_tqdm=False):
                best = request.outputs[0]
                tokens = list(best.token_ids)
                steps = zip(tokens, best.logprobs, strict=True)
                answers[-1].append(
                    {
                        "tokens": tokens,
                        "logprobs": [step[token].logprob for token, step in steps],
                        "cached": request.num_cached_tokens,
                    }
                )
    Path(out_file).write_text(json.dumps(answers))


if __name__ == "__main__":  # vLLM's own processes import this module again
    main(*sys.argv[1:])
