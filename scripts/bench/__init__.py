"""`make bench`: ratios of things measured side by side in one run (`python -m scripts.bench --help`).

Read `entries` first: every ratio with its bar. `__main__` runs the `parts` (`plain_sampling`, `cards`, `gradient`,
`training`) on the models of `setting`, and `page` writes docs/results/performance.md; `*_baseline` are the slow
references.
"""
