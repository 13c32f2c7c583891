"""Experiments: each is one module and one page template `NAME.md.jinja`; `make results` runs them all.

Read `frame` first: worlds, training runs, intervals, claims, pages. A page makes one claim: `claim.md.jinja` is its
layout, `frame.write_claim` writes it with its tables as CSV, and `index` lists what all pages say. `pools` samples and
scores a policy, `guided` sets samplers beside Best-of-n, `rivals` says what is trained, `figures` is the one style of
plots. An experiment imports these and never another experiment, except for what `search` chose. One that has served its
purpose loses its module; its page in docs/results keeps the commit that made it, and `redraw` draws its figure from the
files beside it.
"""
