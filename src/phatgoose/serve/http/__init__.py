"""What `phatgoose serve` adds to vLLM's own HTTP server; needs starlette, which vLLM brings."""

from phatgoose.serve.http.access import Access
from phatgoose.serve.http.middleware import PoolMiddleware

__all__ = ["Access", "PoolMiddleware"]
