"""Samplers: whatever answers prompts, from plain Best-of-N to decoding under a reward's guidance.

Read `serve.py` first: it leads from a method's text to its sampler, holds what there is by name (`SAMPLERS`, `RULES`),
and says what a sampler of one's own must have. `base.py` has what all share, `best_of.py` what draws and keeps one,
`segments.py` the loop of samplers that grow a response by segments, `vllm_segments.py` the proposals that vLLM draws
for it. The other files are one guided sampler each.
"""

from inference.samplers.base import Completion, Sampler
from inference.samplers.serve import RULES, SAMPLERS, read_method, serve

__all__ = ["RULES", "SAMPLERS", "Completion", "Sampler", "read_method", "serve"]
