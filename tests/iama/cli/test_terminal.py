"""What a person sees at a terminal: help in groups, examples first, one line for a mistake, tables of 80 columns."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from terminal import COLUMNS, at_a_terminal, in_pipes
from typer.testing import CliRunner

from iama import __version__
from iama.cli.app import FIVE_THINGS, app
from iama.cli.options import COMMANDS, PANELS
from iama.help import parts_of, pasted
from inference.evaluation.summary import save_summary
from tests.inference.report_summary import make_summary
from trainers.run.train import app as train_app

ROOT = Path(__file__).parents[3]
CLI = typer.main.get_command(app)


def help_of(*arguments: str) -> str:
    return CliRunner().invoke(app, [*arguments, "--help"], prog_name="iama", terminal_width=COLUMNS).output


def test_without_a_command_stand_five_things_that_people_do(run):
    code, out, err = run()
    assert (code, out, err) == (0, FIVE_THINGS + "\n", "")
    things = [line.split("  iama ")[1] for line in out.splitlines() if "  iama " in line]
    assert len(things) == 5
    assert max(map(len, out.splitlines())) <= COLUMNS
    for thing in things:
        name, *words = shlex.split(thing)
        flags = {flag for option in CLI.commands[name].params for flag in option.opts}
        if name == "train":  # whose options are read by the command behind it
            flags = {flag for option in typer.main.get_command(train_app).params for flag in option.opts}
        assert {word for word in words if word.startswith("--")} <= flags, thing


def test_the_version_and_the_short_flag_of_help(run):
    assert run("--version") == (0, f"iama {__version__}\n", "")
    runner = CliRunner()
    for command in ([], ["generate"], ["report"]):
        asked = [runner.invoke(app, [*command, flag], prog_name="iama") for flag in ("-h", "--help")]
        assert [result.exit_code for result in asked] == [0, 0]
        assert asked[0].output == asked[1].output
    assert runner.invoke(train_app, ["-h"]).exit_code == 0


def test_commands_stand_in_groups_in_order():
    text = help_of()
    places = [text.index(f"\n{group}:\n") for group in COMMANDS]
    assert places == sorted(places)
    assert all(f"\n  {name} " in text for name in CLI.commands)
    assert "Placeholder" not in text
    assert text.index("Examples:") < places[0]


@pytest.mark.parametrize("command", sorted(set(CLI.commands) - {"train"}))
def test_help_begins_with_examples_and_groups_options(command):
    text = help_of(command)
    groups = re.findall(r"^(\S.*):$", text, flags=re.MULTILINE)
    assert groups[0] == "Examples"
    own = [group for group in groups[1:] if group not in ("Arguments", "Options")]
    assert own == [group for group in dict.fromkeys(PANELS.values()) if group in own]  # in one order everywhere
    options = [p for p in CLI.commands[command].params if p.param_type_name == "option" and p.name != "help"]
    assert {option.name for option in options} <= set(PANELS)
    for option in options:
        assert text.count(f"\n  {option.opts[0]} ") == 1, option.name


def test_every_group_holds_options_that_there_are():
    known = {option.name for command in CLI.commands.values() for option in command.params}
    assert set(PANELS) <= known


@pytest.mark.parametrize("command", [None, *sorted(CLI.commands)])
def test_examples_can_be_pasted(command):
    shown = CLI if command is None else CLI.commands[command]
    for example in parts_of(shown.help or "")[0]:
        lines = pasted(example, COLUMNS - 2)
        assert max(map(len, lines)) <= COLUMNS - 2
        assert shlex.split("".join(line.removesuffix("\\") for line in lines)) == shlex.split(example)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["evalute"], "iama has no command 'evalute'; did you mean 'evaluate'?"),
        (["xyzzy"], "iama has no command 'xyzzy'; 'iama --help' lists them"),
        (["--verison"], "iama has no option '--verison'; did you mean '--version'?"),
        (["generate", "--polcy", "x"], "iama generate has no option '--polcy'; did you mean '--policy'?"),
        (["generate", "--policy", "x"], "iama generate needs --prompt; see iama generate --help"),
        (["pool", "--n", "2"], "iama pool needs the argument OUT; see iama pool --help"),
        (["merge", "a"], "iama merge needs the argument POOL...; see iama merge --help"),
        (["pool", "a", "--n", "two"], "iama pool: invalid value for '--n': "),
        (["recipes", "a", "b"], "iama recipes: got unexpected extra argument"),
        (["recipes", "qwen"], "no recipe has the name 'qwen'; did you mean 'qwen-1.5b-24gb'"),
    ],
)
def test_a_wrong_word_is_one_line_with_the_nearest(run, arguments, told):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {told}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("methods=[bom]", "method 'bom' is not known; did you mean 'bon'? write one of"),
        ("methods=['crads(target=1)']", "did you mean 'cards(target=1)'?"),
        ("policies.base.engine=vlm", "Input should be 'transformers' or 'vllm' (got 'vlm'); did you mean 'vllm'?"),
        ("trained=imaa", "trained names 'imaa', which is no policy; did you mean 'iama'?"),
        ("prompts.max_promts=2", "unknown key 'prompts.max_promts'; did you mean 'max_prompts'?"),
    ],
)
def test_a_wrong_name_in_a_configuration_is_told_with_the_nearest(run, override, told):
    code, _, err = run("evaluate", "--config", ROOT / "configs/demo-evaluate.yaml", "--dry-run", "--set", override)
    assert code == 2
    assert told in err
    assert err.count("\n") == 1


# At a terminal of 80 columns, in processes of their own. --------------------------------------------------


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an evaluation's summary."""
    folder = tmp_path_factory.mktemp("evaluation")
    save_summary(folder, make_summary())
    return folder


def test_an_answer_for_scripts(tiny, run):
    code, out, err = run(
        "generate",
        "--policy",
        tiny.policy,
        "--prompt",
        "bake bread",
        "--max-new-tokens",
        6,
        "--method",
        "single",
        "--json",
    )
    assert code == 0, err
    assert json.loads(out)["candidates"][0]["text"] == json.loads(out)["text"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["doctor", "recipes", "report", "generate", ""])
def test_tables_fit_a_terminal(command, evaluation, tiny):
    own = {
        "report": [evaluation],
        "generate": [
            "--policy",
            tiny.policy,
            "--reward",
            tiny.reward,
            "--method",
            "bon(3)",
            "--prompt",
            "bake bread",
            "--max-new-tokens",
            6,
        ],
    }
    code, lines = at_a_terminal(*filter(None, [command]), *own.get(command, []))
    assert code == 0, lines
    assert len(lines) > 5
    wide = [line for line in lines if len(line) > COLUMNS and str(evaluation) not in line]
    assert not wide, wide
    assert not any("\N{HORIZONTAL ELLIPSIS}" in line for line in lines)


@pytest.mark.slow
def test_json_is_all_that_stands_on_stdout(evaluation):
    done = in_pipes("report", evaluation, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["format"], told["command"]) == (1, "report")
    assert Path(told["summary_file"]).is_file()
    assert Path(told["report"]).is_file()
    assert {"headline", "risks", "savings", "recommendations"} <= told.keys()


@pytest.mark.slow
def test_json_of_a_mistake_is_nothing_on_stdout():
    done = in_pipes("report", "gone", "--json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")


def test_recipes_for_scripts(run):
    told = json.loads(run("recipes", "--json")[1])
    assert set(told) == {"format", "iama", "command", "recipes", "deepspeed"}
    assert told["recipes"]["qwen-1.5b-24gb"]["num_gpus"] == 1
    assert all(Path(recipe["path"]).is_file() for recipe in told["recipes"].values())
    assert "--json lists all recipes" in run("recipes", "cards-3b", "--json")[2]


def test_the_page_for_scripts_names_every_command_that_has_json():
    page = (ROOT / "docs/reference/json.md").read_text()
    have = {name for name, c in CLI.commands.items() if any("--json" in option.opts for option in c.params)}
    rows = re.findall(r"^\| (`\w+`.*?) \|", page, flags=re.MULTILINE)
    told = {name for row in rows for name in re.findall(r"`(\w+)[` ]", row)} & set(CLI.commands)
    assert told == have
