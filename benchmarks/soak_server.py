"""Load and faults on a served pool: does every answer come from the experts it should come from?

    make soak SOAK_ARGS='--minutes 30 --out soak.json'
    python benchmarks/soak_server.py [--minutes 60] [--clients 8] [--readers 2] [--every 5]

Starts `phatgoose serve` on the default pool less two experts (needs vLLM, and openai, which it
brings). First every prompt is asked in every way in each of the four pools that the two experts
make, alone and among others: these are the right answers, and prompts whose answer depends on what
else is in the batch (near-ties) are left out. Then, at once:

- clients ask in all those ways, by completions and chats, whole and streamed, and some go away
  midway or ask for what there is not;
- slow readers ask for long streams, and for many seconds read nothing of them;
- the two experts come and go, and now and then a broken adapter is posted;
- the memory of all processes of the server is noted.

An answer has to be that of the pool, the choice and the prompt it was for, that of a slow reader
too. A change has to be done two seconds after the engine has finished what it was at, as the
server's log tells. Ends with exit code 1 if one was not, a request failed,
memory grew by more than a tenth after the first third, or the server did not end well. Prints one
JSON line; --out writes all of it.
"""

import argparse
import asyncio
import json
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import openai
from safetensors.torch import load_file, save_file

from common import MIB, command, say, versions
from phatgoose.default import tiny
from phatgoose.experts.lora import WEIGHTS_FILE
from phatgoose.files import write_json

sys.path.insert(0, str(Path(__file__).parents[1]))  # a benchmark is run from a checkout
from tests.serve.server import ADMIN_KEY, API_KEY, Server

COMING = ("proc_pluralise", "snips")  # the experts that come and go
TOKENS = 16
PROMPTS = 24
GONE = 0.05  # share of requests whose client goes away midway
BAD = 0.04  # share that ask for what there is not
AT_ONCE = 16  # prompts of a slow reader, all of them the same,
FILLERS = 24  # and long ones: its answer has to be more than the 2.5 MiB that the kernel holds
HOLD = (6.0, 20.0)  # seconds in which a slow reader reads nothing
LATE = 2.0  # seconds that a change may take after its drain
GROWTH = 0.1  # of memory, after the first third, that is called flat
WAYS: dict[str, dict[str, Any]] = {
    "pool": {},
    "base": {"model": "base"},
    "one": {"model": "pool/trec_question_type"},
    "allow": {"phatgoose": {"allow": ["ud_pos", "wiki_split", "trec_question_type"]}},
    "deny": {"phatgoose": {"deny": ["proc_reverse_words", "proc_last_letters"]}},
}
Pool = frozenset[str]  # which of COMING are there
Asked = tuple[str, int]  # a way, and the number of a prompt


@dataclass
class Tally:
    """What happened."""

    done: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    memory: list[dict[str, float]] = field(default_factory=list)
    changes: list[float] = field(default_factory=list)  # seconds, as the admin saw it
    slow_bytes: list[int] = field(default_factory=list)  # of answers to slow readers


class Soak:
    """Asks a server, and knows what it should say."""

    def __init__(self, server: Server, seed: int, prompts: int = PROMPTS) -> None:
        self.server = server
        self.client = openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=300
        )
        rows = [json.loads(line)["inputs"] for line in tiny.DEMO.read_text().splitlines()]
        words = "ink eruption goose table river letter window paper garden stone".split()
        self.random = random.Random(seed)
        extra = [" ".join(self.random.sample(words, 3)) for _ in range(PROMPTS)]
        self.filler = " ".join(words * 16)
        rows += [f"Give the plural of each word: {text}" for text in extra]
        self.prompts = rows[:prompts]
        self.right: dict[Pool, dict[Asked, str]] = {}
        self.pools: dict[int, Pool] = {}  # by generation
        self.tally = Tally()
        self.stop = False

    # ------------------------------------------------------------ asking

    async def ask(self, asked: Asked, *, chat: bool, stream: bool, leave: bool = False) -> Any:
        """The text of an answer, and its field phatgoose; None for a client that went away."""
        way, number = asked
        how = dict(WAYS[way])
        prompt, model = self.prompts[number], how.pop("model", "pool")
        wanted = {"phatgoose": {"routing": "shares", **how.get("phatgoose", {})}}
        same = {"model": model, "max_tokens": TOKENS, "temperature": 0, "extra_body": wanted}
        if chat:
            messages = [{"role": "user", "content": prompt}]
            answer = await self.client.chat.completions.create(
                messages=messages, stream=stream, **same
            )
        else:
            answer = await self.client.completions.create(
                prompt=f"{prompt}\n", stream=stream, **same
            )
        if not stream:
            choice = answer.choices[0]
            return (choice.message.content if chat else choice.text), answer.phatgoose
        text, told = "", None
        async for event in answer:
            if leave:
                await answer.close()
                return None
            for choice in event.choices:
                text += (choice.delta.content if chat else choice.text) or ""
            told = getattr(event, "phatgoose", told)
        return text, told

    async def learn(self) -> None:
        """The right answers of the pool as it is now, asked one by one and then all at once."""
        everything = [(way, number) for way in WAYS for number in range(len(self.prompts))]
        alone = {a: (await self.ask(a, chat=False, stream=False))[0] for a in everything}
        crowd = await asyncio.gather(
            *(self.ask(a, chat=False, stream=False) for a in everything * 2)
        )
        varies = {a for a, (text, _) in zip(everything * 2, crowd, strict=True) if text != alone[a]}
        self.tally.done["near-ties left out"] += len(varies)
        pool = self.pools[max(self.pools)]
        self.right[pool] = {a: text for a, text in alone.items() if a not in varies}

    # ------------------------------------------------------------ at once

    async def client_loop(self) -> None:
        while not self.stop:
            if self.random.random() < BAD:
                await self.bad_request()
                continue
            asked = self.random.choice(sorted(self.common()))
            chat, stream = self.random.random() < 0.4, self.random.random() < 0.5
            leave = stream and self.random.random() < GONE * 2
            began = time.monotonic()
            try:
                found = await self.ask(asked, chat=chat, stream=stream, leave=leave)
            except Exception as error:
                self.tally.failed.append(f"{type(error).__name__}: {error}"[:300])
                await asyncio.sleep(0.5)
                continue
            self.tally.seconds.append(time.monotonic() - began)
            if found is None:
                self.tally.done["clients that went away"] += 1
            else:
                kind = ("chat" if chat else "completion") + (", streamed" if stream else "")
                self.tally.done[kind] += 1
                self.check(asked, *found)

    async def slow_loop(self) -> None:
        """A client that asks, reads nothing for a while, and then finds its answer whole."""
        while not self.stop:
            asked = self.random.choice(sorted(self.common()))
            way, number = asked
            body = {
                "model": "pool",
                **WAYS[way],
                "prompt": [f"{self.prompts[number]}\n"] * AT_ONCE + [self.filler] * FILLERS,
                "max_tokens": TOKENS,
                "temperature": 0,
                "stream": True,
                "echo": True,
                "logprobs": 20,
            }
            body["phatgoose"] = {"routing": "shares", **body.get("phatgoose", {})}
            try:
                raw = await self.read_late(body, self.random.uniform(*HOLD))
                lines = [line for line in raw.decode().split("\n") if line.startswith("data: ")]
                assert lines and lines.pop() == "data: [DONE]", raw[-300:]
                events = [json.loads(line[6:]) for line in lines]
            except Exception as error:
                self.tally.failed.append(f"slow reader: {type(error).__name__}: {error}"[:300])
                await asyncio.sleep(0.5)
                continue
            texts = [""] * (AT_ONCE + FILLERS)
            for choice in (choice for event in events for choice in event["choices"]):
                texts[choice["index"]] += choice["text"]
            self.tally.done["slow readers"] += 1
            self.tally.slow_bytes.append(len(raw))
            for text in set(texts[:AT_ONCE]):
                told = events[-1].get("phatgoose")
                self.check(asked, text.removeprefix(body["prompt"][0]), told)

    async def read_late(self, body: dict[str, Any], hold: float) -> bytes:
        """The body of an answer of which nothing is read for so many seconds."""
        loop, found = asyncio.get_running_loop(), b""
        with socket.socket() as sock:
            # What the kernel holds for a client that does not read is to be little.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", self.server.port))
            http, content = h11.Connection(h11.CLIENT), json.dumps(body).encode()
            headers = {
                "Host": "127.0.0.1",
                "Authorization": f"Bearer {API_KEY}",
                "Content-Type": "application/json",
                "Content-Length": str(len(content)),
            }
            request = h11.Request(
                method="POST", target="/v1/completions", headers=list(headers.items())
            )
            for event in (request, h11.Data(data=content), h11.EndOfMessage()):
                await loop.sock_sendall(sock, http.send(event) or b"")
            await asyncio.sleep(hold)
            while True:
                event = http.next_event()
                if event is h11.NEED_DATA:
                    http.receive_data(await asyncio.wait_for(loop.sock_recv(sock, 65536), 300))
                elif isinstance(event, h11.Response):
                    assert event.status_code == 200, event.status_code
                elif isinstance(event, h11.Data):
                    found += bytes(event.data)
                else:
                    assert isinstance(event, h11.EndOfMessage), event
                    return found

    def common(self) -> set[Asked]:
        """What has a right answer in all pools."""
        return set.intersection(*(set(right) for right in self.right.values()))

    def check(self, asked: Asked, text: str, told: dict[str, Any] | None) -> None:
        generation = (told or {}).get("generation", -1)
        pool = self.pools.get(generation)
        right = None if pool is None else self.right[pool][asked]
        shares = set((told or {}).get("shares", {}))
        if text != right or shares & (set(COMING) - (pool or set())):
            others = [sorted(p) for p, answers in self.right.items() if answers[asked] == text]
            self.tally.wrong.append(
                {
                    "asked": asked,
                    "generation": generation,
                    "answer": text,
                    "right": right,
                    "right_in": others,
                    "shares": sorted(shares),
                }
            )

    async def bad_request(self) -> None:
        kind, body, key, status = self.random.choice(
            [
                ("unknown model", {"model": "pool/nobody"}, API_KEY, 404),
                ("unknown expert", {"phatgoose": {"allow": ["nobody"]}}, API_KEY, 400),
                ("no key", {}, None, 401),
                ("wrong key", {}, "wrong", 401),
            ]
        )
        body = {"prompt": "x", "max_tokens": 1, **body}
        await self.expect(kind, "POST", "/v1/completions", body, key, status)

    async def expect(
        self, kind: str, method: str, path: str, body: Any, key: str | None, status: int
    ) -> Any:
        try:
            found, answer = await asyncio.to_thread(self.server.call, method, path, body, key)
        except Exception as error:
            found, answer = -1, f"{type(error).__name__}: {error}"
        if found != status:
            self.tally.failed.append(f"{kind}: {found}, not {status}: {str(answer)[:200]}")
        else:
            self.tally.done[kind] += 1
        return answer

    async def change(self, name: str) -> None:
        """Add the expert, or remove it if it is there; the generations tell which pool is which."""
        pool = self.pools[max(self.pools)]
        # Answers of the new pool may come before the change's own.
        self.pools[max(self.pools) + 1] = pool ^ {name}
        began = time.monotonic()
        if name in pool:
            await self.expect("removed", "DELETE", f"/v1/experts/{name}", None, ADMIN_KEY, 200)
        else:
            body = {"source": name}
            await self.expect("added", "POST", "/v1/experts", body, ADMIN_KEY, 201)
        self.tally.changes.append(time.monotonic() - began)

    async def change_loop(self, every: float) -> None:
        while not self.stop:
            await asyncio.sleep(every * self.random.uniform(0.5, 1.5))
            await self.change(self.random.choice(COMING))
            if self.random.random() < 0.3:
                bad = self.random.choice(["nan", "cut"])
                body = {"source": bad, "name": "bad"}
                await self.expect("broken refused", "POST", "/v1/experts", body, ADMIN_KEY, 400)

    async def memory_loop(self, every: float = 5.0) -> None:
        began = time.monotonic()
        while not self.stop:
            found = {"minutes": round((time.monotonic() - began) / 60, 2)}
            for pid, name in self.server.processes().items():
                word = (name.split() or ["gone"])[0]  # one that is ending has no name
                found[f"{word.rpartition('/')[2]} {pid}"] = _resident(pid)
            self.tally.memory.append(found)
            await asyncio.sleep(every)

    async def run(self, minutes: float, clients: int, readers: int, every: float) -> None:
        self.pools[0] = frozenset()
        for name in (None, COMING[0], COMING[1], COMING[0]):  # all four pools
            if name is not None:
                await self.change(name)
            await self.learn()
            say(f"learnt the answers with {sorted(self.pools[max(self.pools)])}")
        tasks = [asyncio.create_task(self.client_loop()) for _ in range(clients)]
        tasks += [asyncio.create_task(self.slow_loop()) for _ in range(readers)]
        tasks.append(asyncio.create_task(self.change_loop(every)))
        tasks.append(asyncio.create_task(self.memory_loop()))
        began = time.monotonic()
        while time.monotonic() - began < minutes * 60:
            await asyncio.sleep(min(15.0, minutes * 15))
            if self.server.process.poll() is not None:
                self.tally.failed.append(f"the server ended: {self.server.process.returncode}")
                break
            t = self.tally
            total = sum(v for k, v in t.memory[-1].items() if k != "minutes")
            say(
                f"{(time.monotonic() - began) / 60:6.1f} min  {len(t.seconds)} requests  "
                f"{len(t.failed)} failed  {len(t.wrong)} wrong  "
                f"{t.done['added'] + t.done['removed']} changes  {total:.0f} MiB"
            )
        self.stop = True
        await asyncio.gather(*tasks)


def _resident(pid: int) -> float:
    """MiB of a process, what it shares with others divided among them."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return round(int(line.split()[1]) * 1024 / MIB, 1)
    except OSError:
        pass
    return 0.0


def growth(memory: list[dict[str, float]]) -> float:
    """Of all processes together: the last third over the second, less 1."""
    totals = [sum(v for k, v in found.items() if k != "minutes") for found in memory]
    third = max(1, len(totals) // 3)
    middle, last = totals[third : 2 * third] or totals, totals[-third:]
    return round(sum(last) / len(last) / (sum(middle) / len(middle)) - 1, 4)


def of_changes(changes: list[float], log: str) -> tuple[list[float], list[float]]:
    """Seconds of each change before its drain and after, by the server's log of it.

    Before it, the server reads and checks the expert between the engine's steps, and serves on.
    """
    lines = [line[line.index("{") :] for line in log.splitlines() if '"drain_seconds"' in line]
    told = [json.loads(line) for line in lines]
    if len(told) != len(changes):
        raise RuntimeError(f"{len(changes)} changes, and {len(told)} in the server's log")
    after = [change["change_seconds"] for change in told]
    before = [
        round(whole - change["drain_seconds"] - change["change_seconds"], 3)
        for whole, change in zip(changes, told, strict=True)
    ]
    return before, after


def make_root(folder: Path) -> Path:
    """What may be added: the two experts, one with a NaN, and one whose file is cut short."""
    for name in COMING:
        shutil.copytree(tiny.EXPERTS / name, folder / name)
    for name in ("nan", "cut"):
        shutil.copytree(tiny.EXPERTS / COMING[0], folder / name)
    weights = folder / "nan" / WEIGHTS_FILE
    tensors = load_file(weights)
    next(iter(tensors.values())).fill_(float("nan"))
    save_file(tensors, weights, {"format": "pt"})
    weights = folder / "cut" / WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:1000])
    return folder


def report(args: argparse.Namespace, soak: Soak, log: str, exit_code: int) -> dict[str, Any]:
    tally, pools = soak.tally, list(soak.right.values())
    seconds = sorted(tally.seconds) or [0.0]
    differ = sum(len({right.get(asked) for right in pools}) > 1 for asked in pools[0])
    grown = growth(tally.memory)
    before, after = ([], []) if tally.failed else map(sorted, of_changes(tally.changes, log))
    late = sum(seconds > LATE for seconds in after)
    bad = bool(tally.failed or tally.wrong or late or grown > GROWTH or exit_code)
    return {
        "benchmark": "soak_server",
        **versions("cpu", args.commit),
        "vllm": _version(),
        "command": command(),
        "minutes": args.minutes,
        "clients": args.clients,
        "slow_readers": args.readers,
        "answered": len(tally.seconds),
        "seconds_p50": round(seconds[len(seconds) // 2], 3),
        "seconds_p95": round(seconds[int(len(seconds) * 0.95)], 3),
        "changes": len(tally.changes),
        "change_seconds_max": round(max(tally.changes, default=0.0), 3),
        "before_drain_p50": before[len(before) // 2] if before else None,
        "before_drain_max": before[-1] if before else None,
        "after_drain_p50": after[len(after) // 2] if after else None,
        "after_drain_max": after[-1] if after else None,
        "late_changes": late,
        "slow_reader_bytes_min": min(tally.slow_bytes, default=0),
        "done": dict(sorted(tally.done.items())),
        "known_answers": sum(map(len, pools)),
        "prompts_that_tell_pools_apart": differ,
        "failed": len(tally.failed),
        "wrong": len(tally.wrong),
        "memory_growth": grown,
        "exit_code": exit_code,
        "verdict": "bad" if bad else "good",
    }


def _version() -> str:
    import vllm

    return str(vllm.__version__)


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--minutes", type=float, default=60.0)
    options.add_argument("--clients", type=int, default=8)
    options.add_argument("--readers", type=int, default=2, help="clients that read late")
    options.add_argument("--prompts", type=int, default=PROMPTS, help="fewer are learnt faster")
    options.add_argument("--every", type=float, default=5.0, help="seconds between changes")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--out", type=Path, help="also write the report to this file")
    options.add_argument("--commit", help="what to record where git does not tell")
    args, more = options.parse_known_args()  # the rest goes to the server
    with tempfile.TemporaryDirectory() as folder:
        root = make_root(Path(folder))
        experts = [path for path in tiny.expert_folders() if path.name not in COMING]
        server = Server(folder, "--experts", *experts, *more, root=root)
        try:
            server.wait()
            say("started")
            soak = Soak(server, args.seed, args.prompts)
            asyncio.run(soak.run(args.minutes, args.clients, args.readers, args.every))
            exit_code = server.end()
        finally:
            server.kill()
            log = server.log.read_text(errors="replace")
            if args.out:
                args.out.with_suffix(".log").write_text(log)
    found = report(args, soak, log, exit_code)
    if args.out:
        tally = soak.tally
        details = {"failures": tally.failed[:100], "wrong_answers": tally.wrong[:100]}
        write_json(args.out, {**found, **details, "memory": tally.memory})
    print(json.dumps(found))
    return int(found["verdict"] != "good")


if __name__ == "__main__":
    sys.exit(main())
