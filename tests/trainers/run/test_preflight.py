"""The checklist: each line on a configuration that it is made for."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from iama.errors import ConfigError, IamaWarning, ModelError
from tests.processes import run_python
from trainers.run import memory, preflight, tokens
from trainers.run.plan import make_plan
from trainers.run.preflight import Check, say_and_refuse, stop_ids

ROOT = Path(__file__).parents[3]


def checks_of(config):
    return {check.what: check for check in preflight.preflight(make_plan(config, "test.yaml"))}


def copied(tiny, tmp_path, name="policy"):
    return shutil.copytree(getattr(tiny, name), tmp_path / f"copy-{name}")


def test_a_good_configuration_passes_every_line(make_config):
    config = make_config()
    checks = checks_of(config)
    assert {check.status for check in checks.values()} == {"pass"}
    assert {"policy tokenizer", "reward helpful", "reward helpful tokenizer", "gold harmless", "groups", "batch"} < set(
        checks
    )
    assert {"device", "engine", "tracking", "LoRA", "memory", "output folder", "disk"} < set(checks)
    assert "output 'good' of 2, times 1" in checks["gold harmless"].detail
    assert "ends at '<|end|>'" in checks["policy tokenizer"].detail
    assert checks["batch"].detail == "8 roll-outs of 1 process(es) are 2 groups of 4; 2 steps"
    assert not Path(config.output_dir).exists()


def test_what_a_judge_is_asked_and_costs_at_most_is_told(make_config, tmp_path):
    (tmp_path / "judge.txt").write_text("{prompt} {completion}")
    judge = {
        "url": "http://localhost:1/v1",
        "model": "m",
        "prompt_file": str(tmp_path / "judge.txt"),
        "mode": "pointwise",
    }
    judge |= {"cache": str(tmp_path / "cache"), "output_price": 1e6, "max_tokens": 3}
    criterion = {"name": "helpful", "operator": "bon(2)", "proxy": {"judge": judge}}
    config = make_config(objective__criteria=[criterion])
    plan = make_plan(config, "test.yaml")
    detail = {check.what: check for check in preflight.preflight(plan)}["reward helpful"].detail
    number = memory.num_rollouts(plan)
    assert number == memory.num_steps(plan) * 8  # each batch of this configuration is used for one step
    assert f"at most judge m at http://localhost:1/v1: {number} requests" in detail
    assert detail.endswith(f"at a price of about {3 * number:.2f}")


def test_scales_that_nobody_measured_are_told(make_config, tiny):
    helpful, harmless = ({"name": name, "operator": "bon(2)"} for name in ("helpful", "harmless"))
    model, short = {"model": str(tiny.reward)}, {"function": "configs/recipes/length_rewards.py:brief"}
    measured, empty = {"mean": 0.3, "std": 2.0}, {"mean": 0.0, "std": 1.0}

    def told(*proxies):
        criteria = [{**c, "proxy": proxy} for c, proxy in zip((helpful, harmless), proxies, strict=False)]
        check = checks_of(make_config(objective__criteria=criteria)).get("scales")
        return None if check is None else check.line()

    assert told(model) is None
    assert told(model, {"model": str(tiny.other_reward)}) is None  # as in the demo: of one kind
    assert told({**model, "scale": measured}, short) is None
    assert told({**model, "scale": measured}, {"model": str(tiny.other_reward), "scale": measured}) is None
    assert "'helpful' is scored on its model's own scale" in told(model, short)
    assert "'harmless' is scored on its model's own scale" in told({**model, "scale": measured}, model)
    assert "the scale of 'helpful' is mean 0, std 1, which changes nothing" in told({**model, "scale": empty}, model)


def test_a_precision_that_the_cpu_lacks_is_told_with_its_key(make_config, monkeypatch):
    monkeypatch.setattr(preflight, "is_slow", lambda dtype, device: dtype == "bfloat16")
    assert "precision" not in checks_of(make_config(trainer__bf16=True))  # nobody feels it
    monkeypatch.setattr(preflight, "FELT", 1)
    assert "precision" not in checks_of(make_config())
    check = checks_of(make_config(trainer__bf16=True))["precision"]
    assert (check.status, check.remedy) == ("warn", "set trainer.bf16: false")
    assert "no instructions for bfloat16" in check.detail


def test_every_line_is_shown_before_the_run_is_refused():
    said = []
    checks = [
        Check("pass", "a", "fine"),
        Check("fail", "disk", "full", "delete"),
        Check("warn", "memory", "tight", "x"),
    ]
    with pytest.raises(ConfigError, match="1 of 3 checks failed: disk; what to do"):
        say_and_refuse(checks, said.append)
    assert said == ["pass  a       fine", "fail  disk    full  -> delete", "warn  memory  tight  -> x"]
    say_and_refuse(checks[:1] + checks[2:], said.append)


# ------------------------------------------------------------------ tokenizers and templates


ASKS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TURN = "{% if m['role'] == 'assistant' %}<|assistant|>{% endif %}{{ m['content'] }}"


def template(folder, text):
    (folder / "chat_template.jinja").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "status", "match"),
    [
        (
            "{{ bos_token }}{{ bos_token }}{% for m in messages %}" + TURN + "<|end|>{% endfor %}" + ASKS,
            "fail",
            "twice",
        ),
        (
            "{% for m in messages %}{{ bos_token }}{{ m['content'] }}<|end|>{% endfor %}{{ bos_token }}",
            "warn",
            "also stands inside",
        ),
        ("{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "warn", "without a special token"),
        (
            "{{ bos_token }}{% for m in messages %}{{ m['content'] }}<|system|>{% endfor %}",
            "fail",
            "ends a turn with '<|system|>', but generation ends at '<|end|>' only",
        ),
    ],
)
def test_templates_that_do_not_fit(make_config, tiny, tmp_path, text, status, match):
    folder = template(copied(tiny, tmp_path), text)
    check = checks_of(make_config(policy__path=str(folder)))["policy tokenizer"]
    assert check.status == status
    assert match in check.detail
    assert check.remedy


def test_a_bos_that_opens_each_turn_is_well(make_config, tiny, tmp_path):
    """ChatML of a model whose BOS is the mark of a turn, as SmolLM2's."""
    turns = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    asks = "{% if add_generation_prompt %}{{ bos_token }}assistant\n{% endif %}"
    folder = template(copied(tiny, tmp_path), turns + asks)
    assert checks_of(make_config(policy__path=str(folder)))["policy tokenizer"].status == "pass"


def test_every_kind_of_conversation_is_tried_and_the_row_named(make_config, tiny, tmp_path):
    """Where the seventh prompt alone has a system message, that policy or reward refuses or loses."""
    user = {"role": "user", "content": "how to bake bread"}
    rows = [[user]] * 6 + [[{"role": "system", "content": "be careful"}, user]] + [[user]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    folders = {part: copied(tiny, tmp_path, part) for part in ("policy", "reward")}
    whole = (folders["reward"] / "chat_template.jinja").read_text()
    refuses = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + whole
    loses = whole.replace("in messages", "in messages if m['role'] != 'system'")
    criterion = {"name": "helpful", "proxy": {"model": str(folders["reward"])}, "operator": "bon(2)"}
    config = make_config(
        prompts=str(tmp_path / "rows.jsonl"), policy__path=str(folders["policy"]), objective__criteria=[criterion]
    )
    for part, source in (("reward", "reward 'helpful'"), ("policy", ".*rows.jsonl")):
        for text, told in (
            (refuses, "refuses messages with the roles system, user"),
            (loses, "leaves out the message"),
        ):
            template(folders[part], text)
            with pytest.raises(ModelError, match=rf"^{source}: prompt 7 .*{told}"):
                make_plan(config, "test.yaml")


@pytest.mark.parametrize(
    ("field", "value"), [("response_template", {"start": "x"}), ("response_schema", {"type": "x"})]
)
def test_rewards_read_whole_answers_whatever_the_tokenizer_would_take_apart(make_config, monkeypatch, field, value):
    """As all that serves: TRL leaves the reasoning out, where a tokenizer tells it how."""
    original = AutoTokenizer.from_pretrained

    def with_parser(*args, **kwargs):
        tokenizer = original(*args, **kwargs)
        setattr(tokenizer, field, value)
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", with_parser)
    with pytest.warns(IamaWarning, match=f"the tokenizer's {field} is not used, .*: rewards read whole answers"):
        plan = make_plan(make_config(), "test.yaml")
    assert getattr(plan.tokenizer, field) is None


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("use_liger_kernel", True, r"trainer\.use_liger_kernel is set, .*pip install liger-kernel"),
        ("model_init_kwargs", {"attn_implementation": "flash_attention_2"}, "'flash_attention_2' cannot be used here"),
        ("model_init_kwargs", {"attn_implementation": "flash_attention_9"}, "'flash_attention_9' cannot be used here"),
    ],
)
@pytest.mark.skipif(importlib.util.find_spec("flash_attn") is not None, reason="flash attention is there")
def test_what_is_not_installed_is_told_before_models_are_loaded(make_config, key, value, told):
    with pytest.raises(ConfigError, match=rf"^test\.yaml: .*{told}"):
        make_plan(make_config(**{f"trainer__{key}": value}), "test.yaml")


def test_an_end_of_turn_in_the_generation_config_counts(make_config, tiny, tmp_path):
    text = "{{ bos_token }}{% for m in messages %}" + TURN + "<|system|>{% endfor %}" + ASKS
    folder = template(copied(tiny, tmp_path), text)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|system|>")]
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": ends}))
    config = make_config(policy__path=str(folder))
    assert stop_ids(make_plan(config, "test.yaml")) == set(ends)
    assert checks_of(config)["policy tokenizer"].status == "pass"


def test_without_a_generation_config_the_models_end_token_counts(make_config, tiny, tmp_path):
    folder = copied(tiny, tmp_path)
    (folder / "generation_config.json").unlink()
    plan = make_plan(make_config(policy__path=str(folder)), "test.yaml")
    loaded = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    assert stop_ids(plan) == {loaded}


def test_texts_for_a_chat_model_warn(make_config, tiny, tmp_path):
    config = make_config(prompts={"path": str(tiny.text_prompts)})
    check = checks_of(config)["prompts"]
    assert check.status == "warn"
    assert "the chat template of" in check.detail
    assert (
        checks_of(make_config(prompts={"path": str(tiny.text_prompts), "system_prompt": "be careful"}))[
            "prompts"
        ].status
        == "pass"
    )
    folder = copied(tiny, tmp_path)
    (folder / "chat_template.jinja").unlink()
    plain = {"prompts": {"path": str(tiny.text_prompts)}, "policy__path": str(folder)}
    assert checks_of(make_config(**plain))["prompts"].status == "pass"


@pytest.mark.parametrize(
    ("num_gpus", "num_started", "world_size", "status", "match"),
    [
        (8, 8, 8, "pass", "H100 x 8"),
        (8, 8, 16, "pass", "H100 x 8"),  # on two machines, under a launcher
        (1, None, 1, "pass", "H100 x 1"),
        (1, 2, 2, "fail", "2 processes on this machine, but 1 GPU"),
        (1, None, 8, "warn", "the run needs 8 GPUs, this machine has 1"),
    ],
)
def test_gpus_for_every_process(num_gpus, num_started, world_size, status, match):
    check = preflight._gpus("H100", num_gpus, num_started, world_size)
    assert check.status == status
    assert match in check.detail
    assert bool(check.remedy) == (status != "pass")


def test_a_template_without_the_bos_that_texts_get(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    assert tokens.begin(tokenizer, "bread", [5, 6]) is None  # this one gives texts none either
    from tokenizers.processors import TemplateProcessing

    special = [("<s>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=special)
    found = tokens.begin(tokenizer, "bread", [5, 6])
    assert found is not None
    assert "texts begin with '<s>', but rendered prompts do not" in found.detail
    assert tokens.begin(tokenizer, "bread", tokenizer("bread")["input_ids"]) is None


def test_a_text_must_come_back_from_its_tokens(tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    assert tokens.round_trip(tokenizer, "how to bake bread") is None
    unknown = tokens.round_trip(tokenizer, "how to ZZZ")
    assert unknown is not None
    assert "are unknown" in unknown.detail
    from tokenizers.normalizers import Replace

    tokenizer.backend_tokenizer.normalizer = Replace("bread", "water")
    changed = tokens.round_trip(tokenizer, "how to bake bread")
    assert changed is not None
    assert "'bread' as 'water'" in changed.detail


def test_a_tokenizer_of_another_model(make_config, tiny, tmp_path):
    """More tokens than the model has embeddings: an index error in the middle of a run."""
    folder = copied(tiny, tmp_path, "reward")
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.resize_token_embeddings(20)
    model.save_pretrained(folder)
    criterion = {"name": "helpful", "proxy": {"model": str(folder)}, "operator": "bon(2)"}
    with pytest.raises(
        ModelError, match=r"^reward 'helpful': 79 token ids lie outside .*, which has 20 rows, e\.g\. 98"
    ):
        make_plan(make_config(objective__criteria=[criterion]), "test.yaml")


def test_a_reward_that_reads_too_little(make_config, tiny, tmp_path):
    folder = copied(tiny, tmp_path, "reward")
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 12}))
    criterion = {"name": "helpful", "proxy": {"model": str(folder)}, "operator": "bon(2)"}
    check = checks_of(make_config(objective__criteria=[criterion]))["reward helpful tokenizer"]
    assert check.status == "warn"
    assert "but it reads at most 12" in check.detail


# ------------------------------------------------------------------ groups, engine, tracking


def test_a_group_smaller_than_the_budget(make_config):
    criteria = [c.model_dump() for c in make_config().objective.criteria]
    with pytest.warns(IamaWarning, match="draws more than"):
        check = checks_of(make_config(objective__criteria=[{**criteria[0], "operator": "bon(8)"}]))["groups"]
    assert check.status == "warn"
    assert check.remedy == "raise trainer.num_generations to 8"
    both = [{**c, "operator": "bon(8)"} for c in criteria]
    with pytest.warns(IamaWarning, match="draws more than"):
        check = checks_of(make_config(objective__criteria=both))["groups"]
    assert check.detail.startswith("100.0% of the draws of 'helpful' and 100.0% of the draws of 'harmless' are of more")
    changed = make_config(objective__criteria=[{**criteria[0], "operator": "bon(8)"}], objective__estimator="tail")
    assert checks_of(changed)["groups"].status == "pass"  # extrapolated, as was asked for


@pytest.mark.parametrize(
    ("config", "compiler", "status", "match"),
    [
        ({"zero_optimization": {"stage": 2}}, None, "pass", "ZeRO-2, nothing is compiled"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, None, "fail", "the block `optimizer`"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, "sh", "warn", "minutes, once"),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}, None, "fail", "to cpu"),
        (
            {
                "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}},
                "zero_force_ds_cpu_optimizer": False,
            },
            None,
            "pass",
            "nothing is compiled",
        ),
    ],
)
def test_deepspeed_needs_a_compiler_only_where_it_compiles(
    make_config, tmp_path, monkeypatch, config, compiler, status, match
):
    auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_clipping"), "auto")
    (tmp_path / "ds.json").write_text(json.dumps(auto | config))
    monkeypatch.setenv("CXX", compiler or "/no/compiler")
    check = checks_of(make_config(trainer__deepspeed=str(tmp_path / "ds.json")))["engine"]
    assert check.status == status
    assert match in check.detail


def test_a_lora_that_does_not_fit(make_config):
    check = checks_of(make_config(lora__target_modules=["nope"]))["LoRA"]
    assert check.status == "fail"
    assert "nope" in check.detail


# ------------------------------------------------------------------ quantization, and the command


def test_four_bits_need_a_gpu(make_config):
    if torch.cuda.is_available():
        pytest.skip("a GPU is there")
    with pytest.raises(ConfigError, match="quantization '4bit' needs a GPU"):
        make_plan(make_config(quantization="4bit"), "test.yaml")
    with pytest.raises(ConfigError, match=r"quantization: .*'4bit'"):
        make_config(quantization="3bit")


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_failing_check_ends_the_command_after_all_lines(raw_config, tiny, tmp_path, num_processes):
    text = "{{ bos_token }}{% for m in messages %}" + TURN + "<|system|>{% endfor %}" + ASKS
    folder = template(copied(tiny, tmp_path), text)
    raw_config["policy"]["path"] = str(folder)
    raw_config["world_size"] = num_processes
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw_config))
    arguments = ["train_iama.py", "--config", tmp_path / "config.yaml", *(["--dry-run"] if num_processes == 1 else [])]
    done = run_python(arguments, num_ranks=num_processes)
    assert done.returncode == 2, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: 1 of")]
    assert error.endswith("checks failed: policy tokenizer; what to do stands in the lines above")
    lines = [line for line in done.stdout.splitlines() if line[:4] in ("pass", "warn", "fail")]
    assert [line for line in lines if line.startswith("fail")] == [next(x for x in lines if "'<|system|>'" in x)]
    assert lines[-1].startswith("pass  disk")
    assert sum(line.startswith("pass  disk") for line in lines) == 1  # the main process alone prints
    assert not (tmp_path / "run").exists()
