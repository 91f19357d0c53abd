"""Routed layers: a bank of experts at each site, and the hooks that make a model use them."""

from phatgoose.nn.bank import Bank
from phatgoose.nn.context import ContextKeeper
from phatgoose.nn.settings import RoutingSettings
from phatgoose.nn.siblings import group_siblings
from phatgoose.nn.site import RoutingState, Site
from phatgoose.nn.trace import TokenTable, Trace

__all__ = [
    "Bank",
    "ContextKeeper",
    "RoutingSettings",
    "RoutingState",
    "Site",
    "TokenTable",
    "Trace",
    "group_siblings",
]
