"""The names by which vLLM, its workers and our parts find each other."""

LOAD_FORMAT = "phatgoose"  # of vLLM's --load-format, and our settings in its additional_config
REQUEST = "phatgoose"  # a request's settings in SamplingParams.extra_args
