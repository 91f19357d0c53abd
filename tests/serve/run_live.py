"""Runs engines whose pool changes, each in a process of its own: see `conftest.engine`.

A script is a list of steps, and its result a list of what each step gave:

    {"ask": [[prompt, choice], ...]}     the answers, all in one batch
    {"unchecked": true, "ask": ...}      by one who checks nothing, nor salts the prompts
    {"add": folder} {"remove": name}     what went wrong, or null
    {"rpc": [method, argument, ...]}     of every rank
    {"while": {"ask": ...}, "then": step}   step happens while answers are under way

The steps run offline, in `vllm.LLM`, or, with "stream": true in the job's first step, in the
engine of vLLM's server.
"""

import asyncio
import json
import sys
from pathlib import Path

from phatgoose.errors import PhatgooseError
from phatgoose.serve.offline import ServedPool
from phatgoose.serve.pool.choice import Request


def sampling(tokens, extra=None, **more):
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        logprobs=0,
        ignore_eos=True,
        detokenize=False,
        extra_args=extra,
        **more,
    )


def answer_of(request, routing=None):
    best = request.outputs[0]
    steps = zip(best.token_ids, best.logprobs, strict=True)
    answer = {
        "tokens": list(best.token_ids),
        "logprobs": [step[token].logprob for token, step in steps],
        "cached": request.num_cached_tokens,
    }
    return answer if routing is None else {**answer, "routing": routing}


class Offline:
    def __init__(self, job):
        from vllm import LLM

        self.llm, self.tokens = LLM(**job["llm"]), job["tokens"]
        self.pool = ServedPool(self.llm)

    def run(self, step):
        if "ask" in step:
            return self.ask(step["ask"], unchecked=step.get("unchecked", False))
        if "rpc" in step:
            method, *arguments = step["rpc"]
            return self.llm.collective_rpc(method, args=tuple(arguments))
        try:
            if "add" in step:
                return self.pool.add(step["add"])
            return self.pool.remove(step["remove"])
        except PhatgooseError as error:
            return str(error)

    def ask(self, requests, *, unchecked):
        prompts, params = [], []
        for ids, choice in requests:
            given, extra = [{"prompt_token_ids": ids}], None
            if choice is not None and unchecked:
                extra = {"phatgoose": json.dumps(choice)}
            elif choice is not None:
                given, extra = self.pool.ask(given, **choice)
            prompts += given
            params.append(sampling(self.tokens, extra))
        answers = self.llm.generate(prompts, params, use_tqdm=False)
        return [
            answer_of(answer, self.pool.routing(answer) if (choice or {}).get("routing") else None)
            for answer, (_, choice) in zip(answers, requests, strict=True)
        ]


class Stream:
    def __init__(self, job):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**job["llm"]))
        self.tokens, self.count = job["tokens"], 0

    async def run(self, step):
        if "while" in step:
            begun = asyncio.Event()
            asked = asyncio.create_task(self.ask(step["while"]["ask"], begun))
            await begun.wait()
            return [await self.run(step["then"]), await asked]
        if "ask" in step:
            return await self.ask(step["ask"], asyncio.Event())
        if "rpc" in step:
            return await self.engine.collective_rpc(step["rpc"][0], args=tuple(step["rpc"][1:]))
        if "add" in step:
            method, folder = "phatgoose_commit", Path(step["add"])
            await self.engine.collective_rpc("phatgoose_prepare", args=(folder.name, str(folder)))
            arguments = ()
        else:
            method, arguments = "phatgoose_remove", (step["remove"],)
        await self.engine.pause_generation(mode="wait")
        done = await self.engine.collective_rpc(method, args=arguments)
        assert await self.engine.reset_prefix_cache()
        await self.engine.resume_generation()
        return done[0]["error"]

    async def ask(self, requests, begun):
        [pool, *_] = await self.engine.collective_rpc("phatgoose_pool")
        return await asyncio.gather(*(self.one(*one, pool, begun) for one in requests))

    async def one(self, ids, choice, pool, begun):
        self.count += 1
        name, wanted = f"cmpl-{self.count}", Request.read(choice or {})
        prompt = {"prompt_token_ids": ids, "cache_salt": wanted.salt(pool)}
        extra = None if choice is None else {"phatgoose": wanted.text()}
        sampled = sampling(self.tokens, extra)
        async for answer in self.engine.generate(prompt, sampled, name):  # noqa: B007
            begun.set()
        routing = None
        if wanted.routing:
            [routing, *_] = await self.engine.collective_rpc("phatgoose_routing", args=(name,))
        return answer_of(answer, routing)


async def stream(job, steps):
    engine = Stream(job)
    try:
        return [await engine.run(step) for step in steps]
    finally:
        engine.engine.shutdown()


def main(job_file, out_file):
    job = json.loads(Path(job_file).read_text())
    first, *steps = job["rounds"]
    if first == {"stream": True}:
        found = asyncio.run(stream(job, steps))
    else:
        engine = Offline(job)
        found = [engine.run(step) for step in job["rounds"]]
    Path(out_file).write_text(json.dumps(found))


if __name__ == "__main__":  # vLLM's own processes import this module again
    main(*sys.argv[1:])
