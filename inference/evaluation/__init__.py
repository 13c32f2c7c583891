"""Evaluations: policies x criteria x methods x budgets, from one pool of samples a prompt and policy.

Read `evaluate.py` first, then follow a prompt: `plan.py` checks everything and renders it (`sources.py`), `measure.py`
draws, scores and answers, `rows/` computes each table, `summary.py` says what `summary.json` holds. Beside them:
`shards.py` for several devices, `describe.py` for `--dry-run`, `compare.py` and `combine.py` for savings over seeds,
`calibration.py` for `iama tune`. Public: `plan.make_plan`, `evaluate.evaluate`, `summary.load_summary`,
`combine.combine_evaluations`.
"""
