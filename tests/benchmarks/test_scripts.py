"""Every benchmark runs, at sizes where its times say nothing."""

import gzip
import importlib
import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
SAME_SUM = ("phatgoose", "r-three", "mttl", "dense")


@pytest.fixture
def script(monkeypatch):
    """script(name): a benchmark as a module."""
    if not FOLDER.exists():
        pytest.skip("the source archive has no benchmarks")
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module


@pytest.fixture
def run(script, tmp_path, capsys):
    """run(name, options): what a benchmark printed last, which is what it wrote."""

    def run(name, options=""):
        out = tmp_path / f"{name}.json"
        script(name).main([*options.split(), "--device", "cpu", "--out", str(out)])
        printed = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert printed["rows"] == json.loads(out.read_text())["rows"]
        assert {"benchmark", "unit", "device", "torch", "commit", "command"} <= printed.keys()
        return printed

    return run


LAYER = (
    "--size 48x64 --experts 5 --tokens 1 40 --peer-tokens 1 40 --seconds 0.01 "
    "--contenders lora phatgoose arrow r-three mttl dense"
)


def test_layer(run):
    rows = run("bench_layer", LAYER)["rows"]
    names = ["plain", "lora", "phatgoose", "arrow", "r-three", "mttl", "dense"]
    assert [(row["tokens"], row["contender"]) for row in rows] == [
        (tokens, name) for tokens in (1, 40) for name in names
    ]
    for row in rows:
        assert 0 < row["us"]["p20"] <= row["us"]["p50"] <= row["us"]["p80"]
        assert row["peak_bytes"] >= row["tokens"] * 64 * 4
        assert "note" not in row
        if row["contender"] in SAME_SUM:
            assert row["error"] < 1e-4
            assert row["routed_otherwise"] == 0
            assert row["floor_us"] > 0


def test_layer_says_where_a_contender_computes_something_else(run, script, monkeypatch):
    r_three = script("peers").RThree
    call = r_three.__call__
    monkeypatch.setattr(r_three, "__call__", lambda self, x: 1.01 * call(self, x))
    rows = run("bench_layer", LAYER)["rows"]
    assert {row["contender"] for row in rows if row.get("note") == "wrong"} == {"r-three"}


def test_no_row_is_begun_when_the_time_is_up(run):
    assert run("bench_layer", f"{LAYER} --budget 0")["rows"] == []


def test_arrow_weighs_as_many_experts_as_asked(script):
    torch, layer, peers = (importlib.import_module(n) for n in ("torch", "bench_layer", "peers"))
    model = layer.make_layers(24, 16, 2, "cpu", torch.float32)
    factors = layer.make_factors(model, 4, 3)
    x, name = torch.randn(1, 6, 24), model.names[1]
    base = model.get_submodule(name)(x)
    adapted = peers.peft_arrow(model.sharing(), factors, 1).get_base_model()
    delta = (adapted.get_submodule(name)(x) - base)[0]
    f = factors[name]
    alone = torch.einsum("eor,eri,ti->teo", f.b, f.a, x[0])  # with top_k 1, one of these
    assert ((alone - delta.unsqueeze(1)).norm(dim=2).amin(1) < 1e-4).all()


def test_generate(run):
    rows = run(
        "bench_generate", "--experts 4 --arrow-experts 3 --batch 2 --prefill 12 --seconds 0.01"
    )["rows"]
    names = ["base", "lora", "phatgoose", "arrow"]
    assert [(row["task"], row["contender"]) for row in rows] == [
        (task, name) for task in ("decode", "prefill") for name in names
    ]
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert "note" not in row
        assert ("floor_us" in row) == (row["contender"] == "phatgoose")


def test_a_decoding_step_can_be_repeated(script):
    torch, generate = importlib.import_module("torch"), script("bench_generate")
    with torch.no_grad():
        base = generate.make_base("tiny", "cpu", torch.float32, 32)
        step = generate.Decode(base, 3, 10)
        first = step.run(base)
        torch.testing.assert_close(step.run(base), first, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("choosing", "given", "wrong"),  # how far off while experts are chosen, and while they are not
    [(0, 0, False), (0.2, 0, False), (0.2, 0.2, True), (0, 0.1, True), (0.7, 0, True)],
)
def test_near_ties_are_not_called_wrong(script, choosing, given, wrong):
    torch, generate = importlib.import_module("torch"), script("bench_generate")
    with torch.no_grad():
        base = generate.make_base("tiny", "cpu", torch.float32, 32)
        factors = generate.make_factors(base, 5, 3)
        contender = generate.make_contender("phatgoose", 5, base, factors, "cpu")
        held, off = generate.Held(generate.Decode(base, 3, 10), contender.model), [given, choosing]

        def run():
            held()
            held.logits *= 1 + off.pop()

        found = generate.compared(contender, held, run)
    assert found["differs_from_eager"] == pytest.approx(choosing, abs=1e-6)
    assert found["differs_without_choice"] == pytest.approx(given, abs=1e-6)
    assert (found.get("note") == "wrong") is wrong


def test_gates(run):
    rows = run("bench_gates", "--experts 4 --fewer 2 --steps 3 --length 8")["rows"]
    assert [(row["kind"], row["experts"]) for row in rows] == [
        *(("lora", 1), ("gates", 1)),
        *(("together", experts) for experts in (1, 2, 4)),
    ]
    assert all(row["tokens"] == 32 and row["us"]["p50"] > 0 for row in rows)


def test_memory(run):
    found = run("bench_memory", "--pools 4 5")
    assert found["dense_difference"] < 1e-5
    rows = {(r["kind"], r["experts"], r["top_k"], r["tokens"]): r for r in found["rows"]}
    assert rows["dense", 5, 2, 2048]["layer"] > rows["routed", 5, 2, 2048]["layer"]
    assert {k for kind, pool, k, _ in rows if (kind, pool) == ("routed", 5)} == {1, 2, 4}
    assert found["ratios"]["layer: top_k 4 / 1"] > 1


def test_memory_when_the_time_is_up(run):
    found = run("bench_memory", "--pools 2 --budget 0")
    assert [row["kind"] for row in found["rows"]] == ["plain", "plain"]
    assert "ratios" not in found


def test_report(run, script, tmp_path):
    run("bench_layer", LAYER.replace("--experts 5", "--experts 3 5"))
    out = tmp_path / "performance.md"
    script("report").main(["--results", str(tmp_path), "--out", str(out)])
    text = out.read_text()
    assert "| 40 | 5 | 16 |" in text
    assert "![" in text
    assert out.with_suffix(".png").stat().st_size > 0
    assert "8B shape" in text
    assert "not measured" in text
    assert text.index("## What you get") < text.index("## What we aimed at")
    assert "## Serving" not in text and "## Training on" not in text


def test_report_of_several_gpus(script, tmp_path):
    head = {"device": "NVIDIA H200", "threads": 1, "command": "it", "commit": "c0ffee"}
    one = {"output_tokens_per_s": 90.0, "ttft_median_ms": 7.0, "tpot_median_ms": 3.0}
    one |= {"over_base": 0.9, "over_lora": 1.1, "experts": 128, "contender": "phatgoose"}
    rows = [{**one, "gpus": 2}, one, {"contender": "lora", "experts": 1, "note": "no server"}]
    served = {**head, "benchmark": "serving", "rows": rows}
    row = {"devices": 2, "together": 4, "seconds": 12.0, "speedup": 1.8}
    row |= {"equal_files": 16, "files": 16, "worst": 0.0}
    trained = {**head, "benchmark": "train", "experts": 8, "rows": [row]}
    for found in (served, trained):
        (tmp_path / f"{found['benchmark']}.json").write_text(json.dumps(found))
    out = tmp_path / "performance.md"
    script("report").main(["--results", str(tmp_path), "--out", str(out)])
    text = out.read_text()
    assert "| phatgoose | 1 | 128 | 90 | 0.90 | 1.10 | 7.00 ms | 3.00 ms |" in text
    assert text.index("| phatgoose | 1 |") < text.index("| phatgoose | 2 |")
    assert "| 2 | 8 | 4 | 12.0 s | 1.80 | 16 of 16 | 0 |" in text


def test_the_page_says_what_the_results_do(script, tmp_path):
    out = tmp_path / "performance.md"
    script("report").main(["--out", str(out)])
    text = out.read_text()
    assert text == (FOLDER.parent / "docs" / "performance.md").read_text()
    prefill = re.search(r"^\| prefill 4,096 .* base \| ([\d.]+) \| ([\d.]+) \|", text, flags=re.M)
    assert prefill
    for contender, ratio in zip(("phatgoose", "one LoRA"), prefill.groups(), strict=True):
        assert re.search(rf"^\| 8b, prefill .* {contender} .* {ratio} \|", text, flags=re.M)


def test_report_of_nothing(script, tmp_path):
    out = tmp_path / "performance.md"
    script("report").main(["--results", str(tmp_path), "--out", str(out)])
    assert "met |" not in out.read_text()


@pytest.mark.parametrize(
    ("over", "verdict"), [(1.2, "met"), (1.4, "**missed**"), (None, "not measured")]
)
def test_targets(script, over, verdict):
    targets = script("targets")
    rows = [
        {
            "size": "4096x4096",
            "tokens": 4096,
            "experts": experts,
            "rank": 16,
            "mode": "eager",
            "contender": "phatgoose",
            "us": {"p50": 100.0 * value},
            "over_plain": value,
            "floor_us": 105.0,
        }
        for experts, value in ((36, 1.1), (166, over))
        if value is not None
    ]
    target = targets.over_plain(targets.Found(rows), "4096x4096", (36, 166), 1.3)
    assert target.verdict == verdict
    if over is not None:
        assert target.measured == f"{over:.2f} (166 experts)"
        assert target.floor == "1.05"


SERVED = {  # of vLLM's own benchmark
    "completed": 12,
    "total_output_tokens": 96,
    "total_input_tokens": 288,
    "output_throughput": 50.0,
    "total_token_throughput": 200.0,
    "duration": 1.92,
    **{
        f"{point}_{measure}_ms": value
        for measure, value in (("ttft", 40.0), ("tpot", 9.0), ("itl", 8.0))
        for point in ("median", "p99")
    },
}


def test_backends_agree(run):
    rows = run("check_backends", "--cases 2 --no-model --no-mixed")["rows"]
    assert len(rows) == 2 * 3 * 8  # cases, dtypes, ways
    assert all(row["good"] for row in rows)


def test_backends_agree_on_mixed_dtypes(script, monkeypatch):
    backends = script("check_backends")
    monkeypatch.setattr(backends, "MIXED_SIZES", [(5, 1, 3, 4, 64, 64)])
    assert len(backends.MIXED) == 6
    arguments = ["--device", "cpu", "--cases", "0", "--no-model"]
    assert backends.main(arguments)
    monkeypatch.setattr(backends, "tolerance", lambda case: 0.0)
    assert not backends.main(arguments)


def test_serving_reads_what_vllm_measured(script):
    serving = script("bench_serving")
    args = serving.parse(["--device", "cpu"])
    row = serving.row_of(SERVED, args)
    assert row["output_tokens_per_s"] == 50.0
    assert row["ttft_median_ms"] == row["ttft_p99_ms"] == 40.0
    for key in ("completed", "total_output_tokens"):
        with pytest.raises(RuntimeError, match="of 12 requests"):
            serving.row_of({**SERVED, key: SERVED[key] - 1}, args)


@pytest.mark.parametrize(
    ("tokens", "ttft", "wanted"),  # ours, where base has 100 and 10, the LoRA 80 and 12
    [
        (80.0, 13.0, [True, True, True, True]),
        (75.0, 13.1, [False, True, False, True]),
        (69.0, 16.0, [False, False, False, False]),
        (None, None, [None] * 4),
    ],
)
def test_serving_judges(script, tmp_path, capsys, tokens, ttft, wanted):
    serving = script("bench_serving")
    rows = [
        {"contender": name, "experts": 1, "output_tokens_per_s": speed, "ttft_median_ms": wait}
        for name, speed, wait in (("base", 100.0, 10.0), ("lora", 80.0, 12.0))
    ]
    failed = {"contender": "phatgoose", "experts": 1, "note": "no server"}
    measured = {**rows[0], "contender": "phatgoose", "output_tokens_per_s": tokens}
    ours = failed if tokens is None else {**measured, "ttft_median_ms": ttft}
    rows.append(ours)
    assert [one["met"] for one in serving.verdicts(rows)] == wanted
    if tokens is not None:
        assert serving.over(ours, rows) == {"over_base": tokens / 100, "over_lora": tokens / 80}
    numbers = dict.fromkeys(("requests", "concurrency", "input_len", "output_len"), 7)
    words = dict.fromkeys(("command", "device", "dtype", "vllm", "torch"), "x")
    file = tmp_path / "serving.json"
    file.write_text(json.dumps({"rows": rows, **numbers, **words}))
    serving.main(["--table", str(file)])
    printed = capsys.readouterr().out
    assert printed.count("**missed**") == wanted.count(False)
    assert printed.count("| met |") == wanted.count(True)
    assert ("no server" in printed) == (tokens is None)


def test_serving_says_what_kernels_take(script, tmp_path):
    serving = script("bench_serving")
    with pytest.raises(RuntimeError, match="no trace"):
        serving.kernels_of(tmp_path)
    events = [{"ph": "M", "name": "process_name"}]
    events += [{"cat": "cpu_op", "name": "aten::mm", "dur": 90.0}]
    steps = [(100, 8, 0), (150, 0, 1), (200, 400, 3), (300, 594, 3), (400, 0, 4), (500, 0, 4)]
    for at, prompt, tokens in steps:
        name = f"execute_context_{min(prompt, 1)}({prompt})_generation_{tokens}({tokens})"
        events.append({"cat": "user_annotation", "name": name, "ts": at})
    launches = [
        (50, "early", 1.0),
        (110, "gemm", 7.0),
        (160, "route", 9.0),
        (230, "gemm", 30.0),
        (350, "gemm", 50.0),
    ]
    launches += [(410, "gemm", 3.0), (510, "gemm", 5.0), *[(590, "route", 2.0)] * 6]
    for number, (at, name, dur) in enumerate(launches):
        launched = {"args": {"correlation": number}, "ts": at}
        events.append({"cat": "cuda_runtime", "name": "cudaLaunchKernel", **launched})
        events.append({"cat": "kernel", "name": name, "dur": dur, **launched, "ts": at + 1000})
    with gzip.open(tmp_path / "rank0.pt.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    found = serving.kernels_of(tmp_path)
    # All six of "route" run at once, so the GPU is busy for the time of one.
    wanted = [("any of them", 5, 4), ("route", 6, 3), ("gemm", 4, 1)]
    assert [tuple(one.values()) for one in found["kernels"]] == wanted
    wanted = [("any of them", 80, 2), ("gemm", 80, 2)]
    assert [tuple(one.values()) for one in found["prompt_kernels"]] == wanted
    row = {"contender": "phatgoose", "experts": 1, **found}
    numbers = dict.fromkeys(("requests", "concurrency", "input_len", "output_len"), 7)
    words = dict.fromkeys(("command", "device", "dtype", "vllm", "torch"), "x")
    printed = serving.markdown({"rows": [row], **numbers, **words})
    assert "| phatgoose | `any of them` | 5 | 4.0 |" in printed
    assert "| phatgoose | `route` | 6 | 3.0 |" in printed
    assert printed.count("| phatgoose | `gemm` | 80 | 2.0 |") == 1


def test_serving_makes_experts_of_its_base(script, tmp_path):
    torch, serving = importlib.import_module("torch"), script("bench_serving")
    transformers = importlib.import_module("transformers")
    base = serving.make_base(tmp_path / "base", "tiny", 64)
    serving.make_experts(tmp_path / "experts", base, 3, torch.float32)
    pool = importlib.import_module("phatgoose").ExpertPool.load(
        sorted((tmp_path / "experts").iterdir())
    )
    assert pool.names == ["0", "1", "2"]
    assert [verify_problems(expert, base) for expert in pool] == [[], [], []]
    one, two = (pool[name].gates.vectors["model.layers.0.mlp.down_proj"] for name in "12")
    assert not torch.equal(one, two)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    tokens = list(range(1, 500, 7))
    assert tokenizer.encode(tokenizer.decode(tokens)) == tokens


def verify_problems(expert, base):
    verify = importlib.import_module("phatgoose.experts.verify")
    return [*verify.check_modules(expert, base), *verify.check_numbers(expert)]


def test_serving_judges_each_number_of_gpus_by_itself(script):
    serving = script("bench_serving")
    rows = [
        {"contender": name, "gpus": gpus, "output_tokens_per_s": speed, "ttft_median_ms": 10.0}
        for gpus, speeds in ((2, (200.0, 150.0, 120.0)), (1, (100.0, 80.0, 75.0)))
        for name, speed in zip(("base", "lora", "phatgoose"), speeds, strict=True)
    ]
    assert serving.over(rows[2], rows) == {"over_base": 0.6, "over_lora": 0.8}
    found = {
        (one["gpus"], one["wanted"]): one["measured"]
        for one in serving.verdicts(rows)
        if one["target"].startswith("output")
    }
    assert found == {
        (1, ">= 1.0"): 0.9375,
        (1, ">= 0.7"): 0.75,
        (2, ">= 1.0"): 0.8,
        (2, ">= 0.7"): 0.6,
    }


def test_serving_shares_gpus_out(script):
    serving = script("bench_serving")
    one = [serving.Contender(name, 1) for name in ("base", "lora", "phatgoose")]
    both = [serving.Contender(name, 2) for name in ("base", "lora", "phatgoose")]
    found = serving.places([*one, *both], 2)
    assert {found[each] for each in both} == {"0,1"}
    assert [found[each] for each in one] == ["1", "1", "0"]  # the pool is the largest
    assert set(serving.places(one, 3).values()) == {"0", "1", "2"}


def test_training_on_two_devices_makes_the_same_experts(run, tmp_path):
    options = f"--experts 2 --steps 1 --gate-steps 1 --folder {tmp_path / 'made'}"
    rows = run("bench_train", options)["rows"]
    assert [(row["devices"], row["together"]) for row in rows] == [(1, 1), (2, 1), (1, 2)]
    assert all(row["files"] == 4 and row["worst"] < 1e-4 for row in rows)
    assert [row["equal_files"] for row in rows[:2]] == [4, 4]


def test_answers_of_ranks_are_judged(script):
    ranks = script("check_ranks")
    right = {"tokens": [1, 2], "logprobs": [-1.0, -2.0], "gap": 1.0}
    near = {**right, "gap": 1e-7}
    other = {**right, "tokens": [1, 3]}
    found = ranks.compare([right, other, right], [right, near, near])
    assert found == {"prompts": 1, "equal": 1, "logprob": 0.0, "near": 2, "near_equal": 1}
    wanted = {pool: [right, right] for pool in ranks.POOLS}
    answers = {key: [{**right, "cached": 1}] * 2 * len(ranks.CHOICES) for key in ("mixed", "again")}
    keys = ("alone", "during add", "after add", "during remove", "after remove")
    answers |= {key: [right, right] for key in keys} | {"add": None, "remove": None}
    assert all(row["good"] for row in ranks.rows_in_float32(answers, wanted))
    for key, value in (("after add", [right, other]), ("remove", "nobody: no expert")):
        rows = ranks.rows_in_float32({**answers, key: value}, wanted)
        assert [row["good"] for row in rows].count(False) == 1
    off = [{**right, "logprobs": [-1.0, -2.001]}] * 2
    assert not all(row["good"] for row in ranks.rows_in_float32({**answers, "alone": off}, wanted))
    far = {pool: [right, near] for pool in ranks.POOLS}
    assert all(row["good"] for row in ranks.rows_in_float32(answers, far))
    too_few = {pool: [near, near] for pool in ranks.POOLS}
    assert not any(row["good"] for row in ranks.rows_in_float32(answers, too_few) if "equal" in row)


def test_readings_of_ranks_are_judged_by_the_base_s(script):
    ranks = script("check_ranks")

    def read(base, pool):
        return {"base": [{"read": base}], "all": [{"read": pool}]}

    one, many = read([-1.0, -2.0], [-1.0, -3.0]), read([-1.1, -2.1], [-1.1, -3.3])
    assert [row["good"] for row in ranks.rows_in_bfloat16(one, many)] == [True, True]
    many = read([-1.1, -2.1], [-1.1, -4.0])
    assert [row["good"] for row in ranks.rows_in_bfloat16(one, many)] == [True, False]
