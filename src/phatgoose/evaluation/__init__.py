"""Answering examples with a model, routed or not, and scoring the answers."""

from phatgoose.evaluation.diagnosis import OwnShare, own_share
from phatgoose.evaluation.evaluate import Answer, evaluate, grade, predict
from phatgoose.evaluation.generation import generate_answers, generate_text
from phatgoose.evaluation.metrics import METRICS
from phatgoose.evaluation.scoring import rank_choices, score_choices
from phatgoose.evaluation.statistics import Interval, mean_interval, resampled_means

__all__ = [
    "METRICS",
    "Answer",
    "Interval",
    "OwnShare",
    "evaluate",
    "generate_answers",
    "generate_text",
    "grade",
    "mean_interval",
    "own_share",
    "predict",
    "rank_choices",
    "resampled_means",
    "score_choices",
]
