"""An evaluation is planned once a command, and its prompts are read once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml

from iama.config.files import EvaluationConfig
from iama.errors import RunError
from inference.engine.policy import read_policy_files
from inference.evaluation import plan, sources
from inference.evaluation.plan import check_results, make_plan
from tests.openai_server import OpenAIServer


@pytest.fixture
def rendered(monkeypatch) -> Counter[str]:
    """How often each prompt was rendered while an evaluation was planned."""
    counts: Counter[str] = Counter()
    render = sources.render_prompts

    def counted(tokenizer, prompts, ends, source):
        counts.update(map(str, prompts))
        return render(tokenizer, prompts, ends, source)

    monkeypatch.setattr(sources, "render_prompts", counted)
    return counts


@pytest.fixture
def planned(monkeypatch) -> list[EvaluationConfig]:
    """The configurations that were planned."""
    configs = []
    real = plan.make_plan
    monkeypatch.setattr(plan, "make_plan", lambda config, *read: configs.append(config) or real(config, *read))
    return configs


def test_a_prompt_is_rendered_once_for_each_way_to_read_it(config, raw_config, rendered):
    """base and grpo are one model, iama reads the same prompts with an adapter, and told has a system prompt too."""
    variants = {"told": raw_config["policies"]["base"] | {"by_criterion": {"brief": {"system_prompt": "be brief"}}}}
    raw = raw_config | {"policies": raw_config["policies"] | variants}
    made = make_plan(EvaluationConfig.model_validate(raw))
    plain, told = (
        {count for text, count in rendered.items() if ("system" in text) is system} for system in (False, True)
    )
    assert plain == {2}  # without and with the adapter
    assert told == {1}
    by_name = {source.name: source for source in made.sources}
    assert list(by_name) == ["base", "grpo", "iama", "told@vowels", "told@brief"]
    assert by_name["base"].prompts_ids is by_name["grpo"].prompts_ids is by_name["told@vowels"].prompts_ids
    tokenizer = read_policy_files("base", by_name["base"].spec).tokenizer
    for row, ids, longer in zip(made.rows, by_name["base"].prompts_ids, by_name["told@brief"].prompts_ids, strict=True):
        assert ids == tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        assert len(longer) > len(ids)


def test_prompts_that_are_left_out_have_no_ids(raw_config):
    """Of four prompts the longest leaves no room."""
    raw = raw_config | {"prompts": {"path": raw_config["prompts"], "too_long": "drop"}}
    whole = make_plan(EvaluationConfig.model_validate(raw))
    lengths = [len(ids) for ids in whole.sources[0].prompts_ids]
    room = 128 - max(lengths) + 1
    fewer = make_plan(EvaluationConfig.model_validate(raw | {"sampling": {"max_new_tokens": room}}))
    assert fewer.dropped == lengths.count(max(lengths)) > 0
    assert [len(ids) for ids in fewer.sources[0].prompts_ids] == [n for n in lengths if n < max(lengths)]


@pytest.mark.slow
def test_commands_plan_once(run, raw_config, tmp_path, planned):
    """Also where a judge is asked, whose cost is told beforehand."""
    (tmp_path / "judge.txt").write_text("{prompt} {completion}")
    with OpenAIServer(lambda body: str(1 + len(body["messages"][0]["content"]) % 9)) as server:
        judge = {"url": server.url, "model": "m", "prompt_file": str(tmp_path / "judge.txt"),
                 "cache": str(tmp_path / "cache")}  # fmt: skip
        criterion = raw_config["criteria"][0] | {"gold": {"judge": judge}}
        base = {"policies": {"base": raw_config["policies"]["base"]}, "trained": "base", "references": []}
        raw = raw_config | base | {"criteria": [criterion], "methods": ["bon"], "num_samples": 32}
        path = tmp_path / "evaluate.yaml"
        path.write_text(yaml.safe_dump(raw))
        commands = [
            ("evaluate", "--config", path, "--dry-run"),
            ("evaluate", "--config", path, "--shard", "1/2"),
            ("evaluate", "--config", path),
            ("tune", "--config", path, "--out", tmp_path / "tune"),
        ]
        for number, command in enumerate(commands, start=1):
            code, out, err = run(*command)
            assert code == 0, err
            assert len(planned) == number, command
            assert "vowels (gold): at most" in (out if "--dry-run" in command else err) or "--shard" in command
    assert Path(raw["output_dir"], "summary.json").is_file()


@pytest.mark.parametrize(("seed", "is_same"), [(5, True), (6, False)])
def test_a_moved_folder_holds_the_same_evaluation(tmp_path, seed, is_same):
    raw = {
        "name": "n",
        "output_dir": str(tmp_path),
        "policies": {"base": {"path": "p"}, "iama": {"path": "q"}},
        "prompts": "p.jsonl",
        "criteria": [{"name": "c", "proxy": {"model": "m"}}],
        "budgets": [1, 2],
        "num_samples": 16,
        "trained_budget": 2,
        "seed": 5,
    }
    written = EvaluationConfig.model_validate(raw | {"output_dir": "before"}).model_dump(mode="json")
    (tmp_path / "summary.json").write_text(json.dumps({"config": written}))
    config = EvaluationConfig.model_validate(raw | {"seed": seed})
    if is_same:
        check_results(config)
    else:
        with pytest.raises(RunError, match=r"holds another evaluation \(seed was 5, is 6\)"):
            check_results(config)
