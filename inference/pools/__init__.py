"""Pools: samples of a policy with their scores, in files that any program can write and a killed job goes on with.

Read `file` first: it reads and writes pool files, whose lines `format` checks (docs/reference/pool-files.md); `storage`
knows those that are compressed, `parquet` those that are Parquet. Their samples are `held`: numbers in memory, texts
in a temporary file. `fill` draws what a file lacks, with one of the `engines`; `score` scores its texts. Scores are
kept in a `journal`, line by line. `standardise` measures the scale of a reward.
"""

from inference.pools.engines import local_draw, openai_draw, transformers_draw, vllm_draw
from inference.pools.file import merge_pools, prompt_ids, read_pool, write_pool
from inference.pools.fill import engine_header, fill_pool, pool_header
from inference.pools.score import PoolScores, add_column, reward_key, score_pool
from inference.pools.standardise import measure_on_pool, measure_scales

__all__ = [
    "PoolScores",
    "add_column",
    "engine_header",
    "fill_pool",
    "local_draw",
    "measure_on_pool",
    "measure_scales",
    "merge_pools",
    "openai_draw",
    "pool_header",
    "prompt_ids",
    "read_pool",
    "reward_key",
    "score_pool",
    "transformers_draw",
    "vllm_draw",
    "write_pool",
]
