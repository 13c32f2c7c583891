from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx2
import openai
import pytest
import yaml
from test_cli import exported, one_line_error  # noqa: F401

from iama.installation import CONFIGS
from tests.inference.report_summary import make_summary
from tests.inference.serving.served import PROCESS_KEY as KEY
from tests.inference.serving.served import process
from tests.processes import free_port

HELLO = [{"role": "user", "content": "how to bake bread"}]


@pytest.fixture
def serving_file(tiny, tmp_path) -> Path:
    path = tmp_path / "serve.yaml"
    config = {
        "policies": {"base": {"path": str(tiny.policy)}},
        "criteria": [{"name": "good", "proxy": {"model": str(tiny.reward)}}],
        "methods": ["bon(4)", "cards(target=1.5)"],
        "sampling": {"max_new_tokens": 12},
    }
    path.write_text(yaml.safe_dump(config))
    return path


def dry(run, *arguments) -> list[str]:
    code, out, err = run("serve", *arguments, "--dry-run")
    assert code == 0, err
    *models, last = out.splitlines()
    assert last.startswith("dry run: all checks passed; to be served: ")
    assert last.endswith(", at http://127.0.0.1:8000")
    return models


def test_a_dry_run_names_every_model_and_loads_none(run, serving_file, monkeypatch):
    monkeypatch.setattr("inference.engine.policy.load_model", None)
    assert dry(run, "--config", serving_file) == ["base:single", "base/good:bon(4)", "base/good:cards(target=1.5)"]
    changed = dry(run, "--config", serving_file, "--set", "criteria.0.methods=[ggro(num_candidates=2)]")
    assert changed == ["base:single", "base/good:ggro(num_candidates=2)"]


def test_flags_say_the_same_as_a_file(run, tiny):
    rewards = ("--reward", f"a={tiny.reward}", "--reward", f"b={tiny.other_reward}")
    assert dry(run, "--policy", tiny.policy, *rewards) == ["policy:single", "policy/a:bon(4)", "policy/b:bon(4)"]
    named = dry(run, "--policy", f"base={tiny.policy}", *rewards[:2], "--method", "bon(2)", "--method", "single")
    assert named == ["base:single", "base/a:bon(2)"]
    assert dry(run, "--policy", tiny.policy) == ["policy:single"]
    two = dry(run, "--policy", f"a={tiny.policy}", "--policy", f"b={tiny.policy}", *rewards[:2])
    assert two == ["a:single", "b:single", "a/a:bon(4)", "b/a:bon(4)"]


def test_an_export_says_what_it_is_served_with(run, exported, tiny, serving_file):  # noqa: F811
    assert dry(run, "--policy", exported) == ["exported:single", "exported/first:bon(3)", "exported/second:bop(2)"]
    other = dry(run, "--policy", exported, "--reward", f"second={tiny.reward}", "--reward", f"third={tiny.reward}")
    assert other == ["exported:single", "exported/second:bop(2)", "exported/third:bon(4)"]
    changes = (f"policies.base.adapter={exported}", "criteria=[]", "methods=null")
    code, out, err = run("serve", "--config", serving_file, *(p for c in changes for p in ("--set", c)), "--dry-run")
    assert code == 0, err
    assert "base/first:bon(3)" in out
    assert "note: criteria as in the iama.json of policy 'base'" in err
    assert "sampling differs from training: max_new_tokens 12 (trained with 6)" in err


def test_a_stranger_s_rewards_run_no_code_unasked(run, exported, serving_file):  # noqa: F811
    manifest = json.loads((exported / "iama.json").read_text())
    manifest["criteria"][0]["reward"] = {"function": "evil.py:score"}
    (exported / "iama.json").write_text(json.dumps(manifest))
    line = one_line_error(run("serve", "--policy", exported, "--dry-run"))
    assert "its code is not run unasked" in line
    second = manifest["criteria"][1]["reward"]["model"]
    remedy = line.partition("so if you trust it, name all: ")[2]
    assert remedy == f"--reward first=evil.py:score --reward second={second}"
    (exported / "evil.py").write_text("def score(prompts, completions, **_):\n    return [0.0] * len(prompts)\n")
    followed = [part.replace("evil.py", str(exported / "evil.py")) for part in remedy.split()]
    assert dry(run, "--policy", exported, *followed)[1:] == ["exported/first:bon(3)", "exported/second:bop(2)"]
    code, _, err = run("serve", "--policy", exported, *followed[:2], "--dry-run")
    assert (code, "note: second of the iama.json of policy 'exported' not served; --reward NAME=DIR" in err) == (
        0,
        True,
    )
    changes = ("--set", f"policies.base.adapter={exported}", "--set", "criteria=[]", "--set", "methods=null")
    line = one_line_error(run("serve", "--config", serving_file, *changes, "--dry-run"))
    assert f"so if you trust it, write all criteria into {serving_file}: first, second" in line
    judge = {"url": "http://localhost:1/v1", "model": "m", "prompt_file": "p.txt"}
    manifest["criteria"][0]["reward"] = {"judge": judge}
    (exported / "iama.json").write_text(json.dumps(manifest))
    line = one_line_error(run("serve", "--policy", exported, "--dry-run"))
    assert line.endswith("so if you trust it, write a file for --config with all criteria: first, second")
    manifest["criteria"][0] |= {"reward": {"model": "x"}, "operator": "evil.py:Sampler()"}
    (exported / "iama.json").write_text(json.dumps(manifest))
    assert "as the operator of 'first', which is none" in one_line_error(
        run("serve", "--policy", exported, "--reward", "first=nowhere", "--dry-run")
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("limit.n=3", "unknown key 'limit'; did you mean 'limits'?"),
        ("host=0.0.0.0", "host '0.0.0.0' lets others ask, and there are no keys"),
        ("host=example.org", "host 'example.org' lets others ask"),
        ("keys=a-secret-that-nobody-sees", "keys: write where they stand"),
        ("keys={}", "give exactly one of `file` and `variable`"),
        ("keys={variable: IAMA_NO_SUCH}", "keys.variable IAMA_NO_SUCH holds no key"),
        ("keys={variable: IAMA_SHORT}", "key 1 of 1 must be at least 16 letters"),
        ("cors=[example.org]", "'example.org' is no origin"),
        ("cors=['*']", "lets every page that is open on this machine ask"),
        ("methods=[bon]", "'bon' has no number of samples here; write bon(4)"),
        ("methods=[cards]", "method 'cards' has no target; write it, or give prompts"),
        ("methods=['bon(8, stop=target(0.9))']", "has no threshold; write it"),
        ("methods=['tilt(1, 1)']", "is what training assumes, not a way to sample"),
        ("methods=[bon(tuned)]", "takes its number from a file of `iama tune`; set `tuning:"),
        ("methods=[bon(2), bon(2)]", "base/good:bon(2) is written twice"),
        ("criteria.0.max_budget=2", "base/good:bon(4) draws 4 samples, and max_budget of 'good' is 2; write at most 2"),
        ("criteria.0.name=a/b", "'a/b' is part of a model's id"),
        ("criteria.0.gold={model: x}", "`gold` judges and is not asked while serving"),
        ("criteria.0.proxy={column: x}", "holds scores of a pool file"),
        ("criteria.0.proxy={verifier: math}", "has no column 'answer'"),
        ("criteria.0.proxy={model: nowhere}", "nowhere"),
        ("policies.base.path=nowhere", "nowhere"),
        ("policies.base.engine=vllm", "engine: vllm is not served"),
        ("sampling.max_new_tokens=5000", "exceeds limits.max_tokens = 4096"),
        ("evaluation=nowhere", "'nowhere' does not exist; run `iama evaluate` first"),
        ("calibration=nowhere.jsonl", "nowhere.jsonl"),
        ("port=70000", "port: Input should be less than or equal to 65535"),
        ("hosts=['https://iama.org/x']", "is no host's name, as a Host header has it; write e.g. iama.org"),
        ("hosts=['*']", "'*' is no host's name"),
        ("criteria.0.methods=[]", "criteria.0.methods: must not be empty"),
        ("policies=dir", "policies: must be keys and values (got 'dir'); write {NAME: {path: dir}}"),
        ("methods=[bon(2), 'bon( 2 )']", "base/good:bon( 2 ) is written twice"),
        ("criteria=[]", "methods: 'bon(4)' selects by a reward, and there is no criterion"),
        ("criteria.0.proxy={verifier: math}", "a request to a server brings no further columns; serve another reward"),
        ("criteria.0.proxy=rm", "criteria.0.proxy: must be keys and values (got 'rm'); write {model: rm}"),
        ("policies.base=dir", "policies.base: must be keys and values (got 'dir'); write {path: dir}"),
        ("criteria={good: {}}", "criteria: must be a list; write a list, each part after a dash, with the key name"),
        ("policies={1: {path: x}}", "policies.1: the name 1 is no text; write '1', in quotes"),
        ("keys={file: nowhere.txt}", "nowhere.txt' does not exist; make one with `openssl rand -hex 24 > nowhere.txt`"),
        ("keys={variable: IAMA_QUOTED}", "key 1 of 1 has quotes or NAME= around it"),
        ("keys={variable: IAMA_NAMED}", "key 1 of 1 has quotes or NAME= around it"),
    ],
)
def test_mistakes_are_told_in_a_line_before_weights_are_read(run, serving_file, monkeypatch, change, said):
    monkeypatch.setattr("inference.engine.policy.load_model", None)
    monkeypatch.setenv("IAMA_SHORT", "short")
    monkeypatch.setenv("IAMA_QUOTED", '"a-secret-of-many-letters"')
    monkeypatch.setenv("IAMA_NAMED", "KEY=a-secret-of-many-letters")
    line = one_line_error(run("serve", "--config", serving_file, "--set", change, "--dry-run"))
    assert said in line
    assert "a-secret" not in line


def test_what_guides_by_a_gradient_needs_a_classifier(run, serving_file, tmp_path):
    code = tmp_path / "mine.py"
    code.write_text("def score(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    changes = ("--set", f"criteria.0.proxy={{function: '{code}:score'}}", "--set", "methods=[ggro(num_candidates=2)]")
    assert "needs the gradient of a reward" in one_line_error(
        run("serve", "--config", serving_file, *changes, "--dry-run")
    )


def test_flags_that_contradict_each_other_are_refused(run, serving_file, tiny):
    both = run("serve", "--config", serving_file, "--policy", tiny.policy)
    assert "--policy and --config" in one_line_error(both)
    assert "give --config FILE, or --policy DIR" in one_line_error(run("serve"))
    assert "write CRITERION=DIR" in one_line_error(run("serve", "--policy", tiny.policy, "--reward", tiny.reward))
    for flag, *value in (("--chat-template", "x.jinja"), ("--trust-remote-code",), ("--method", "bon(2)")):
        assert f"{flag} and --config" in one_line_error(run("serve", "--config", serving_file, flag, *value))
    two = ("--policy", f"a={tiny.policy}", "--policy", f"b={tiny.policy}")
    assert "--adapter belongs to one policy, and --policy names 2" in one_line_error(
        run("serve", *two, "--adapter", "x")
    )
    assert "'a' is served already; name it" in one_line_error(run("serve", *two, "--policy", f"a={tiny.policy}"))
    assert "the name 'my base' is part of a model's id" in one_line_error(
        run("serve", "--policy", f"my base={tiny.policy}")
    )
    alone = run("serve", "--policy", tiny.policy, "--method", "bon(2)", "--dry-run")
    assert "methods: 'bon(2)' selects by a reward, and there is no criterion" in one_line_error(alone)
    open_to_all = run("serve", "--config", serving_file, "--host", "0.0.0.0")
    assert "error: --host: host '0.0.0.0' lets others ask" in one_line_error(open_to_all)


def test_files_of_other_commands_are_known_as_such(run, tmp_path):
    said = {"demo.yaml": "iama train", "demo-evaluate.yaml": "iama evaluate", "demo-serve.yaml": "iama serve"}
    for name, command in said.items():
        for other in {*said.values()} - {command}:
            file = CONFIGS / name
            line = one_line_error(run(*other.split()[1:], "--config", file))
            assert f"{file} is a file for `{command}`, not for `{other}`" in line


@pytest.mark.filterwarnings("default::iama.errors.IamaWarning")
def test_what_is_written_and_not_used_is_warned_of(run, serving_file, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps(make_summary()))
    for change, said in (
        ("criteria.0.tuning=t.json", "criterion 'good': tuning 't.json' is not used; add a method such as bon(tuned)"),
        (f"evaluation={tmp_path}", "measured nothing that is served; its policies are"),
    ):
        code, _, err = run("serve", "--config", serving_file, "--set", change, "--dry-run")
        assert code == 0
        assert said in err


@pytest.mark.filterwarnings("default::iama.errors.IamaWarning")
def test_keys_come_from_a_file_that_others_should_not_read(run, serving_file, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"# of the page\n{KEY}\n\nanother-key-of-many-letters\n")
    keys.chmod(0o644)
    arguments = ("serve", "--config", serving_file, "--set", f"keys.file={keys}", "--host", "0.0.0.0", "--dry-run")
    code, _, err = run(*arguments)
    assert code == 0
    assert "can be read by others on this machine; chmod 600" in err
    keys.chmod(0o600)
    assert run(*arguments)[2] == ""
    assert KEY not in run(*arguments)[1]
    keys.write_text("two words\n")
    assert "must be at least 16" in one_line_error(run(*arguments))


def test_without_the_extra_it_says_what_to_install(run, serving_file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "uvicorn" else object())
    assert "pip install 'iama[serve]'" in one_line_error(run("serve", "--config", serving_file))


def test_a_port_in_use_is_told_before_weights_are_read(run, serving_file, monkeypatch):
    monkeypatch.setattr("inference.engine.policy.load_model", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = one_line_error(run("serve", "--config", serving_file, "--port", port))
    assert f"cannot listen on host '127.0.0.1', port {port} (Address already in use)" in line


@pytest.mark.slow
def test_ctrl_c_ends_it_with_a_line(run, serving_file):
    port, codes = free_port(), []

    def interrupt() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with suppress(httpx2.TransportError):
                codes.append(httpx2.get(f"http://127.0.0.1:{port}/health").status_code)
                break
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code, _, err = run("serve", "--config", serving_file, "--port", port)
    thread.join()
    assert (code, codes) == (130, [200])
    last, end = err.splitlines()[-2:]
    assert last.startswith(
        "serving policy base; criterion good; methods single, bon(4), cards(target=1.5): 3 models, at"
    )
    assert end == "interrupted"


# Processes. -----------------------------------------------------------------------------------------------------------


SLOW = """
import time

def slow(prompts, completions, **columns):
    time.sleep(1.5)
    return [1.0] * len(prompts)
"""


def is_ready(url: str) -> bool:
    answer = httpx2.get(f"{url}/ready", headers={"Authorization": f"Bearer {KEY}"})
    assert answer.status_code in (200, 503)
    return answer.status_code == 200


@pytest.mark.slow
def test_signals_end_a_server_as_they_should(serving_file, tmp_path):
    """SIGTERM lets what runs end and refuses the rest; SIGKILL hurts no later start."""
    port, code = free_port(), tmp_path / "slow.py"
    code.write_text(SLOW)
    changes = ("keys.variable=IAMA_KEYS", f"criteria.0.proxy={{function: '{code}:slow'}}", "methods=[bon(2)]")
    arguments = ("--config", serving_file, *(part for change in changes for part in ("--set", change)))
    with process(tmp_path, port, *arguments) as (server, url, _):
        os.kill(server.pid, signal.SIGKILL)
        server.join(30)
    with process(tmp_path, port, *arguments) as (server, url, err):
        expected = f"serving policy base; criterion good; methods single, bon(2): 2 models, at {url} from this machine"
        assert expected in err.read_text()
        assert httpx2.get(f"{url}/v1/models").status_code == 401
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(client.chat.completions.create, model="base/good", messages=HELLO)
            while "iama_requests_running 1" not in client.get("../metrics", cast_to=str):
                assert not running.done()
            os.kill(server.pid, signal.SIGTERM)
            while is_ready(url):
                assert not running.done()
            assert running.result().choices[0].finish_reason in ("stop", "length")
        server.join(30)
        assert server.exitcode == 0
