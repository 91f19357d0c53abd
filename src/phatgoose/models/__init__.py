"""Base models: by folder, by Hub id, and the default one by whatever way there is to it."""

from phatgoose.models.caches import cache_argument, cache_of
from phatgoose.models.load import best_device, load_base
from phatgoose.models.named import DEFAULT, SMOLLM2, TINY, Base, find_base

__all__ = [
    "DEFAULT",
    "SMOLLM2",
    "TINY",
    "Base",
    "best_device",
    "cache_argument",
    "cache_of",
    "find_base",
    "load_base",
]
