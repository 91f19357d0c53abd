"""vLLM's worker for this platform with ours on top: worker_cls="phatgoose.serve.worker.Worker"."""

from typing import Any

from vllm.platforms import current_platform

from phatgoose.serve.live import LiveWorker

Base: Any
if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Base
else:
    from vllm.v1.worker.gpu_worker import Worker as Base


class Worker(LiveWorker, Base):
    """See `LiveWorker`."""
