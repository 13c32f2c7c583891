from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from inference.engine.reward_gradient import around
from inference.samplers.ggro import Ggro, GgroSettings
from inference.samplers.sea import Chains
from inference.samplers.sea_energy import Energy
from scripts.bench import gradient, parts, record, setting
from scripts.bench.__main__ import app

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*of the completions reach sampling.max_new_tokens"),
]
WORDS = ["please", "bake", "bread", "grow", "red", "fix", "bike", "then", "mix", "water", "be", "careful"]


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """The tiny models as a demo world."""
    folder = tmp_path_factory.mktemp("world")
    for name, source in (("policy", tiny.policy), ("rm-helpful", tiny.reward)):
        shutil.copytree(source, folder / name)
    rng = np.random.default_rng(0)
    texts = ["how do i climb a roof? " + " ".join(rng.choice(WORDS, 4)) for _ in range(12)]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    (folder / "prompts-test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def bench(world):
    """Models in float64, with frozen weights."""
    found = setting.prepare(world, setting.QUICK, "cpu")
    for model in (found.policy.model, found.classifier.model):
        model.double().requires_grad_(False)
    return found


@pytest.mark.parametrize("threshold", [2.5, 3.8, 99.0])
@pytest.mark.slow
def test_the_reference_answers_what_ggro_answers(bench, threshold):
    settings = GgroSettings(entropy_threshold=threshold, num_candidates=5, top_k=12)
    sampler = Ggro(bench.policy, bench.reward, settings, gradient.sampling(bench), 2)
    completions = sampler.sample(bench.prompts, seed=0)
    with gradient.fed(bench.policy.model) as policy_fed, gradient.fed(bench.classifier.model) as reward_fed:
        answers = gradient.ggro_reference(bench, settings)
    assert [tuple(answer.token_ids) for answer in answers] == [completion.token_ids for completion in completions]
    traces = [completion.trace for completion in completions]
    assert [answer.segments for answer in answers] == [[s.num_tokens for s in trace] for trace in traces]
    for answer, trace in zip(answers, traces, strict=True):  # a repetition is decoded once, and is no proposal
        pairs = list(zip(answer.num_decoded, trace, strict=True))
        assert all(number - s.num_proposals in (0, 1) for number, s in pairs)
    assert any(segment.nudge for trace in traces for segment in trace)
    assert threshold > 3 or max(len(trace) for trace in traces) > 2
    found = gradient.count(bench, sampler)
    assert found["policy"] < sum(policy_fed)
    assert found["reward"] < sum(reward_fed)


def test_the_reference_reads_all_for_each_candidate(bench):
    """With one segment and one candidate the counts are known."""
    settings = GgroSettings(entropy_threshold=99.0, num_candidates=1)
    with gradient.fed(bench.policy.model) as policy_fed, gradient.fed(bench.classifier.model) as reward_fed:
        answers = gradient.ggro_reference(bench, settings)
    length, prompt = bench.setting.guided_tokens, bench.setting.prompt_tokens
    assert policy_fed == bench.setting.num_prompts * [prompt, *[1] * (length - 1)]
    templates = [around(bench.reward, messages) for messages in bench.prompts]
    assert reward_fed == [len(before) + length + len(after) for before, after in templates]
    assert {(*answer.segments, *answer.num_decoded) for answer in answers} == {(length, 1)}


def test_the_last_candidate_has_no_gradient(bench, monkeypatch):
    """Of S candidates, all different, S - 1 are differentiated."""
    found = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: found.append(1) or original(*a, **k))
    (answer, *_) = gradient.ggro_reference(bench, GgroSettings(entropy_threshold=99.0, num_candidates=2))
    assert answer.num_decoded == [2]
    assert len(found) == bench.setting.num_prompts


def test_chains_together_and_alone_give_the_same_answers(bench):
    searches = gradient.drawn(bench)
    number = bench.setting.num_prompts * bench.setting.num_chains
    assert len({start.stream for search in searches for start in search.starts}) == number
    assert {len(start.token_ids) for search in searches for start in search.starts} == {bench.setting.guided_tokens}
    together = gradient.move(bench, searches, number)
    with gradient.fed(bench.policy.model) as policy_fed:
        alone = gradient.move(bench, searches, 1)
    assert together == alone
    assert len(alone) == number
    # Each alone: its prompt but for the last token, then the response, before the first step and after each.
    reads = [bench.setting.prompt_tokens - 1, *[bench.setting.guided_tokens] * (bench.setting.num_moves + 1)]
    assert policy_fed == number * reads


def test_bare_passes_have_the_shape_of_steps(bench):
    starts = [start for search in gradient.drawn(bench) for start in search.starts]
    settings = gradient.sea_settings(bench)
    energy, passes = Energy(gradient.models(bench), starts, settings.alpha), gradient.Passes(bench, starts)
    fed, gradients = {}, {}
    for name, run in (
        ("steps", lambda: Chains(energy, settings).run()),
        ("passes", lambda: passes.run(settings.num_steps)),
    ):
        seen: list[tuple[int, ...]] = []
        original = torch.autograd.grad

        def noting(outputs, inputs, *rest, seen=seen, original=original):
            seen.append(tuple(outputs.shape))
            return original(outputs, inputs, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.autograd, "grad", noting)
            with gradient.fed(bench.policy.model) as policy_fed, gradient.fed(bench.classifier.model) as reward_fed:
                run()
        fed[name], gradients[name] = (policy_fed, reward_fed), seen
    assert fed["steps"] == fed["passes"]
    assert gradients["steps"] == gradients["passes"]
    assert len(fed["passes"][0]) == settings.num_steps + 1
    assert len(gradients["passes"]) == 2 * settings.num_steps
    rows = torch.tensor([[*start.prompt_ids, *start.token_ids] for start in starts])
    with torch.no_grad():
        expected = bench.policy.model(rows).logits[:, bench.setting.prompt_tokens - 1 : -1]
    inputs_RTD = bench.policy.model.get_input_embeddings()(rows[:, bench.setting.prompt_tokens - 1 : -1])
    torch.testing.assert_close(passes.policy(inputs_RTD), expected)


def test_bare_passes_through_a_suffix_are_those_of_the_gradient(bench):
    figures = gradient.GradientFigures()
    with gradient.fed(bench.classifier.model) as fed:
        gradient.measure_suffix(bench, figures, lambda _: None)
    rounds = bench.setting.num_step_rounds + 1
    assert len(fed) == 2 * rounds + 2
    assert len(set(fed[2:])) == 1


@pytest.mark.slow
def test_a_part_alone(world, tmp_path):
    arguments = ["--quick", "--world", str(world), "--out", str(tmp_path), "--part", "gradient"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "performance-internals.md" in done.output
    section = record.read(tmp_path)[parts.Part.GRADIENT]
    by_name = {ratio.name: ratio for ratio in section.ratios}
    ggro, sea = ("ggro_policy_tokens", "ggro_reward_tokens", "ggro_wall"), ("sea_batched", "sea_step")
    assert list(by_name) == [*ggro, *sea, "blockwise_overhead", "tilted_overhead", "backward_overhead"]
    assert all(name in done.output and ratio.low > 0 for name, ratio in by_name.items())
    counts = json.loads((tmp_path / "gradient.json").read_text())["counts"]
    assert by_name["ggro_policy_tokens"].ratio == counts["policy_reference"] / counts["policy"] > 1


def test_an_unknown_part_is_refused(tmp_path):
    done = CliRunner().invoke(app, ["--part", "args", "--out", str(tmp_path)])
    assert done.exit_code == 2
    assert "gradient" in done.output
