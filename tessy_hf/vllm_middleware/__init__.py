"""A middleware for vLLM's server that takes only the new end of each prompt.

``vllm serve MODEL --middleware tessy_hf.vllm_middleware.Deltas``. Imports nothing else of this package, and vLLM and
Starlette only when asked.
"""

from tessy_hf.vllm_middleware.middleware import Deltas

__all__ = ["Deltas"]
