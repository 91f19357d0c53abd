"""Pools of experts, the models that they route, and experts made out of several."""

from phatgoose.nn import Choice
from phatgoose.pool.merge import MERGE_METHODS, merge_experts
from phatgoose.pool.pool import ExpertPool
from phatgoose.pool.routing import assign, record, restrict, route, unroute
from phatgoose.pool.subtract import subtract_general

__all__ = [
    "MERGE_METHODS",
    "Choice",
    "ExpertPool",
    "assign",
    "merge_experts",
    "record",
    "restrict",
    "route",
    "subtract_general",
    "unroute",
]
