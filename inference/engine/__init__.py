"""The engine: many prompts are sampled together, and many texts scored together, with exact costs.

Read `decode` first: it samples responses (`responses`) to many prompts, with random numbers by address
(`random_streams`) from the law of the next token (`next_token`). It stands on `rows` (token rows that grow, fork and
are cut back) and these on `kv_cache`. Rewards are read by `reward_rows` and differentiated by `reward_gradient`;
`likelihood` scores given responses. `vllm` samples elsewhere, of the same law.
"""

from inference.engine.decode import iter_decode
from inference.engine.policy import Policy, load_policy
from inference.engine.responses import Ends, Pool, PooledPrompt, Response, check_fit, pool_of, response_text
from inference.engine.reward_rows import RewardRows
from inference.engine.rows import Rows

__all__ = [
    "Ends",
    "Policy",
    "Pool",
    "PooledPrompt",
    "Response",
    "RewardRows",
    "Rows",
    "check_fit",
    "iter_decode",
    "load_policy",
    "pool_of",
    "response_text",
]
