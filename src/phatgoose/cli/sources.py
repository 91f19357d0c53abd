"""Where the experts and examples named on the command line are."""

from phatgoose.experts.sources import expert_sources

__all__ = ["expert_sources"]
