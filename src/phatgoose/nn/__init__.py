"""Routed layers: a bank of experts at each site, and the hooks that make a model use them."""

from phatgoose.nn.bank import Bank
from phatgoose.nn.choice import Choice
from phatgoose.nn.context import ContextKeeper
from phatgoose.nn.forward import NO_RULES, Forwards, Rules, Stream
from phatgoose.nn.lock import PoolLock
from phatgoose.nn.settings import RoutingSettings
from phatgoose.nn.siblings import group_siblings
from phatgoose.nn.site import Site, WholeSite
from phatgoose.nn.state import RoutingState
from phatgoose.nn.trace import TokenTable, Trace

__all__ = [
    "NO_RULES",
    "Bank",
    "Choice",
    "ContextKeeper",
    "Forwards",
    "PoolLock",
    "RoutingSettings",
    "RoutingState",
    "Rules",
    "Site",
    "Stream",
    "TokenTable",
    "Trace",
    "WholeSite",
    "group_siblings",
]
