"""Guided answers, policies that differ by criterion, and what each further method or budget costs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from iama.config.files import EvaluationConfig
from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.errors import RunError
from iama.rewards.load import load_reward
from inference.engine.likelihood import token_entropies
from inference.engine.policy import load_policy
from inference.evaluation import answers as guided_draw
from inference.evaluation.answers import with_pool_target
from inference.evaluation.combine import combine_evaluations
from inference.evaluation.plan import make_plan
from inference.evaluation.tables import load_tables
from inference.pools import engines
from inference.pools.file import prompt_ids, read_pool
from inference.pools.score import guide_key, reward_key
from inference.report import render_html, write_report
from inference.samplers.serve import needs_target, read_method, serve
from inference.statistics.costs import UNITS
from tests.inference.evaluation.running import evaluate
from tests.inference.evaluation.test_evaluate import changed, pool_of
from tests.openai_server import OpenAIServer

CARDS = "cards(entropy_threshold=1.0, min_segment=2, max_proposals=3)"
pytestmark = pytest.mark.filterwarnings("ignore:.*none of which was accepted", "ignore:.*the judge answered")


@pytest.fixture
def config(tmp_path, tiny, adapter_dir) -> EvaluationConfig:
    base = {"path": str(tiny.policy)}
    raw = {
        "name": "guided",
        "output_dir": str(tmp_path / "evaluation"),
        "policies": {"base": base, "iama": base | {"adapter": str(adapter_dir)}},
        "prompts": str(tiny.prompts),
        "criteria": [{"name": "c", "proxy": {"model": str(tiny.reward)}, "gold": {"model": str(tiny.other_reward)}}],
        "methods": ["bon", CARDS],
        "budgets": [1, 2],
        "num_samples": 8,
        "trained_budget": 2,
        "sampling": {"max_new_tokens": 10},
        "num_bootstrap": 100,
    }
    return EvaluationConfig.model_validate(raw)


@pytest.fixture
def generated(monkeypatch) -> list[int]:
    """How many prompts each call of the engine, for pools or guided answers, was asked for."""
    asked = []
    decode, serving = engines.iter_decode, guided_draw.serve

    class Counted:
        def __init__(self, sampler):
            self.sampler = sampler

        def sample(self, prompts, **kwargs):
            asked.append(len(prompts))
            return self.sampler.sample(prompts, **kwargs)

    monkeypatch.setattr(
        engines, "iter_decode", lambda p, ids, *a, **k: asked.append(len(ids)) or decode(p, ids, *a, **k)
    )
    monkeypatch.setattr(guided_draw, "serve", lambda *a: Counted(serving(*a)))
    return asked


@pytest.mark.slow
def test_answers_are_the_samplers_own(config):
    summary = evaluate(config)
    pool = read_pool(pool_of(config, "base"))
    reward = load_reward("c", config.criteria[0].proxy)
    prompts = [json.loads(line)["prompt"] for line in Path(config.prompts.path).read_text().splitlines()]
    values = [
        [reward.score([p.prompt], [text], {})[0][0] for text in row]
        for p, row in zip(pool.prompts, pool.texts, strict=True)
    ]
    target = float(np.quantile(values, 0.9))
    method = f"cards(target={target:.6g}, entropy_threshold=1.0, min_segment=2, max_proposals=3)"
    policy = load_policy("base", PolicySpec(path=config.policies["base"].path))
    completions = serve(policy, reward, method, config.sampling).sample(prompts, seed=config.seed + 1)
    row = next(r for r in summary["curves"] if (r["policy"], r["method"]) == ("base", CARDS))
    assert row["samples"] is None
    assert row["proxy"] == pytest.approx(np.mean([c.reward for c in completions]))
    gold = load_reward("g", config.criteria[0].gold)
    assert row["gold"] == pytest.approx(np.mean([gold.score([p], [c.text], {})[0][0]
                                                 for p, c in zip(prompts, completions, strict=True)]))  # fmt: skip
    for unit in set(UNITS) - {"seconds"}:
        assert row[unit] == pytest.approx(np.mean([c.cost.as_dict()[unit] for c in completions])), unit
    assert row["kl_kind"] == "lower bound"
    examples = [r for r in summary["examples"] if r["policy"] == "base" and r["method"].startswith("cards")]
    assert {r["method"] for r in examples} == {method}
    assert [r["best"]["text"] for r in examples] == [c.text for c in completions]
    assert max(len(r["segments"]) for r in examples) > 1
    for example, completion in zip(examples, completions, strict=True):
        assert "".join(segment["text"] for segment in example["segments"]) == completion.text
        for segment, own in zip(example["segments"], completion.trace, strict=True):
            assert (segment["reward"], segment["threshold"]) == pytest.approx((own.reward, own.threshold))
            assert (segment["num_proposals"], segment["forced"]) == (own.num_proposals, own.forced)
    write_report(Path(config.output_dir))


def test_a_target_is_put_into_the_method():
    proxy_PS = np.arange(10.0).reshape(2, 5)
    proxy_PS[0, 0] = np.nan
    target = f"{np.quantile(np.arange(1, 10), 0.9):.6g}"
    for written, expected in {
        "cards": f"cards(target={target})",
        "cards(entropy_threshold=null)": f"cards(target={target}, entropy_threshold=null)",
        "rejection(target=null)": f"rejection(target={target})",
        "cards(quantile=0.9, entropy_threshold=null)": f"cards(target={target}, entropy_threshold=null)",
    }.items():
        method = read_method(written)
        assert needs_target(method, Sampling())
        assert with_pool_target(method, 0.9, proxy_PS) == read_method(expected)
        assert with_pool_target(method, 0.9, proxy_PS).settings == read_method(expected).settings
    for written in ("cards(target=1.5)", "args(top_k=3)", "bon(4)"):
        assert not needs_target(read_method(written), Sampling())


@pytest.mark.slow
def test_guided_answers_resume(config, generated):
    first = evaluate(config)
    assert generated == [4, 4, 4, 4]  # two pools, and the answers of two policies
    for path in (Path(config.output_dir) / "answers").glob("*.jsonl"):
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    generated.clear()
    second = evaluate(config)
    assert generated == [2, 2]
    assert [r["best"]["text"] for r in second["examples"]] == [r["best"]["text"] for r in first["examples"]]
    for one, two in zip(first["curves"], second["curves"], strict=True):
        assert one["proxy"] == pytest.approx(two["proxy"], abs=1e-5)
        assert one["policy_decode_tokens"] == two["policy_decode_tokens"]


@pytest.mark.slow
def test_values_of_a_dial_are_drawn_once_and_told_together(config, generated, tmp_path):
    """A point that was there before is not drawn again; seeds combine; a report shows what there is."""
    evaluate(config)
    (Path(config.output_dir) / "summary.json").unlink()
    generated.clear()
    budgets = {"samples": [1, 2], CARDS: [0.5, 0.9]}
    turned = changed(config, budgets=budgets)
    summary = evaluate(turned)
    assert generated == [4, 4]  # the 0.9 quantile is what a missing target is without a dial
    points = [CARDS.replace("(", f"(quantile={q}, ") for q in (0.5, 0.9)]
    told = {(r["method"], r["dial"], r["value"]) for r in summary["curves"] if r["samples"] is None}
    assert told == {(point, CARDS, value) for point, value in zip(points, ("0.5", "0.9"), strict=True)}
    asked = {(r["method"], r["reference_method"]) for r in summary["savings"] if "reference_method" in r}
    assert asked == {(point, other) for point in points for other in (CARDS, "bon")}
    assert {r["written"] for r in summary["recommendations"]} <= {"bon(1)", "bon(2)", *points}
    assert {r["method"].split("(")[0] for r in summary["examples"]} == {"bon", "cards"}
    page = write_report(Path(turned.output_dir)).read_text()
    assert f"base by {CARDS}" in page
    again = changed(turned, seed=1, output_dir=str(tmp_path / "second"))
    evaluate(again)
    both = combine_evaluations([Path(turned.output_dir), Path(again.output_dir)])
    rows = [r for r in both["savings"] if r.get("reference_method") == CARDS]
    assert {(r["num_seeds"], r["unit"]) for r in rows} == {(2, "policy_tokens")}
    single = [r for r in summary["savings"] if r.get("reference_method") == CARDS]
    assert [(r["method"], r["metric"]) for r in rows] == [(r["method"], r["metric"]) for r in single]
    assert "</html>" in render_html(both)


def test_repeated_prompts_have_answers_of_their_own(config, tmp_path, tiny):
    first = tiny.prompts.read_text().splitlines()[0]
    (tmp_path / "twice.jsonl").write_text(f"{first}\n{first}\n")
    summary = evaluate(changed(config, prompts=str(tmp_path / "twice.jsonl")))
    answers = [r["best"]["text"] for r in summary["examples"] if r["method"].startswith("cards")]
    assert len(set(answers[::2])) == 2


def test_methods_and_budgets_of_a_pool_generate_nothing(config, generated):
    few = changed(config, methods=["bon"], budgets=[1])
    evaluate(few)
    assert generated == [4, 4]
    (Path(config.output_dir) / "summary.json").unlink()
    methods = ["bon", "bop", "soft_bon(2, 0.5)", "bop_zt(1)", "bon(2)", "identity"]
    summary = evaluate(changed(config, methods=methods, budgets=[1, 2]))
    assert generated == [4, 4]
    rows = {(r["policy"], r["method"], r["samples"]): r for r in summary["curves"]}
    for policy in ("base", "iama"):
        for metric in ("proxy", "gold", "kl", *UNITS):
            assert rows[policy, "bon(2)", None][metric] == pytest.approx(rows[policy, "bon", 2][metric]), metric
            assert rows[policy, "identity", None][metric] == pytest.approx(rows[policy, "bon", 1][metric]), metric
        assert rows[policy, "bon", 1]["proxy"] < rows[policy, "soft_bon(2, 0.5)", None]["proxy"]
        assert rows[policy, "soft_bon(2, 0.5)", None]["proxy"] < rows[policy, "bon", 2]["proxy"]
        assert rows[policy, "soft_bon(2, 0.5)", None]["kl_kind"] == "lower bound"
        assert rows[policy, "bop_zt(1)", None]["reward_calls"] == pytest.approx(1 / (1 - np.exp(-1)))
    write_report(Path(config.output_dir))


def test_policies_that_differ_by_criterion(config, adapter_dir, tiny, generated):
    """Specialists with an adapter each, and a policy that is told its criterion: every curve is of its own pool."""
    base = {"path": str(tiny.policy)}
    policies = {
        "base": base,
        "specialists": base | {"by_criterion": {"brief": {"adapter": str(adapter_dir)}}},
        "told": base | {"by_criterion": {"c": {"system_prompt": "bake"}, "brief": {"system_prompt": "be careful"}}},
    }
    proxy = config.model_dump()["criteria"][0]["proxy"]
    criteria = [{"name": "c", "proxy": proxy}, {"name": "brief", "proxy": proxy}]
    settings = changed(config, policies=policies, criteria=criteria, methods=["bon"], trained="told")
    summary = evaluate(settings)
    assert generated == [4] * 5
    files = {"base": "base", "specialists c": "specialists_c", "specialists brief": "specialists_brief",
             "told c": "told_c", "told brief": "told_brief"}  # fmt: skip
    texts = {name: read_pool(pool_of(settings, file)).texts for name, file in files.items()}
    assert texts["specialists c"] == texts["base"]
    assert texts["specialists brief"] != texts["base"]
    headers = {name: read_pool(pool_of(settings, file)).header for name, file in files.items()}
    assert headers["told brief"]["system_prompt"] == "be careful"
    assert headers["specialists brief"]["policy"]["adapter"] == str(adapter_dir)
    reward = load_reward("c", settings.criteria[0].proxy)
    prompts = [prompt.prompt for prompt in read_pool(pool_of(settings, "base")).prompts]
    for row in (r for r in summary["curves"] if r["samples"] == 1):
        name = row["policy"] if row["policy"] == "base" else f"{row['policy']} {row['criterion']}"
        values = [
            np.mean(reward.score([p] * 8, row_texts, {})[0]) for p, row_texts in zip(prompts, texts[name], strict=True)
        ]
        assert row["proxy"] == pytest.approx(np.mean(values), abs=1e-5)  # rewards see the plain prompt
        assert row["kl"] == pytest.approx(0, abs=1e-4) if name in ("base", "specialists c") else row["kl"] != 0
    told = [(row["policy"], row["criterion"]) for row in summary["sampling"]]
    assert told == [("base", None), ("specialists", "c"), ("specialists", "brief"), ("told", "c"), ("told", "brief")]
    write_report(Path(settings.output_dir))


@pytest.mark.slow
def test_a_guided_answer_without_gold(config, tmp_path):
    """A judge that cannot be read about some answers: they are left out and counted."""

    def verdict(body) -> str:
        answer = body["messages"][0]["content"]
        return "no number" if len(answer) % 3 == 0 else str(1 + len(answer) % 9)

    (tmp_path / "judge.txt").write_text("{prompt} {completion}")
    with OpenAIServer(verdict) as server:
        judge = {"url": server.url, "model": "m", "prompt_file": str(tmp_path / "judge.txt"),
                 "cache": str(tmp_path / "cache")}  # fmt: skip
        criteria = [config.model_dump()["criteria"][0] | {"gold": {"judge": judge}}]
        summary = evaluate(changed(config, criteria=criteria))
    assert json.loads((Path(config.output_dir) / "summary.json").read_text()) == json.loads(json.dumps(summary))
    examples = [r for r in summary["examples"] if r["method"].startswith("cards")]
    lost = [r for r in examples if r["best"]["gold"] is None]
    counted = {r["policy"]: r["num_missing"] for r in summary["missing"] if "method" in r}
    assert lost
    assert counted == {name: n for name in ("base", "iama") if (n := sum(r["policy"] == name for r in lost))}
    for row in (r for r in summary["curves"] if r["method"] == CARDS):
        golds = [r["best"]["gold"] for r in examples if r["policy"] == row["policy"] and r["best"]["gold"] is not None]
        assert row["gold"] == (pytest.approx(np.mean(golds)) if golds else None)
    write_report(Path(config.output_dir))


class TestSeveralAnswers:
    """`num_answers`: each by a seed of its own, the first as if it were the only one."""

    @pytest.mark.slow
    def test_are_means_over_the_samplers_own(self, config):
        method = "cards(target=0.1, entropy_threshold=1.0, min_segment=2, max_proposals=3)"
        several = changed(config, methods=["bon", method], num_answers=3)
        summary = evaluate(several)
        prompts = [json.loads(line)["prompt"] for line in Path(config.prompts.path).read_text().splitlines()]
        policy = load_policy("base", PolicySpec(path=config.policies["base"].path))
        sampler = serve(policy, load_reward("c", config.criteria[0].proxy), method, config.sampling)
        gold = load_reward("g", config.criteria[0].gold)
        rounds = [sampler.sample(prompts, seed=guided_draw.answer_seed(config.seed, number)) for number in range(3)]
        completions = [completion for row in rounds for completion in row]
        (row,) = [r for r in summary["curves"] if (r["policy"], r["method"]) == ("base", method)]
        golds = [gold.score([p], [c.text], {})[0][0] for row in rounds for p, c in zip(prompts, row, strict=True)]
        assert row["gold"] == pytest.approx(np.mean(golds), abs=1e-5)
        assert row["proxy"] == pytest.approx(np.mean([c.reward for c in completions]), abs=1e-5)
        for unit in set(UNITS) - {"seconds"}:
            assert row[unit] == pytest.approx(np.mean([c.cost.as_dict()[unit] for c in completions])), unit
        (sampling,) = [r for r in summary["sampling"] if (r["policy"], r["method"]) == ("base", method)]
        assert sampling["num_samples"] == 3
        assert sampling["decode_tokens"] == sum(c.cost.policy_decode_tokens for c in completions)
        assert sampling["distinct"] == pytest.approx(np.mean([len({row[i].text for row in rounds}) / 3
                                                              for i in range(len(prompts))]))  # fmt: skip
        assert sampling["fluency"] is not None
        examples = [r["best"]["text"] for r in summary["examples"] if (r["policy"], r["method"]) == ("base", method)]
        assert examples == [c.text for c in rounds[0]]
        assert load_tables(Path(config.output_dir)).values["base", "c", method, "gold"].shape == (len(prompts), 1)
        write_report(Path(config.output_dir))

    @pytest.mark.slow
    def test_the_first_is_kept_from_an_evaluation_of_one(self, config, generated):
        one = evaluate(config)
        assert "num_answers" not in json.loads((Path(config.output_dir) / "summary.json").read_text())["config"]
        before = {path.name: path.read_bytes() for path in (Path(config.output_dir) / "answers").iterdir()}
        generated.clear()
        with pytest.raises(RunError, match=r"num_answers was '\(not set\)', is 2"):
            evaluate(changed(config, num_answers=2))
        (Path(config.output_dir) / "summary.json").unlink()
        two = evaluate(changed(config, num_answers=2))
        assert generated == [4, 4]  # the second answers of two policies
        after = {path.name: path.read_bytes() for path in (Path(config.output_dir) / "answers").iterdir()}
        assert len(after) == 2 * len(before) == 4
        assert before.items() <= after.items()
        assert two["config"]["num_answers"] == 2
        first, second = ([r["best"]["text"] for r in summary["examples"]] for summary in (one, two))
        assert first == second

    def test_neighbouring_seeds_have_none_in_common(self):
        seeds = [guided_draw.answer_seed(seed, number) for seed in range(50) for number in range(20)]
        assert len(set(seeds)) == len(seeds)
        assert [guided_draw.answer_seed(seed, 0) for seed in (0, 7)] == [1, 8]
        repeats = [guided_draw.repeat_seed(seed, repeat) for seed in seeds[:200] for repeat in range(20)]
        assert len(set(repeats)) == len(repeats)
        assert [guided_draw.repeat_seed(seed, 0) for seed in (1, 8)] == [1, 8]

    def test_to_repeated_prompts_have_seeds_of_their_own(self, monkeypatch, config):
        """Which no neighbouring evaluation's answers have."""

        class Noted:
            def sample(self, prompts, *, seed, columns):
                asked.append((seed, len(prompts)))
                raise InterruptedError

        monkeypatch.setattr(guided_draw, "open_policy", lambda *_: None)
        monkeypatch.setattr(guided_draw, "serve", lambda *_: Noted())
        (source, _) = make_plan(config).sources
        seeds = {}
        for seed in (1, 2):
            asked = []
            for wanted in ([0], [1], [2]):
                draw = guided_draw.guided_draw(source, None, read_method("args"), config.sampling, seed, 8)
                with pytest.raises(InterruptedError):
                    list(draw([{"prompt": "a"}] * 3, wanted))
            seeds[seed] = [found for found, _ in asked]
        assert (seeds[1][0], seeds[2][0]) == (1, 2)
        assert len({*seeds[1], *seeds[2]}) == 6


MINE = """
from iama.config.schema import Strict

class Mine:
    class Settings(Strict):
        a: int

    def sample(self, prompts, *, seed, columns=None): ...
"""


def test_a_sampler_s_file_is_read_where_it_is_found(config, tmp_path, monkeypatch):
    """A file of `configs/` that is not in the working folder is the package's."""
    file = tmp_path / "installed" / "samplers" / "mine.py"
    file.parent.mkdir(parents=True)
    file.write_text("# first\n")
    monkeypatch.setattr("iama.installation.CONFIGS", tmp_path / "installed")
    monkeypatch.chdir(tmp_path)
    (source, _) = make_plan(config).sources
    headers = []
    for text in ("# first\n", "# second\n"):
        file.write_text(text + MINE)
        for path in ("configs/samplers/mine.py", file):
            method = read_method(f"{path}:Mine(a=1)")
            headers.append(guided_draw.guided_header(source, method, "key", "helpful", Sampling())["guided_by"])
    assert headers[0] == headers[1] != headers[2] == headers[3]


def test_answers_are_drawn_again_where_the_code_that_guides_has_changed(config, tmp_path, generated):
    mine = tmp_path / "mine.py"
    mine.write_text("def letters(completions, **_): return [float(len(str(text))) for text in completions]\n")
    guide = {"function": f"{mine}:letters"}
    criterion = config.model_dump()["criteria"][0] | {"proxy": guide}
    method = "cards(target=100, entropy_threshold=1.0, min_segment=2, max_proposals=2)"
    config = changed(config, criteria=[criterion], methods=["bon", method])
    evaluate(config)
    assert generated == [4] * 4
    files = set((Path(config.output_dir) / "answers").iterdir())
    for text, drawn in ((mine.read_text(), []), ("# another\n" + mine.read_text(), [4, 4])):
        mine.write_text(text)
        generated.clear()
        (Path(config.output_dir) / "summary.json").unlink()
        evaluate(config)
        assert generated == drawn
    assert len(set((Path(config.output_dir) / "answers").iterdir()) - files) == 2


def test_the_file_of_a_module_counts_and_so_do_members_of_an_ensemble(tmp_path, monkeypatch, tiny):
    file = tmp_path / "a_module_of_rewards.py"
    monkeypatch.syspath_prepend(tmp_path)
    function, model = RewardSpec(function="a_module_of_rewards:f"), RewardSpec(model=str(tiny.reward))
    members = [spec.model_dump(exclude_defaults=True) for spec in (function, model)]
    scaled = [member | {"scale": {"mean": 0.0, "std": 1.0}} for member in members]
    ensemble = RewardSpec.model_validate({"ensemble": {"members": scaled, "aggregate": "mean"}})
    keys = []
    for text in ("# first\n", "# second\n"):
        file.write_text(text)
        keys.append([guide_key(spec) for spec in (function, ensemble, model)])
    assert [one == other for one, other in zip(*keys, strict=True)] == [False, False, True]
    assert keys[0][2] == reward_key(model)


def test_a_threshold_that_is_a_quantile_is_that_of_each_policys_pool(config, generated):
    asked = "cards(entropy_threshold=quantile(0.8), target=0.1, min_segment=2, max_proposals=3)"
    config = changed(config, methods=["bon", asked])
    evaluate(config)
    folder = Path(config.output_dir)
    written = {}
    plan = make_plan(config)
    for source in plan.sources:
        policy = load_policy(source.policy, source.spec)
        pool = read_pool(folder / "pools" / f"{source.file_name}.jsonl")
        samples = {prompt.prompt_id: prompt.samples[:4] for prompt in pool.prompts}
        asked_ids = zip(source.prompts_ids, prompt_ids(plan.rows), strict=True)
        rows = [(ids, list(sample.token_ids)) for ids, name in asked_ids for sample in samples[name]]
        found = token_entropies(policy, [ids for ids, _ in rows], [row for _, row in rows], 8)
        written[source.policy] = float(f"{np.quantile(np.concatenate(found), 0.8):.6g}")
    headers = [read_pool(path).header for path in (folder / "answers").glob("*.jsonl")]
    served = {header["policy"]["name"]: read_method(header["method"]).settings for header in headers}
    assert {name: settings["entropy_threshold"] for name, settings in served.items()} == pytest.approx(
        written, rel=1e-5
    )
    generated.clear()
    evaluate(config)  # nothing is drawn again
    assert not generated
