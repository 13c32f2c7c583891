"""The reasoning experiment: routing, twins, budgets, hard prompts, drift, and the whole page on tiny models."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from iama.config.specs import RewardSpec, Sampling
from iama.objective.operators import parse_operator
from iama.rewards.load import load_reward
from scripts.experiments import frame, guided, reasoning, rewards
from scripts.experiments import reasoning_cells as cells
from scripts.experiments import reasoning_values as values
from scripts.experiments.guided import Cell, Served
from scripts.experiments.reasoning_cells import Size

SEED = 3
SIZE = Size(num_prompts=3, num_few=2, num_base_samples=8, num_samples=6, num_drift_samples=4)
JOB, SUM = "how do i bake a cake?", "how many eggs are in three boxes of four?"
QUICK = {"ggro": {"top_k": 3, "entropy_threshold": 4.2}, "sea": {"num_steps": 1, "num_chains": 2}, "args": {"top_k": 2}}


def quick(method):
    return dataclasses.replace(
        method, settings={**method.settings, **QUICK[method.sampler]}, num_answers=min(2, method.num_answers)
    )


# Training. ----------------------------------------------------------------------------------------------


@pytest.fixture
def small_world(tiny, tmp_path, monkeypatch):
    """Tiny models where a world with sums has its own."""
    home = tmp_path / "sums-3"
    home.mkdir()
    links = {"policy": tiny.policy, "policy-10": tiny.policy, "policy-30": tiny.policy, "rm-helpful": tiny.reward}
    links |= {"rm-harmless": tiny.other_reward, "rm-correct": tiny.reward}
    for name, target in links.items():
        (home / name).symlink_to(target)
    jobs = [JOB, "how do i make a salad?", "how do i fell a tree?"]
    sums = [SUM, "how many eggs are left of five if i lose two?", "how many nuts are two nuts and six more?"]
    for split in ("train", "validation", "test", "phrasing", "topic"):
        rows = [("job", text) for text in jobs] + ([("sum", text) for text in sums] if split != "topic" else [])
        lines = [
            {"prompt": [{"role": "user", "content": text}], "kind": kind, "home": str(home)} for kind, text in rows
        ]
        (home / f"prompts-{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (home / "stamp.json").write_text('{"sources_sha256": "0123456789abcdef"}')
    monkeypatch.setattr(cells, "world", lambda seed: home)
    monkeypatch.setattr(cells, "SAMPLING", Sampling(max_new_tokens=6))
    monkeypatch.setattr(frame, "FOLDER", tmp_path)
    monkeypatch.setattr(frame, "AT_ONCE", 1)
    return home


def test_a_proxy_counts_on_prompts_of_its_kind_alone(small_world):
    def asked(text):
        return [{"role": "user", "content": text}]

    prompts = [asked(JOB), asked(SUM), asked(JOB)]
    completions = [[{"role": "assistant", "content": text}] for text in ("bake bread", "mix water", "fix a bike")]
    columns = {"kind": ["job", "sum", "job"], "home": [str(small_world)] * 3}
    jobs = load_reward("helpful", RewardSpec(model=str(small_world / "rm-helpful")))(prompts, completions)
    sums = load_reward("correct", RewardSpec(model=str(small_world / "rm-correct")))(prompts, completions)
    assert rewards.helpful(prompts, completions, **columns) == pytest.approx([jobs[0], 0.0, jobs[2]], abs=1e-5)
    assert rewards.correct(prompts, completions, **columns) == pytest.approx([0.0, sums[1], 0.0], abs=1e-5)
    assert rewards.harmless(prompts, completions, **columns)[1] == 0.0


def test_twins_have_the_base_s_scale_and_the_search_s_settings(small_world):
    jobs = cells.jobs(SEED, {"helpful": (1.0, 2.0), "harmless": (-1.0, 0.5), "correct": (0.0, 1.5)})
    found = {}
    for policy, job in jobs.items():
        sets = dict(override.split("=", 1) for override in job.settings())
        criteria = json.loads(sets["objective.criteria"])
        found[policy] = [parse_operator(criterion["operator"]).name for criterion in criteria]
        assert [criterion["weight"] for criterion in criteria] == [0.5, 0.5, 1.0]
        assert sets["policy.path"] == f"{small_world}/policy"
        assert (sets["trainer.learning_rate"], sets["trainer.beta"]) == (
            ("0.002", "0.2") if policy == "grpo" else ("0.004", "0.1")
        )
    assert found["iama"] == ["bon(4)"] * 3
    assert found["tilt"] == ["tilt(2)", "tilt(0.5)", "tilt(1.5)"]
    assert found["capped"] == ["tilt(2, cap=3)", "tilt(0.5, cap=-0.5)", "tilt(1.5, cap=1.5)"]


# Values. ------------------------------------------------------------------------------------------------


def cell_of(gold, flops=40.0, proxy_PS=None, gold_PS=None, gold_RM=None, segments=((),)):
    """Best-of-n with gold n - 1 and operations 10 n; a method "a" with a gold and operations at each of 4 prompts."""
    n = np.arange(1, 9.0)
    own = {"gold": np.asarray(gold, dtype=float) * np.ones(4), "flops": np.full(4, flops), "proxy": np.zeros(4)}
    bon = {"gold": np.tile(n - 1, (4, 1)), "flops": np.tile(10 * n, (4, 1))}
    served = Served(np.arange(4), own, np.zeros((4, 1)) if gold_RM is None else gold_RM, [], segments, "run")
    plain = np.zeros((4, 8))
    return Cell(bon, plain if proxy_PS is None else proxy_PS, plain if gold_PS is None else gold_PS, {"a": served})


def test_what_the_base_needs_is_its_least_level_and_n_or_a_bound():
    base = cell_of(2)
    base.served["b"] = dataclasses.replace(base.served["a"], values={"gold": np.full(4, 5.0)})
    levels = {2.0: "a", 4.0: "b"}
    assert values.needed([base], 1.5, levels)[0] == 2
    found = values.needed([base], 4.0, levels)
    assert (found.level, found.samples, found.is_beyond) == (4, pytest.approx(5), False)
    found = values.needed([base], 9.0, levels)
    assert (found.level, found.samples, found.is_beyond) == (None, 8, True)


def test_fewer_samples_may_have_more_gold():
    cell = cell_of(0, 60.0)
    assert values.best_below([cell], "a") == (5, 6)
    cell.bon["gold"][:, 2] = 9.0
    assert values.best_below([cell], "a") == (9, 3)


def test_the_gap_of_two_policies_is_the_mean_over_criteria():
    golds = {"iama": {"x": [1, 2, 3, 4], "y": 0}, "tilt": {"x": 1, "y": [1, 1, 1, 5]}}
    found = {(who, c, "test"): cell_of(gold) for who, own in golds.items() for c, gold in own.items()}
    gap = values.policy_gap({SEED: found}, "iama", "tilt", "a", ("x", "y"))
    assert gap.mean == pytest.approx((2.5 + 0) / 2 - (1 + 2) / 2)
    same = values.policy_gap({SEED: found}, "tilt", "tilt", "a", ("x", "y"))
    assert (same.mean, same.ci95) == (0, (0, 0))


def test_hard_prompts_and_how_they_are_covered():
    proxy_PS = np.tile(np.arange(8.0), (4, 1))
    gold_PS = np.zeros((4, 8))
    gold_PS[0, 0] = gold_PS[1, 7] = gold_PS[2, 3] = 1.0  # never, always and never the best of all; the last has none
    gold_RM = np.asarray([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    cell = cell_of(0, 20.0, proxy_PS, gold_PS, gold_RM)
    assert values.hard_prompts(cell, 1.0).tolist() == [0, 2, 3]
    found = values.hard_coverage([cell], [cell], "a", 1.0, 1)
    pairs = list(itertools.combinations(range(8), 2))  # Best-of-2 has as many operations
    best = [np.mean([gold_PS[p, max(pair)] for pair in pairs]) for p in (0, 2, 3)]
    assert found == (3, pytest.approx((0.5 + 0 + 1) / 3), pytest.approx(np.mean(best)), pytest.approx(2 / 24))
    assert values.hard_coverage([cell], [cell], "a", 1.0, 2).ours == pytest.approx(2 / 3)
    easy = cell_of(0, 20.0, proxy_PS, np.ones((4, 8)), gold_RM)
    assert values.hard_coverage([easy], [easy], "a", 1.0, 1) is None


def test_drift_is_the_change_of_the_gain():
    segments = [[(3, True), (4, False)], [(2, True)]]
    inside, outside = cell_of(3, segments=segments), cell_of([1, 1, 2, 2])
    outside = dataclasses.replace(outside, gold_PS=np.ones((4, 8)))
    within = values.drift([inside], None, "a")
    assert (within.segments, within.trigger) == (1.5, pytest.approx(2 / 3))
    assert within.fired == pytest.approx(1 / 2)  # once, and the last of the four tokens of a segment did not
    assert (within.gain.mean, within.change) == (3, None)
    found = values.drift([inside], [outside], "a")
    assert (found.gain.mean, found.change.mean) == (pytest.approx(0.5), pytest.approx(-2.5))
    assert found.single == 1


def test_a_weak_base_s_gap_is_read_at_its_own_operations():
    weak, whole = cell_of([4, 4, 4, 8], 30.0), cell_of(3, 50.0)  # Best-of-3 has 2, Best-of-5 has 4
    found = values.weakness_gap([weak], [whole], "a")
    assert found.mean == pytest.approx((5 - 2) - (3 - 4))
    assert guided.equal_flops([weak], "a").difference == pytest.approx(3)


# On tiny models. ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_everything_is_served_judged_and_written_and_a_second_run_reads(small_world, tmp_path, monkeypatch):
    monkeypatch.setattr("inference.statistics.bootstrap.MIN_PROMPTS", 2)  # three prompts, for speed
    adapters = dict.fromkeys(("grpo", "iama", "tilt", "capped"))
    methods = {policy: tuple(map(quick, own)) for policy, own in cells.METHODS.items()}
    drift = quick(cells.DRIFT_METHOD)
    found = cells.measure(SEED, adapters, SIZE, methods, drift)
    for (policy, criterion, split), cell in found.items():
        wanted = {m.name for m in methods[policy]} if split == "test" else {drift.name}
        assert set(cell.served) == wanted
        assert wanted
        assert cell.gold_PS.shape[0] == 3, (policy, criterion, split)
    assert {split for *_, split in found} == {"test", "phrasing", "topic"}
    assert ("base", "correct", "topic") not in found
    cell = found["base", "correct", "test"]
    assert cell.served["SEA 10"].rows.tolist() == [0, 2]
    assert cell.served["GGRO 4"].gold_RM.shape == (3, 2)
    assert cell.gold_PS.shape == (3, 8)
    assert found["iama", "correct", "test"].gold_PS.shape == (3, 6)

    case = cells.case_of(SEED, "base", "correct", "test", 3, 8, adapters)
    assert [row["kind"] for row in case.task.rows] == ["sum"] * 3
    (method,) = (m for m in methods["base"] if m.name == "GGRO 2")
    texts = guided.answers(case, method.parsed(), None, 2)["texts"]
    expected = case.reward.score([row["prompt"] for row in case.task.rows] * 2, texts, {})[0]
    assert cell.served["GGRO 2"].values["proxy"] == pytest.approx(np.reshape(expected, (2, 3)).mean(axis=0), abs=1e-4)

    write_page(found, tmp_path, monkeypatch)

    def refuse(*_):
        raise AssertionError("answers that are on disk are not made again")

    monkeypatch.setattr(guided, "_serve", refuse)
    monkeypatch.setattr(guided, "_fluency", refuse)
    again = cells.measure(SEED, adapters, SIZE, methods, drift)["base", "correct", "test"]
    for name, own_values in cell.served.items():
        for metric, array in own_values.values.items():
            assert (again.served[name].values[metric] == array).all()
    assert (again.bon["fluency"] == cell.bon["fluency"]).all()


def write_page(found, tmp_path, monkeypatch):
    """The page of one seed has every section, and says where methods lose."""
    monkeypatch.setattr(guided, "NUM_BOOTSTRAP", 20)
    grammatical = {"correct": 0.5, "grammatical_job": 0.9, "grammatical_sum": 0.8}
    world = {"policy": dict.fromkeys(("policy", "policy-10", "policy-30"), grammatical)}
    world |= {f"rm-{name}": {"pair_accuracy": 0.75} for name in reasoning.CRITERIA}
    kl = {SEED: dict.fromkeys(("grpo", "iama", "tilt", "capped"), 0.1)}
    reasoning.write(tmp_path, {SEED: found}, kl, {SEED: world}, SIZE)
    page = (tmp_path / "reasoning.md").read_text()
    assert "nan" not in page
    for method in reasoning.COMPARED:
        assert f"| {method.title} |" in page
    weak = (tmp_path / "data/reasoning-weak.csv").read_text()
    assert weak.count(",Best-of-4,") == 3 * 3
    assert (tmp_path / "reasoning.svg").read_text().startswith("<svg")
    assert len(reasoning.hard_table({SEED: found}).where(criterion="correct").rows) == 2  # m = 1, 2
