"""Pools of experts, and models routed by them."""

from phatgoose.pool.pool import ExpertPool
from phatgoose.pool.routing import assign, record, restrict, route, unroute

__all__ = ["ExpertPool", "assign", "record", "restrict", "route", "unroute"]
