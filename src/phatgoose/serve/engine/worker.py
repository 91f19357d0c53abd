"""vLLM's worker for this platform with ours on top: `phatgoose.serve.worker.Worker`."""

from typing import Any

from vllm.platforms import current_platform

from phatgoose.serve.engine.runner import LiveWorker


def _of_this_platform() -> Any:
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker as GPUWorker

    return GPUWorker


class Worker(LiveWorker, _of_this_platform()):  # type: ignore[misc]
    """See `LiveWorker`."""
