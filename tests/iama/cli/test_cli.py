from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoTokenizer

import iama.rewards.load
import inference.engine.vllm
from iama.cli import app
from iama.cli.generate import _Asked
from iama.config.files import EvaluationConfig, TrainingConfig
from iama.config.manifest import load_manifest
from iama.config.schema import load_config
from iama.config.specs import Sampling
from iama.prompts.data import read_prompts
from iama.rewards.load import load_reward
from inference.pools.file import read_pool
from tests.openai_server import OpenAIServer


@pytest.fixture
def exported(tiny, tmp_path) -> Path:
    """An exported adapter with its iama.json, as `iama export` writes it."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    from iama.config.manifest import Manifest

    folder = tmp_path / "exported"
    model = LlamaForCausalLM.from_pretrained(tiny.policy)
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(folder)
    criteria = [
        {"name": "first", "operator": "bon(3)", "weight": 1.0, "reward": {"model": str(tiny.reward)}},
        {"name": "second", "operator": "bop(2)", "weight": 1.0, "reward": {"model": str(tiny.other_reward)}},
    ]
    fields = {"base_model": str(tiny.policy), "criteria": criteria, "estimator": "loo", "seed": 0, "versions": {}}
    manifest = Manifest.model_validate(fields | {"sampling": {"max_new_tokens": 6, "temperature": 0.7}})
    (folder / "iama.json").write_text(manifest.model_dump_json())
    return folder


def one_line_error(result: tuple[int, str, str]) -> str:
    code, _, err = result
    assert code == 2
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def _children_seconds() -> float:
    """Of the processor, in processes that have ended: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.slow
def test_help_is_instant_and_imports_no_torch():
    script = (
        "import sys; sys.argv = ['iama', '--help']\n"
        "from iama.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules)"
    )
    times = []
    for _ in range(3):
        start = _children_seconds()
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
        times.append(_children_seconds() - start)
    assert min(times) < 0.5


@pytest.mark.parametrize("command", ["generate", "evaluate", "report", "export", "standardise"])
def test_every_help_has_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Examples: iama {command}" in " ".join(out.split())
    assert command in {c.name or c.callback.__name__ for c in app.registered_commands}


def test_generate_shows_all_candidates_and_marks_the_winner(run, tiny):
    arguments = ("generate", "--policy", tiny.policy, "--reward", tiny.reward, "--method", "bon", "--n", 4)
    code, out, err = run(*arguments, "--max-new-tokens", 6, "--prompt", "how to bake bread")
    assert code == 0, err
    assert "bon(4): 4 candidates" in out
    rows = [line for line in out.splitlines() if "stop" in line or "length" in line]
    assert len(rows) == 4
    rewards = [
        float(row.split()[-1 - row.split()[::-1].index("length" if "length" in row else "stop") - 2]) for row in rows
    ]
    winners = [i for i, row in enumerate(rows) if "*" in row]
    assert winners == [rewards.index(max(rewards))]
    assert "4 reward calls" in out
    assert (
        run(*arguments, "--max-new-tokens", 6, "--prompt", "how to bake bread")[1].splitlines()[:-2]
        == out.splitlines()[:-2]
    )


def test_generate_takes_method_reward_and_sampling_from_the_manifest(run, exported, tiny):
    code, out, err = run("generate", "--policy", exported, "--prompt", "fix a bike")
    assert code == 0, err
    assert "bon(3): 3 candidates" in out
    assert "3 reward calls" in out
    code, out, err = run("generate", "--policy", exported, "--criterion", "second", "--prompt", "fix a bike")
    assert "bop(2)" in out
    code, out, err = run("generate", "--policy", tiny.policy, "--adapter", exported, "--prompt", "fix a bike")
    assert "bon(3): 3 candidates" in out
    code, out, err = run("generate", "--policy", exported, "--method", "bop", "--n", 2, "--prompt", "fix a bike")
    assert "bop(1)" in out


def test_the_system_prompt_of_training_is_served_with(run, exported, tiny, tmp_path, monkeypatch):
    """From iama.json, unless a flag says another; with --plain there are no messages to put it before."""
    manifest = json.loads((exported / "iama.json").read_text())
    (exported / "iama.json").write_text(json.dumps(manifest | {"system_prompt": "be careful"}))
    asked = []
    render = _Asked.by
    monkeypatch.setattr(_Asked, "by", lambda *a: asked.append(render(*a)) or asked[-1])
    command = ("generate", "--policy", exported, "--prompt", "fix a bike")
    user = {"role": "user", "content": "fix a bike"}
    for more, system, told in (
        ([], "be careful", "note: system prompt as in iama.json: 'be careful'"),
        (["--system-prompt", "please"], "please", "differs from training: 'please' (trained with 'be careful')"),
        (["--system-prompt", ""], None, "differs from training: none (trained with 'be careful')"),
    ):
        code, _, err = run(*command, *more)
        assert code == 0, err
        assert told in err
        assert asked.pop() == [*([{"role": "system", "content": system}] if system else []), user]
    code, _, err = run(*command, "--plain")
    assert (code, asked.pop()) == (0, "fix a bike"), err
    assert "--plain gives a text" in one_line_error(run(*command, "--plain", "--system-prompt", "please"))
    pool = ("pool", "--prompts", tiny.prompts, "--policy", exported, "--n", 2, "--max-prompts", 1)
    for name, more, system in (("a", [], "be careful"), ("b", ["--system-prompt", ""], None)):
        code, _, err = run(pool[0], tmp_path / f"{name}.jsonl", *pool[1:], *more)
        assert code == 0, err
        assert read_pool(tmp_path / f"{name}.jsonl").header["system_prompt"] == system


def test_a_reward_that_needs_columns_is_refused_before_the_policy_is_loaded(run, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(inference.engine.vllm, "open_policy", None)
    (tmp_path / "f.py").write_text("def needs(prompts, completions, target):\n    return [0.0] * len(prompts)\n")
    (tmp_path / "v.yaml").write_text("verifier: math\n")
    command = ("generate", "--policy", tiny.policy, "--prompt", "fix a bike", "--method", "bon(2)")
    for reward in (("--reward", f"{tmp_path}/f.py:needs"), ("--spec", tmp_path / "v.yaml")):
        error = one_line_error(run(*command, *reward))
        assert "a prompt on the command line brings no columns" in error
        assert "rename" not in error
    headless = run(*command, "--reward", tiny.two_headed_reward)
    assert "['bad', 'good']" in one_line_error(headless)


def test_a_criterion_s_reward_brings_its_operator(run, exported, tiny):
    command = ("generate", "--policy", exported, "--prompt", "fix a bike", "--reward")
    code, out, err = run(*command, tiny.other_reward)
    assert code == 0, err
    assert "bop(2)" in out
    code, out, err = run(*command, f"{exported / 'length.py'}:length")
    assert "is no criterion's in iama.json; it is served with bon(3), as 'first' is; --criterion chooses" in err


@pytest.mark.parametrize(
    ("operator", "instead"),
    [("entropic(2)", "'soft_bon(16, 0.5)'"), ("entropic(-1)", "single"), ("lstat(-0.5, 1.5)", "single")],
)
def test_an_operator_that_nothing_serves_names_criterion_export_and_method(run, exported, operator, instead):
    raw = json.loads((exported / "iama.json").read_text())
    raw["criteria"][0]["operator"] = operator
    (exported / "iama.json").write_text(json.dumps(raw))
    error = one_line_error(run("generate", "--policy", exported, "--prompt", "fix a bike"))
    assert f"iama.json of '{exported}': 'first' was trained for '{operator}', which is not a way to sample" in error
    assert f"; give --method {instead} (" in error
    method = instead.strip("'")
    code, _, err = run("generate", "--policy", exported, "--prompt", "fix a bike", "--method", method)
    assert code == 0, err


def test_generate_says_where_it_samples_otherwise_than_training(run, exported, tiny):
    command = ("generate", "--policy", exported, "--prompt", "fix a bike")
    code, _, err = run(*command)
    assert code == 0, err
    assert "note:" not in err
    flags = ("--temperature", 0.7, "--top-p", 0.9, "--top-k", 40, "--min-p", 0.05, "--repetition-penalty", 1.1)
    code, _, err = run(*command, *flags, "--stop", "###", "--stop", "bread", "--max-new-tokens", 5)
    assert code == 0, err
    assert [line for line in err.splitlines() if "note" in line] == [
        "note: sampling differs from training: top_p 0.9 (trained with 1.0), top_k 40 (trained with 0), "
        "min_p 0.05 (trained with 0.0), repetition_penalty 1.1 (trained with 1.0), "
        "stop ['###', 'bread'] (trained with []), max_new_tokens 5 (trained with 6)"
    ]
    untrained = ("generate", "--policy", tiny.policy, "--prompt", "fix a bike", "--method", "single")
    code, _, err = run(*untrained, "--top-k", 3, "--max-new-tokens", 5)
    assert code == 0, err
    assert "note:" not in err


def test_a_manifest_without_the_other_settings_means_plain_sampling(exported):
    raw = json.loads((exported / "iama.json").read_text())
    raw["sampling"] = {"temperature": 0.7, "max_new_tokens": 6}
    (exported / "iama.json").write_text(json.dumps(raw))
    assert load_manifest(exported).sampling == Sampling(temperature=0.7, max_new_tokens=6)
    raw["sampling"] |= {"top_p": 0.9, "stop": ["###"]}
    (exported / "iama.json").write_text(json.dumps(raw))
    sampling = load_manifest(exported).sampling
    assert (sampling.top_p, sampling.stop) == (0.9, ("###",))
    assert json.loads(sampling.model_dump_json())["stop"] == ["###"]


def test_generate_plain_text_and_single_sample(run, tiny):
    code, out, err = run(
        "generate",
        "--policy",
        tiny.policy,
        "--method",
        "single",
        "--plain",
        "--max-new-tokens",
        5,
        "--prompt",
        "fix a bike",
    )
    assert code == 0, err
    assert "identity: 1 candidates" in out
    assert "0 reward calls" in out


def test_generate_shows_the_segments_of_cards(run, tiny):
    asked = ["generate", "--policy", tiny.policy, "--prompt", "fix a bike", "--reward", tiny.reward]
    code, out, err = run(*asked, "--method", "cards(max_segment=4)", "--max-new-tokens", 12)
    assert code == 0, err
    assert "cards(target=" in out
    assert "max_segment=4): " in out
    assert "proposals" in out
    spent = [line for line in out.splitlines() if line.startswith("cost")]
    assert [line.split(":")[0] for line in spent] == ["cost of measuring the target", "cost"]
    assert " 16 reward calls" in spent[0]
    code, out, err = run(*asked, "--method", "cards(target=-9)", "--max-new-tokens", 12)
    assert "measuring" not in out
    code, out, err = run(
        *asked, "--method", "cards(target=-9, entropy_threshold=quantile(0.5))", "--max-new-tokens", 12
    )
    assert "cost of measuring the entropy threshold: " in out


@pytest.mark.parametrize(
    ("method", "candidates", "told"),
    [
        ("itp(2, 0.000001)", 5, "fallback: no candidate was accepted; the answer is a plain sample"),
        ("bop(9, cap=2)", 2, "capped: bop(9, cap=2) asked for more than 2 candidates"),
        ("mbr(3, 0.5)", 3, ""),
    ],
)
def test_generate_tells_of_fallbacks_and_caps(run, tiny, method, candidates, told):
    asked = ("generate", "--policy", tiny.policy, "--reward", tiny.reward, "--max-new-tokens", 4, "--prompt", "hi")
    for seed in range(5):
        code, out, err = run(*asked, "--method", method, "--seed", seed)
        assert code == 0, err
        assert f"{method}: {candidates} candidates" in out
        if told in out and ("fallback" in out or "capped" in out) == bool(told):
            return
    pytest.fail(out)


def test_generate_marks_the_nudges_of_ggro(run, tiny):
    asked = ["generate", "--policy", tiny.policy, "--prompt", "fix a bike", "--reward", tiny.reward]
    code, out, err = run(*asked, "--method", "ggro(num_candidates=4, entropy_threshold=0.1)", "--max-new-tokens", 12)
    assert code == 0, err
    assert "begun with a nudge" in out
    assert "nan" not in out


def test_generate_in_half_precision(run, tiny, monkeypatch):
    asked = ["generate", "--policy", tiny.policy, "--prompt", "fix a bike", "--reward", tiny.reward]
    asked += ["--method", "bon", "--n", 2, "--max-new-tokens", 6]
    loaded = []
    for module, name in ((inference.engine.vllm, "load_policy"), (iama.rewards.load, "load_reward")):
        load = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, load=load, **more: loaded.append(load(*args, **more)) or loaded[-1]
        )
    code, _, err = run(*asked, "--dtype", "bfloat16")
    assert code == 0, err
    policy, reward = loaded
    assert policy.model.dtype == reward.classifier.model.dtype == torch.bfloat16
    unknown = one_line_error(run(*asked, "--dtype", "8"))
    assert "--dtype: Input should be 'float32', 'bfloat16' or 'float16' (got '8')" in unknown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "cards(target=1)"], "give --reward DIR"),
        ([], "holds no iama.json"),
        (["--n", 4], "--n 4 needs --method"),
        (["--method", "best", "--n", 4], "method 'best' is not known"),
        (["--method", "cardsharp", "--reward", "./gone"], "method 'cardsharp' is not known"),
        (["--method", "cards(target={)", "--reward", "./gone"], "'{' is no number"),
        (["--method", "cards(goal=1)", "--reward", "./gone"], "unknown key 'goal'"),
        (["--method", "cards(qantile=0.9)"], "unknown key 'qantile'"),
        (["--method", "tilt(1)", "--reward", "./gone"], "not a way to sample"),
        (["--method", "bon"], "--method bon needs --n"),
        (["--method", "bon", "--n", 0], "needs --n"),
        (["--method", "single", "--n", 3], "no use with --method single"),
        (["--method", "bon", "--n", 4], "give --reward DIR"),
        (["--method", "bon", "--n", 4, "--reward", "./gone"], "'./gone' does not exist"),
        (["--method", "bon", "--n", 4, "--reward", "gone.py:f"], "cannot import function 'gone.py:f'"),
        (
            ["--method", "single", "--temperature", 0],
            "--temperature: must be above 0; for the likeliest token always, write --top-k 1",
        ),
        (["--method", "single", "--max-new-tokens", 0], "--max-new-tokens: "),
        (["--method", "single", "--top-p", 1.5], "--top-p: "),
        (["--method", "single", "--top-k", -1], "--top-k: "),
        (["--method", "single", "--min-p", 1], "--min-p: "),
        (["--method", "single", "--repetition-penalty", 0.001], "--repetition-penalty: "),
        (["--method", "single", "--stop", "x", "--stop", ""], "--stop: "),
        (["--method", "bon", "--n", 4, "--reward", "gold.py"], "name the function in it: --reward gold.py:NAME"),
        (["--method", "bon", "--n", 4, "--reward", "~/rm"], "--reward: model: ~ is not expanded here (got '~/rm')"),
        (["--method", "single", "--chat-template", "gone.jinja"], "chat_template 'gone.jinja' does not exist"),
        (["--method", "single", "--head", "x"], "give --reward DIR as well"),
        (["--method", "single", "--criterion", "x"], "needs an iama.json"),
        (["--method", "single", "--max-new-tokens", 500], "with --max-new-tokens = 500 it exceeds the 128 tokens"),
    ],
)
def test_generate_refuses_in_one_line(run, tiny, arguments, message):
    result = run("generate", "--policy", tiny.policy, "--prompt", "fix a bike", *arguments)
    assert message in one_line_error(result)


def test_generate_names_what_it_cannot_find(run, tiny, exported):
    assert "'./gone' does not exist" in one_line_error(
        run("generate", "--policy", "./gone", "--method", "single", "--prompt", "hello")
    )
    assert "'/gone' does not exist" in one_line_error(run("generate", "--policy", "/gone", "--prompt", "hello"))
    two = run(
        "generate",
        "--policy",
        tiny.policy,
        "--reward",
        tiny.two_headed_reward,
        "--method",
        "bon",
        "--n",
        2,
        "--prompt",
        "x",
    )
    assert "['bad', 'good']" in one_line_error(two)
    unknown = run("generate", "--policy", exported, "--criterion", "third", "--prompt", "x")
    assert "choose one of first, second" in one_line_error(unknown)


def test_a_function_named_in_the_manifest_is_not_run_unasked(run, exported, tmp_path):
    """A model folder from elsewhere must not be able to run code."""
    marker, file = tmp_path / "ran", tmp_path / "evil.py"
    file.write_text(f"open({str(marker)!r}, 'w')\ndef f(prompts, completions, **_): return [1.0] * len(prompts)\n")
    manifest = json.loads((exported / "iama.json").read_text())
    manifest["criteria"][0]["reward"] = {"function": f"{file}:f"}
    (exported / "iama.json").write_text(json.dumps(manifest))
    for more in ([], ["--method", "bon", "--n", 2], ["--method", "single"]):
        error = one_line_error(run("generate", "--policy", exported, "--prompt", "fix a bike", *more))
        assert "'first'" in error
        assert f"repeat it with --reward {file}:f" in error
    assert not marker.exists()
    code, out, err = run("generate", "--policy", exported, "--prompt", "fix a bike", "--criterion", "second")
    assert code == 0, err
    assert not marker.exists()
    code, out, err = run("generate", "--policy", exported, "--prompt", "fix a bike", "--reward", f"{file}:f")
    assert code == 0, err
    assert "bon(3): 3 candidates" in out
    assert marker.exists()


@pytest.mark.parametrize("is_member", [False, True])
@pytest.mark.parametrize(
    "kind", ["subprocess:check_call(args=touch {marker}, shell=true)", "{file}:Evil", " {file}:Evil()"]
)
def test_a_kind_named_in_the_manifest_is_not_run_unasked(run, exported, tmp_path, kind, is_member):
    marker, file = tmp_path / "ran", evil_file(tmp_path)
    manifest = json.loads((exported / "iama.json").read_text())
    reward = {"kind": kind.format(marker=marker, file=file)}
    scale = {"mean": 0, "std": 1}
    members = [manifest["criteria"][0]["reward"] | {"scale": scale}, reward | {"scale": scale}]
    manifest["criteria"][0]["reward"] = {"ensemble": {"members": members}} if is_member else reward
    (exported / "iama.json").write_text(json.dumps(manifest))
    for more in ([], ["--method", "bon", "--n", 2], ["--method", "single"]):
        error = one_line_error(run("generate", "--policy", exported, "--prompt", "fix a bike", *more))
        assert f"iama.json names the kind {reward['kind']!r} as the reward of 'first'" in error
        assert "--spec FILE" in error
    assert not marker.exists()


@pytest.mark.parametrize("is_member", [False, True])
def test_a_judge_named_in_the_manifest_is_sent_nothing_unasked(run, exported, tmp_path, monkeypatch, is_member):
    """A model folder from elsewhere must not have one of the user's variables sent to its author's server."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "planted-secret")
    (tmp_path / "judge.txt").write_text("{prompt} {completion}")
    with OpenAIServer(lambda body: "8") as server:
        judge = {"url": server.url, "model": "m", "api_key_env": "AWS_SECRET_ACCESS_KEY"}
        judge |= {"prompt_file": str(tmp_path / "judge.txt"), "cache": str(tmp_path / "cache")}
        reward, scale = {"judge": judge}, {"mean": 0, "std": 1}
        manifest = json.loads((exported / "iama.json").read_text())
        members = [manifest["criteria"][0]["reward"] | {"scale": scale}, reward | {"scale": scale}]
        manifest["criteria"][0]["reward"] = {"ensemble": {"members": members}} if is_member else reward
        (exported / "iama.json").write_text(json.dumps(manifest))
        for more in ([], ["--method", "bon", "--n", 2], ["--method", "single"]):
            error = one_line_error(run("generate", "--policy", exported, "--prompt", "fix a bike", *more))
            assert f"iama.json names the judge 'm' at '{server.url}' as the reward of 'first'" in error
            assert "AWS_SECRET_ACCESS_KEY are not sent there unasked, so if you trust it, give the reward with" in error
        assert server.num_requests == 0
        (tmp_path / "spec.yaml").write_text(json.dumps(manifest["criteria"][0]["reward"]))
        asked = ("generate", "--policy", exported, "--prompt", "fix a bike", "--spec", tmp_path / "spec.yaml")
        code, _, err = run(*asked, "--method", "bon", "--n", 2)
        assert code == 0, err
        assert set(server.keys) == {"Bearer planted-secret"}


@pytest.mark.parametrize(
    "operator", ["{file}:Evil", "{file}:Evil(a=1)", "mbr(8, 0.5, utility={file}:Evil)", "cards(target=1)"]
)
def test_a_method_that_is_no_operator_in_the_manifest_is_not_served(run, exported, tmp_path, operator):
    file = evil_file(tmp_path)
    manifest = json.loads((exported / "iama.json").read_text())
    manifest["criteria"][0]["operator"] = operator.format(file=file)
    (exported / "iama.json").write_text(json.dumps(manifest))
    error = one_line_error(run("generate", "--policy", exported, "--prompt", "fix a bike"))
    assert f"iama.json names {operator.format(file=file)!r} as the operator of 'first'" in error
    assert "--method" in error
    assert not (tmp_path / "ran").exists()


def evil_file(folder: Path) -> Path:
    """A file that leaves `ran` beside itself when it is run."""
    file = folder / "evil.py"
    file.write_text(f"open({str(folder / 'ran')!r}, 'w')\nEvil = None\n")
    return file


def example_of(run, command: str) -> list[str]:
    _, out, _ = run(command, "--help")
    first = out.split("Examples:\n  ")[1].replace("\\\n", " ").splitlines()[0]  # as it is pasted
    return shlex.split(first)


def test_help_examples_name_what_the_demo_makes(run):
    """The demo's evaluation file names the demo's folders; the examples name the same."""
    root = Path(__file__).parents[3]
    evaluation = example_of(run, "evaluate")
    settings = [evaluation[i + 1] for i, word in enumerate(evaluation) if word == "--set"]
    path = root / evaluation[evaluation.index("--config") + 1]
    config = load_config(path, EvaluationConfig)
    # Another configuration needs a folder of its own.
    assert load_config(path, EvaluationConfig, settings).output_dir != config.output_dir
    generation = example_of(run, "generate")
    flags = dict(zip(generation[2::2], generation[3::2], strict=True))
    assert flags["--policy"] == config.policies["base"].path
    assert flags["--reward"] == config.criteria[0].proxy.model
    assert config.policies["iama"].adapter == f"{example_of(run, 'export')[2]}/adapter"
    assert example_of(run, "report") == ["iama", "report", config.output_dir, "--open"]


@pytest.fixture
def config_file(tiny, tmp_path) -> Path:
    path = tmp_path / "evaluate.yaml"
    config = {
        "name": "tiny",
        "output_dir": str(tmp_path / "evaluation"),
        "policies": {"base": {"path": str(tiny.policy)}, "iama": {"path": str(tiny.policy)}},
        "prompts": str(tiny.prompts),
        "criteria": [{"name": "c", "proxy": {"model": str(tiny.reward)}, "gold": {"model": str(tiny.other_reward)}}],
        "budgets": [1, 2],
        "num_samples": 8,
        "trained_budget": 2,
        "sampling": {"max_new_tokens": 6},
        "num_bootstrap": 100,
    }
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def test_evaluate_dry_run_does_nothing(run, config_file, tmp_path):
    code, out, err = run("evaluate", "--config", config_file, "--set", "num_samples=16", "--dry-run")
    assert code == 0, err
    assert "2 policies (base, iama) x 4 prompts, " in out
    assert "2 pools of 64 responses, 128 in all, " in out
    assert not (tmp_path / "evaluation").exists()


def test_evaluate_says_which_policy_is_sampled_otherwise_than_trained(run, config_file, exported):
    settings = ("--config", config_file, "--dry-run", "--set", f"policies.iama.adapter={exported}")
    code, _, err = run("evaluate", *settings)
    assert code == 0, err
    assert [line for line in err.splitlines() if "note" in line] == [
        "note: policy 'iama': sampling differs from training: temperature 1.0 (trained with 0.7)"
    ]
    code, _, err = run("evaluate", *settings, "--set", "sampling.temperature=0.7")
    assert code == 0, err
    assert "note:" not in err


def test_evaluate_and_report(run, config_file, tmp_path):
    code, out, err = run("evaluate", "--config", config_file)
    assert code == 0, err
    folder = tmp_path / "evaluation"
    assert f"report: {folder / 'report.html'}" in out
    last = out.strip().splitlines()[-1]
    assert last.startswith("No saving: with 2 samples, the trained model is only as good on")
    (folder / "report.html").unlink()
    code, out, err = run("report", folder)
    assert code == 0, err
    assert (folder / "report.html").is_file()
    assert out.strip().splitlines()[-1] == last


def test_evaluate_refuses_in_one_line(run, config_file, tmp_path):
    assert "did you mean 'num_samples'" in one_line_error(
        run("evaluate", "--config", config_file, "--set", "num_sample=4")
    )
    assert "'gone.yaml' does not exist" in one_line_error(run("evaluate", "--config", "gone.yaml"))
    assert "iama evaluate" in one_line_error(run("report", tmp_path))


def test_evaluate_dry_run_checks_the_rewards(run, config_file, tmp_path):
    for role in ("proxy", "gold"):
        result = run("evaluate", "--config", config_file, "--set", f"criteria.0.{role}.model=./gone", "--dry-run")
        assert f"reward 'c ({role})': model directory './gone' does not exist" in one_line_error(result)


@pytest.mark.parametrize("empty", ["policies={}", "methods=[]", "budgets=[]"])
def test_evaluate_refuses_an_empty_plan(run, config_file, empty):
    assert empty.split("=")[0] in one_line_error(run("evaluate", "--config", config_file, "--set", empty, "--dry-run"))


@pytest.mark.parametrize("merge", [[], ["--merge"]])
def test_export_records_the_name_of_the_base(run, exported, tiny, tmp_path, merge):
    finished = tmp_path / "run"
    finished.mkdir()
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    tokenizer.save_pretrained(exported)
    exported.rename(finished / "adapter")
    for name, more in ((str(tiny.policy), []), ("org/base", ["--base-model", "org/base"])):
        out = tmp_path / f"out-{len(more)}"
        code, _, err = run("export", finished, "--out", out, *merge, *more)
        assert code == 0, err
        assert json.loads((out / "iama.json").read_text())["base_model"] == name
        if not merge:
            assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == name
    code, told, _ = run("export", finished, "--out", tmp_path / "told", "--json")
    assert code == 0
    assert json.loads(told).items() >= {"exported": str(tmp_path / "told"), "pushed": None}.items()


@pytest.fixture
def training_file(tiny, tmp_path) -> Path:
    raw = {
        "name": "tiny",
        "output_dir": str(tmp_path / "run"),
        "policy": {"path": str(tiny.policy)},
        "prompts": str(tiny.prompts),
        "objective": {"criteria": [{"name": "c", "proxy": {"model": str(tiny.reward)}}]},
        "sampling": {"max_new_tokens": 8},
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def test_standardise_prints_a_scale_that_standardises(run, training_file):
    command = ("standardise", "--config", training_file, "--num-prompts", 4, "--num-samples", 16)
    code, out, _ = run(*command)
    assert code == 0
    override = shlex.split(out.splitlines()[1])[1]
    config = load_config(training_file, TrainingConfig, [override])
    scale = config.objective.criteria[0].proxy.scale
    proxy = config.objective.criteria[0].proxy
    prompts = [row["prompt"] for row in read_prompts(config.prompts)]
    raw = load_reward("c", proxy.model_copy(update={"scale": None})).score(prompts, ["bread"] * 4, {})[0]
    scaled = load_reward("c", proxy).score(prompts, ["bread"] * 4, {})[0]
    assert scaled == pytest.approx([(x - scale.mean) / scale.std for x in raw])
    assert run(*command)[1] == out


def test_standardise_refuses_in_one_line(run, training_file):
    result = run("standardise", "--config", training_file, "--set", "trainer.max_completion_length=8")
    assert "write `sampling.max_new_tokens` instead" in one_line_error(result)


def test_export_refuses_what_is_no_run(run, tmp_path):
    assert "holds no finished run" in one_line_error(run("export", tmp_path, "--out", tmp_path / "out"))
