"""The public name of our workers' class: worker_cls="phatgoose.serve.worker.Worker"."""

from phatgoose.serve.engine.worker import Worker

__all__ = ["Worker"]
