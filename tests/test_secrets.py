"""No secret reaches a screen or a file: planted ones are looked for in whatever the commands print and write."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from iama.config.files import TrainingConfig
from iama.config.schema import validate
from iama.config.serving import Keys
from iama.config.specs import RewardSpec
from iama.errors import ConfigError, IamaError, IamaWarning, without_secrets
from tests.openai_server import OpenAIServer, always
from trainers.run.build import one_line_errors

Run = Callable[..., tuple[int, str, str]]
LOGIN = "http://me:planted-login@127.0.0.1:1/v1"


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-planted-openai\n")
    monkeypatch.setenv("HF_TOKEN", "hf_planted_hub")
    monkeypatch.setenv("JUDGE_OF_MINE", "planted-judge\r\n")


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(lambda body: str(1 + sum(map(ord, str(body["messages"]))) % 10)) as server:
        yield server


@pytest.fixture
def judge(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "judge.txt").write_text("{prompt} {completion}")
    fields = {"model": "m", "prompt_file": str(tmp_path / "judge.txt"), "cache": str(tmp_path / "cache")}
    return {"url": "http://127.0.0.1:1/v1", "api_key_env": "JUDGE_OF_MINE", **fields}


def written(path: Path, raw: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(raw))
    return path


def pool_file(path: Path) -> Path:
    lines: list[dict[str, Any]] = [{"iama_pool": 1, "policy": {"name": "p"}}]
    for prompt in ("fix a bike", "bake bread", "grow tomatoes", "mix flour"):
        lines += [{"prompt": prompt, "text": f"{prompt} {i}", "scores": {"r": i % 3}} for i in range(8)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def assert_clean(folder: Path, *printed: str) -> None:
    for text in printed:
        assert "planted" not in text
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert [path for path in files if b"planted" in path.read_bytes()] == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("see http://me:word@host/v1 and https://word@host", "see http://***@host/v1 and https://***@host"),
        ("http://host/v1?a=1&api_key=word&b=2", "http://host/v1?a=1&api_key=***&b=2"),
        ("--set trainer.x=hf_planted_hub", "--set trainer.x=$HF_TOKEN"),
        ("the key sk-planted-openai is wrong", "the key $OPENAI_API_KEY is wrong"),
        ("ftp://a://b@c@host/v1://d", "ftp://***@host/v1://d"),
        ("mail me@host, 3 @ 4, http://host/a", "mail me@host, 3 @ 4, http://host/a"),
    ],
)
def test_errors_and_warnings_are_without_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == str(IamaError(text)) == str(ConfigError(text)) == str(IamaWarning(text)) == shown


@pytest.mark.parametrize(
    "trainer",
    [{"hub_token": "planted"}, {"vllm_server_base_url": "http://me:planted@host"}, {"run_name": "hf_planted_hub"}],
)
def test_a_training_file_with_a_secret_is_refused(make_raw: dict[str, Any], trainer: dict[str, Any]) -> None:
    make_raw["trainer"] |= trainer
    with pytest.raises(ConfigError, match=r"trainer: \w+ holds a key or a login") as caught:
        validate(make_raw, TrainingConfig, "file.yaml")
    assert "planted" not in str(caught.value)


@pytest.fixture
def make_raw(tiny: Any, tmp_path: Path, judge: dict[str, Any]) -> dict[str, Any]:
    """A training file of two steps whose gold reward is a judge."""
    criterion = {"name": "c", "proxy": {"model": str(tiny.reward)}, "gold": {"judge": judge}, "operator": "bon(2)"}
    trainer = {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4, "learning_rate": 1e-3}
    return {
        "name": "tiny",
        "output_dir": str(tmp_path / "run"),
        "policy": {"path": str(tiny.policy)},
        "prompts": str(tiny.prompts),
        "objective": {"criteria": [criterion]},
        "sampling": {"max_new_tokens": 4},
        "trainer": trainer | {"gradient_checkpointing": False, "save_strategy": "no"},
        "lora": {"r": 4},
    }


def evaluation(make_raw: dict[str, Any], **changes: Any) -> dict[str, Any]:
    criterion = {key: make_raw["objective"]["criteria"][0][key] for key in ("name", "proxy", "gold")}
    raw = {key: make_raw[key] for key in ("name", "prompts", "sampling")} | {"criteria": [criterion]}
    raw |= {"policies": {"base": make_raw["policy"]}, "trained": "base", "references": [], "num_bootstrap": 100}
    return raw | {"budgets": [1, 2], "num_samples": 8, "trained_budget": 2, **changes}


HAVE_CONFIG = ("train", "evaluate", "tune")
HOW = ("in the file", "in the place of the block", "key for its name")
CASES = [*product((*HAVE_CONFIG, "standardise", "score", "generate"), HOW), *product(HAVE_CONFIG, ["by --set"])]


@pytest.mark.parametrize(("command", "how"), [*CASES, ("pool", "in the file"), ("pool", "key for its name")])
def test_a_login_or_a_key_in_a_configuration_is_refused_unseen(
    run: Run, tiny: Any, tmp_path: Path, judge: dict[str, Any], make_raw: dict[str, Any], command: str, how: str
) -> None:
    """By every command that reads a judge, in one line that does not show it, before anything is written."""
    wrong: Any = judge | ({"api_key_env": "sk-planted-key"} if how == "key for its name" else {"url": LOGIN})
    if how == "in the place of the block":
        wrong = LOGIN
    sets: list[Any] = []
    if how == "by --set":
        place = "objective.criteria" if command == "train" else "criteria"
        sets, wrong = ["--set", f"{place}.0.gold.judge.url={LOGIN}"], judge
    make_raw["objective"]["criteria"][0]["gold"] = {"judge": wrong}
    raw = make_raw if command == "train" else evaluation(make_raw, output_dir=str(tmp_path / "evaluated"))
    spec = ("--spec", written(tmp_path / "spec.yaml", {"judge": wrong}))
    config = ("--config", written(tmp_path / "config.yaml", raw))
    pool = pool_file(tmp_path / "pool.jsonl")
    key_env = "sk-planted-key" if how == "key for its name" else "OPENAI_API_KEY"
    server = ("--engine", "openai", "--url", judge["url"] if how == "key for its name" else LOGIN, "--model", "m")
    arguments: dict[str, tuple[Any, ...]] = {
        "train": config,
        "evaluate": config,
        "tune": (*config, "--out", tmp_path / "tuned"),
        "standardise": ("--pool", pool, *spec),
        "score": (pool, "--column", "c", *spec),
        "generate": ("--policy", tiny.policy, "--prompt", "x", "--method", "bon", "--n", 2, *spec),
        "pool": (tmp_path / "out.jsonl", "--prompts", tiny.prompts, "--n", 2, *server, "--api-key-env", key_env),
    }
    code, out, err = run(command, *arguments[command], *sets)
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "planted" not in out + err
    assert not any((tmp_path / name).exists() for name in ("run", "evaluated", "tuned", "out.jsonl", "cache"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::iama.errors.IamaWarning")
def test_no_command_prints_or_writes_a_secret(
    run: Run, server: OpenAIServer, tiny: Any, tmp_path: Path, judge: dict[str, Any], make_raw: dict[str, Any]
) -> None:
    """One small world through all commands, with keys that end in a line end, and then with a server that fails."""
    judge["url"] = server.url
    spec, printed = ("--spec", written(tmp_path / "spec.yaml", {"judge": judge})), []

    def ran(*arguments: Any, fails: bool = False) -> None:
        code, out, err = run(*arguments)
        assert code == (2 if fails else 0), err
        printed.append(out + err)

    config = ("--config", written(tmp_path / "train.yaml", make_raw))
    ran("train", *config, "--dry-run")
    ran("train", *config, "--set", "trainer.run_name=a-run")
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())[0]["command"][-1] == "trainer.run_name=a-run"
    policies = {"base": make_raw["policy"], "iama": make_raw["policy"] | {"adapter": str(adapter)}}
    changes = {"policies": policies, "trained": "iama", "references": ["base"]}
    raw = evaluation(make_raw, output_dir=str(tmp_path / "evaluated"), **changes)
    ran("evaluate", "--config", written(tmp_path / "evaluation.yaml", raw))
    assert (tmp_path / "evaluated" / "report.html").exists()
    ran("export", tmp_path / "run", "--out", tmp_path / "exported")
    ran("generate", "--policy", adapter, "--prompt", "fix a bike", "--method", "bon", "--n", 2, *spec)
    pool, remote = pool_file(tmp_path / "pool.jsonl"), tmp_path / "remote.jsonl"
    asked = ("--prompts", tiny.prompts, "--n", 4, "--engine", "openai", "--url", server.url, "--model", "m")
    ran("pool", remote, *asked)
    ran("score", pool, "--column", "r/gold", *spec)
    ran("standardise", "--pool", pool, *spec)
    ran("tune", "--pool", pool, "--proxy-column", "r", "--gold-column", "r/gold", "--out", tmp_path / "tuned")
    ran("distill", pool, "--column", "r", "--base", tiny.policy, "--out", tmp_path / "distilled", "--max-steps", 3)
    for part in (1, 2):
        ran("pool", tmp_path / f"part-{part}.jsonl", *asked, "--shard", f"{part}/2")
    ran("merge", tmp_path / "merged.jsonl", tmp_path / "part-1.jsonl", tmp_path / "part-2.jsonl")
    ran("recipes")
    assert {"Bearer planted-judge", "Bearer sk-planted-openai"} == set(server.keys)
    server.mood = lambda number, body, good: (401, {"error": f"wrong key: {server.keys[-1]}"})
    ran(
        "score",
        pool,
        "--column",
        "again",
        "--spec",
        written(tmp_path / "other.yaml", {"judge": judge | {"draw": 1}}),
        fails=True,
    )
    ran("pool", tmp_path / "failed.jsonl", *asked, fails=True)
    server.mood = always(500, b"")
    make_raw |= {"output_dir": str(tmp_path / "other")}
    make_raw["objective"]["criteria"][0]["gold"] = {"judge": judge | {"draw": 1, "num_retries": 0}}
    ran("train", "--config", written(tmp_path / "other.yaml", make_raw), fails=True)
    assert_clean(tmp_path, *printed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PGPASSWORD", "planted-a1"),
        ("DB_PASS", "planted-b2"),
        ("IAMA_KEYS", "planted-c3,planted-d4"),
        ("A_KEY1", "planted-e5"),
    ],
)
def test_what_a_variable_with_such_a_name_holds_is_in_no_message(name: str, value: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(name, value)
    for secret in value.split(","):
        assert without_secrets(f"refused {secret} here") == f"refused ${name} here"


@pytest.mark.parametrize(
    "text", ["https://h/x#token=planted", "https://h/x?auth=planted", "Authorization: Bearer planted-planted"]
)
def test_what_looks_like_a_key_is_in_no_message(text: str) -> None:
    assert "planted" not in without_secrets(text)


@pytest.mark.parametrize(
    "settings", ['url="https://me:planted@h/v1"', "api_key=planted", "hub_token=planted", 'password="planted"']
)
def test_a_reward_of_ones_own_gets_no_key_from_a_file(settings: str) -> None:
    with pytest.raises(ValueError, match="hold a key or a login") as caught:
        RewardSpec(kind=f"mine.py:Judge({settings})")
    assert "planted" not in str(caught.value).split("input_value")[0]
    RewardSpec(kind="mine.py:Judge(api_key_env=JUDGE_KEY, keyboard=1)")


@pytest.mark.parametrize("place", ["variable", "file"])
def test_a_servers_key_in_the_place_of_its_place_is_refused(place: str) -> None:
    with pytest.raises(ValueError, match="and not a key itself"):
        Keys.model_validate({place: "abcdefghijklmnop1234zz"})
    Keys(file="secrets/keys.txt")
    Keys(file="a-file-with-a-long-name-1.txt")


def test_the_traceback_that_a_run_keeps_holds_no_secret(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the traceback is in .*error-rank-0.txt"), one_line_errors(folder=tmp_path):
        raise RuntimeError(f"GET {LOGIN} with hf_planted_hub")
    kept = (tmp_path / "error-rank-0.txt").read_text()
    assert "RuntimeError" in kept
    assert "planted" not in kept


def test_an_error_is_told_where_its_traceback_cannot_be_kept(tmp_path: Path) -> None:
    (tmp_path / "error-rank-0.txt").mkdir()
    told = "no step was taken: RuntimeError: boom .*and its traceback is lost"
    with pytest.raises(ConfigError, match=told), one_line_errors("no step was taken", tmp_path):
        raise RuntimeError("boom")
