"""Answering examples with a model, routed or not, and scoring the answers."""

from phatgoose.evaluation.diagnosis import OwnShare, own_share
from phatgoose.evaluation.eval_tasks import EvalTask, read_tasks
from phatgoose.evaluation.evaluate import Answer, evaluate, grade, predict
from phatgoose.evaluation.generation import generate_answers, generate_text
from phatgoose.evaluation.lorahub import search_weights
from phatgoose.evaluation.methods import (
    Base,
    BestIndividual,
    LoraHub,
    Method,
    Oracle,
    Own,
    Retrieval,
    Routed,
    Single,
    Static,
    Weighted,
)
from phatgoose.evaluation.metrics import METRICS
from phatgoose.evaluation.prompts import answer_prompts
from phatgoose.evaluation.registry import (
    Inputs,
    is_method,
    is_router,
    make_method,
    make_methods,
    method_names,
)
from phatgoose.evaluation.report import table
from phatgoose.evaluation.run import Evaluation, run_evaluation
from phatgoose.evaluation.scoring import rank_choices, score_choices
from phatgoose.evaluation.settings import RunSettings
from phatgoose.evaluation.statistics import Interval, mean_interval, resampled_means

__all__ = [
    "METRICS",
    "Answer",
    "Base",
    "BestIndividual",
    "EvalTask",
    "Evaluation",
    "Inputs",
    "Interval",
    "LoraHub",
    "Method",
    "Oracle",
    "Own",
    "OwnShare",
    "Retrieval",
    "Routed",
    "RunSettings",
    "Single",
    "Static",
    "Weighted",
    "answer_prompts",
    "evaluate",
    "generate_answers",
    "generate_text",
    "grade",
    "is_method",
    "is_router",
    "make_method",
    "make_methods",
    "mean_interval",
    "method_names",
    "own_share",
    "predict",
    "rank_choices",
    "read_tasks",
    "resampled_means",
    "run_evaluation",
    "score_choices",
    "search_weights",
    "table",
]
