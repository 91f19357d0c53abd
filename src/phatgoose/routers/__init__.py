"""Routers: what each keeps per expert and site, and how it scores a token."""

from phatgoose.routers.base import Router, make_router
from phatgoose.routers.phatgoose import PhatgooseRouter

__all__ = ["PhatgooseRouter", "Router", "make_router"]
