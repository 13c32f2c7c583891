"""What messages tell people to write can be written: they name flags of the command at hand, and the wrong prompt."""

from __future__ import annotations

import ast
import json
import re
import warnings
from pathlib import Path

import pytest
import typer
from test_cli import one_line_error
from transformers import AutoTokenizer
from typer.testing import CliRunner

from iama.cli.app import app, in_flags
from iama.cli.evaluate import settings_from_file
from iama.config.schema import validate
from iama.config.specs import PolicySpec
from iama.errors import ConfigError, IamaWarning
from iama.prompts.render import prompt_name

EVALUATION = """\
name: a
output_dir: out
policies: {base: {path: org/name}}
prompts: a.jsonl
criteria: [{name: c, proxy: {model: org/name}}]
"""
ROOT = Path(__file__).parents[3]
COMMANDS = typer.main.get_command(app).commands
FLAG = re.compile(r"(?<![\\w-])--[a-z][a-z-]*[a-z]")
OTHERS = {"--num", "--module", "--config", "--dry-run", "--local", "--nproc", "--head", "--port"}
"""Of training, which other programs start, too, and of the launchers and Ray themselves (up to an underscore)."""


def flags_of(*names: str) -> set[str]:
    known = {flag for name in names for option in COMMANDS[name].params for flag in option.opts}
    return known | {"--help", "--version"}


@pytest.mark.parametrize(
    ("command", "message", "wanted"),
    [
        ("pool", "set policy.chat_template to a .jinja file", "set --chat-template to a .jinja file"),
        ("generate", "set policy.chat_template to a .jinja file", "set --chat-template to a .jinja file"),
        ("evaluate", "set policy.chat_template to a .jinja file", "set policy.chat_template to a .jinja file"),
        ("tune", "lower sampling.max_new_tokens", "lower sampling.max_new_tokens"),
        ("pool", "with sampling.max_new_tokens = 9 it exceeds", "with --max-new-tokens = 9 it exceeds"),
        ("pool", "shorten the prompt, lower sampling.max_new_tokens,", "shorten the prompt, lower --max-new-tokens,"),
        ("pool", "set prompts.split to one of them", "set --split to one of them"),
        ("pool", "name it: prompts.columns: {prompt: THEIR_NAME}", "name it: --column prompt=THEIR_NAME"),
        ("pool", "a.jsonl: prompts.columns.prompt: no column", "a.jsonl: --column prompt: no column"),
        ("pool", "in an evaluation: prompts.too_long: drop", "in an evaluation: prompts.too_long: drop"),
        ("pool", "e.g. with prompts.columns: {my_log: log}", "e.g. with --column my_log=log"),
        ("score", "rename one with prompts.columns", "rename one with `iama pool --column`"),  # its own is another
        ("generate", "rename one with prompts.columns", "rename one with prompts.columns"),
        ("generate", "command line: top_p: too large", "--top-p: too large"),
        ("pool", "command line: stop.1: too short", "--stop: too short"),
        ("score", "--reward: dtype: no such", "--dtype: no such"),
        ("pool", "set `path` to the base and `adapter` to x", "set --policy to the base and --adapter to x"),
        ("score", "set `path` to the base", "set `path` to the base"),
        ("generate", "above 0; write `top_k: 1`", "above 0; write --top-k 1"),
        ("score", "set `pair: true` for pairs", "set `pair: true` in a file for --spec for pairs"),
        ("merge", "set `pair: true` for pairs", "set `pair: true` for pairs"),
    ],
)
def test_a_key_becomes_the_flag_of_a_command_that_has_it(command, message, wanted):
    assert in_flags(message, flags_of(command)) == wanted


@pytest.mark.parametrize("path", sorted((ROOT / "iama/cli").glob("*.py")), ids=lambda path: path.stem)
def test_commands_name_flags_that_they_have(path):
    names = re.findall(r"@app\.command\((?:[^()]|\([^()]*\))*\)\ndef (\w+)", path.read_text())
    known = flags_of(*names) if names else flags_of(*COMMANDS)
    for line in path.read_text().splitlines():
        others = set(re.findall(r"iama (\w+)", line)) & set(COMMANDS)
        assert set(FLAG.findall(line)) <= known | flags_of(*others) | OTHERS, line


@pytest.mark.parametrize("package", ["iama", "inference", "trainers"])
def test_no_message_names_a_page_of_the_documentation(package):
    """What is installed does not have them; docstrings, for readers of the code, may."""
    for path in sorted((ROOT / package).rglob("*.py")):
        tree = ast.parse(path.read_text())
        alone = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in alone]
        named = [text.value for text in texts if isinstance(text.value, str) and re.search(r"\bdocs/", text.value)]
        assert named == [], path


@pytest.mark.parametrize("folder", ["iama", "inference"])
def test_no_message_names_a_flag_that_no_command_has(folder):
    known = flags_of(*COMMANDS) | OTHERS
    for path in (ROOT / folder).rglob("*.py"):
        for line in path.read_text().splitlines():
            if re.search(r"\bf?\"", line):
                assert set(FLAG.findall(line)) <= known, (path.name, line)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS if name != "train")])
def test_every_help_fits_into_80_columns_and_has_an_example(command):
    done = CliRunner().invoke(app, [*command, "--help"], terminal_width=80)
    assert done.exit_code == 0
    assert "Examples: iama " in " ".join(done.output.split())
    assert max(map(len, done.output.splitlines())) <= 80
    assert not re.search(r"\w\.\.\.\n|\N{HORIZONTAL ELLIPSIS}", done.output)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("gpt2", r"write a directory as './gpt2', and a model of the hub as ORG/NAME \(openai-community/gpt2\)"),
        ("my-model", r"as './my-model', and a model of the hub as ORG/NAME \(e.g. "),
        ("~/model", r"--policy: ~ is not expanded here \(got '~/model'\); write '/"),
        ("/no/model", "give a Hugging Face model directory"),
    ],
)
@pytest.mark.parametrize("command", ["generate", "pool"])
def test_a_policy_that_is_not_there(run, tmp_path, command, name, remedy):
    end = ("--prompt", "x", "--method", "single")
    if command == "pool":
        (tmp_path / "p.jsonl").write_text('{"prompt": "x"}')
        end = (tmp_path / "out.jsonl", "--prompts", tmp_path / "p.jsonl", "--n", 1)
    error = one_line_error(run(command, "--policy", name, *end))
    assert f"{name!r} does not exist" in error or name.startswith("~")
    assert re.search(remedy, error)


def test_a_path_that_the_shell_left_is_refused(run):
    error = one_line_error(run("report", "a", "b", "--compare", "--out=~/x.html"))
    assert re.search(r"--out=~/x.html: the shell leaves ~ as it is behind =; write --out /.*x.html", error)
    with pytest.raises(ConfigError, match=r"path: ~ is not expanded here \(got '~/m'\); write '/"):
        validate({"path": "~/m"}, PolicySpec, "a.yaml")


def test_a_stop_string_that_is_written_like_a_stopping_rule(run, tiny):
    command = ("generate", "--policy", tiny.policy, "--prompt", "hello", "--method", "bon", "--n", 8)
    with warnings.catch_warnings():
        warnings.simplefilter("always", IamaWarning)
        told = [" ".join(run(*command, "--stop", text)[2].split()) for text in ("pandora(0.05)", "target")]
    assert "rule write --method 'bon(8, stop=pandora(0.05))'" in told[0]
    assert "stopping rule" not in told[1]


def test_a_backslash_and_an_n_are_no_end_of_a_line(run, tiny, tmp_path):
    asked = ("generate", "--policy", tiny.policy, "--prompt", "bake bread", "--method", "single", "--max-new-tokens", 2)
    with warnings.catch_warnings():
        warnings.simplefilter("always", IamaWarning)
        code, _, err = run(*asked, "--stop", r"\n\n")
    assert code == 0
    assert r"in a shell write --stop $'\n\n' for these" in err
    assert run(*asked, "--stop", "\n")[0] == 0
    (tmp_path / "a.yaml").write_text(EVALUATION + r"sampling: {stop: ['\n']}")
    with pytest.warns(IamaWarning, match=r'a.yaml: stop .* in YAML write "\\n", in double quotes, for these'):
        assert settings_from_file(tmp_path / "a.yaml", []).sampling.stop == (r"\n",)
    (tmp_path / "a.yaml").write_text(EVALUATION + r'sampling: {stop: ["\n"]}')
    assert settings_from_file(tmp_path / "a.yaml", []).sampling.stop == ("\n",)


def test_a_pool_of_messages_names_its_own_flag(run, tiny, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny.policy.iterdir():
        (bare / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tiny.policy)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(bare)
    asked = ("pool", tmp_path / "p.jsonl", "--prompts", tiny.prompts, "--n", 1, "--max-prompts", 1, "--policy", bare)
    assert "set --chat-template to a .jinja file, or use text prompts" in one_line_error(run(*asked))
    (tmp_path / "mine.jinja").write_text(template)
    code, _, err = run(*asked, "--max-new-tokens", 2, "--chat-template", tmp_path / "mine.jinja")
    assert code == 0, err
    refused = one_line_error(
        run("pool", tmp_path / "q.jsonl", "--prompts", tiny.prompts, "--n", 1, "--engine", "openai", "--url", "http://x",
            "--model", "m", "--chat-template", "mine.jinja")
    )  # fmt: skip
    assert "--chat-template 'mine.jinja' has no use with --engine openai" in refused


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (
            "engine: vllm: min_p 0.1; use the transformers engine",
            "--engine vllm: min_p 0.1; use the transformers engine",
        ),
        ("policy 'p': no vLLM; write engine: transformers", "policy 'p': no vLLM; write --engine transformers"),
        ("command line: `vllm` has no use; write engine: vllm", "command line: --vllm has no use; write --engine vllm"),
        ("reward 'r': no vLLM; write engine: transformers", "reward 'r': no vLLM; write engine: transformers"),
    ],
)
def test_the_engine_of_the_policy_is_a_flag_and_that_of_a_reward_a_key(message, told):
    assert in_flags(message, {"--engine", "--spec"}) == told
    assert in_flags(message, {"--spec"}) == message


def test_a_prompt_is_named_by_what_was_asked_last():
    system = {"role": "system", "content": "you are a kind helper " * 9}
    turns = [system, {"role": "user", "content": "bake bread"}, {"role": "assistant", "content": "how?"}]
    assert prompt_name([*turns, {"role": "user", "content": "with flour"}]) == "'with flour'"
    assert (
        prompt_name("same start " * 9 + "other end")
        == "'same start same start same sta ... ame start same start other end'"
    )


def test_the_prompt_that_is_too_long_is_named(run, tiny, tmp_path):
    """By its number and its end, since all begin with the same message."""
    system = {"role": "system", "content": "be careful please " * 3}
    asked = ["bake bread", "tell me how " * 20 + "to fix a bike", "grow tomatoes"]
    rows = [{"prompt": [system, {"role": "user", "content": text}]} for text in asked]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    error = one_line_error(
        run("pool", tmp_path / "p.jsonl", "--prompts", path, "--n", 1, "--policy", tiny.policy, "--max-new-tokens", 64)
    )
    assert re.search(r"prompt 2 \(\.\.\..*fix a bike'\) has \d+ tokens; with --max-new-tokens = 64", error)
