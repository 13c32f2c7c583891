"""`make bench`: ratios of things measured side by side in one run (`python -m scripts.bench --help`).

Read `entries` first: every ratio with its bar. `__main__` runs the `parts` (`plain_sampling`, `cards`, `gradient`,
`training` and others) on the models of `setting`; `engines` runs by itself. `sections` says what each part leaves in
the `record`, and `page` writes docs/results/performance.md and performance-internals.md from it. `*_baseline` are the
slow references.
"""
