import sys; sys.path.insert(0,'/work/main/tests/scripts')
from test_bench_gradient import *
def test_x(bench):
    settings = GgroSettings(entropy_threshold=99.0, num_candidates=5, top_k=12)
    c = Ggro(bench.policy, bench.reward, settings, gradient.sampling(bench), 2).sample(bench.prompts, seed=0)
    a = gradient.ggro_reference(bench, settings)
    print([[(s.num_proposals, s.num_tokens, s.wasted_tokens) for s in x.trace] for x in c], [x.num_decoded for x in a])
    assert 0
