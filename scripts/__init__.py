"""Programs around the packages: the demo's world and models, the bench, the published results.

Read `demo` first: `make demo` as one walk. `launch` starts training, `bench` measures speed, `experiments` holds what
docs/results publishes and `results` writes it; `demo_world` and `sums_world` are the languages all of it speaks.
"""
