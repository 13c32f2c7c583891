"""The tables of `summary.json`, one file each, computed from an `Evaluation` (`inference.evaluation.measurements`).

Read `values.py` first: its table of values and costs by prompt is what the others, and all savings, are computed from.
"""
