"""`inference.pools` under the name that it had at first, for scripts that import `read_pool` from here."""

from inference.pools.file import merge_pools, prompt_ids, read_pool, write_pool

__all__ = ["merge_pools", "prompt_ids", "read_pool", "write_pool"]
