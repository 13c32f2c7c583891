"""Reward functions of every shape: what TRL takes works, anything else is one line that says what to return."""

from __future__ import annotations

import math
import sys
from fractions import Fraction
from pathlib import Path

import pytest

from iama.config.specs import RewardSpec
from iama.cost import Cost
from iama.errors import IamaWarning, RewardError
from iama.rewards.load import check_columns, load_reward
from iama.rewards.reward import Reward, Scorer

PROMPTS = ["a", "b", "c", "d"]
TEXTS = ["x", "yy", "zzz zzz zzz zzz zzz zzz", "w"]

FILE = """
import asyncio, decimal, fractions, functools
import numpy as np
import pandas as pd
import torch

def lengths(completions):
    return [float(len(text)) for text in completions]

async def asynchronous(prompts, completions, **columns):
    await asyncio.sleep(0)
    return lengths(completions)

class Async:
    def __init__(self):
        self.lock = asyncio.Lock()
    async def __call__(self, prompts, completions, **columns):
        async with self.lock:  # of one loop: a second call must find the same
            await asyncio.sleep(0)
            return lengths(completions)

class Plain:
    def __call__(self, prompts, completions, **columns):
        return lengths(completions)
    def method(self, completions, **columns):
        return lengths(completions)

class Module(torch.nn.Module):
    def forward(self, **inputs):
        return 1

async_object, async_partial, an_object = Async(), functools.partial(asynchronous, more=1), Plain()
partial, method, module = functools.partial(Plain(), more=1), Plain().method, Module()
no_columns = lambda prompts, completions: lengths(completions)
only_completions = lambda completions: lengths(completions)
optional = lambda completions, completion_ids=None, trainer_state=None, **_: lengths(completions)
loggers = lambda completions, log_extra, log_metric: log_extra("a", [1]) or log_metric("b", 1.0) or lengths(completions)
tensor = lambda completions, **_: torch.tensor([len(t) for t in completions])
column = lambda completions, **_: torch.tensor([[float(len(t))] for t in completions])
grad = lambda completions, **_: torch.tensor(lengths(completions), requires_grad=True)
bf16 = lambda completions, **_: torch.tensor(lengths(completions), dtype=torch.bfloat16)
array = lambda completions, **_: np.array(lengths(completions), dtype=np.float16)
array_column = lambda completions, **_: np.array(lengths(completions))[:, None]
scalars = lambda completions, **_: [torch.tensor(float(len(t))) for t in completions]
numpy_scalars = lambda completions, **_: [np.float32(len(t)) for t in completions]
fractions_ = lambda completions, **_: [fractions.Fraction(len(t)) for t in completions]
decimals = lambda completions, **_: [decimal.Decimal(len(t)) for t in completions]
tensors = lambda completions, **_: [torch.tensor([[float(len(t))]]) for t in completions]
series = lambda completions, **_: pd.Series(lengths(completions), index=[7, 5, 3, 1])
a_tuple = lambda completions, **_: tuple(lengths(completions))
generator = lambda completions, **_: (float(len(t)) for t in completions)
mapped = lambda completions, **_: map(len, completions)
booleans = lambda completions, **_: [len(t) > 20 for t in completions]
numpy_booleans = lambda completions, **_: np.array([len(t) > 20 for t in completions])
holes = lambda completions, **_: [None, float("nan"), np.float64("nan"), 1]

scalar = lambda completions, **_: 1.0
one = lambda completions, **_: [1.0]
nothing = lambda completions, **_: None
heads = lambda completions, **_: torch.zeros(len(completions), 2)
zero_dimensional = lambda completions, **_: torch.tensor(1.0)
strings = lambda completions, **_: ["1.0"] * len(completions)
text = lambda completions, **_: "1234"
dicts = lambda completions, **_: [{"score": 1.0} for t in completions]
one_dict = lambda completions, **_: {"score": lengths(completions)}
by_index = lambda completions, **_: {i: 1.0 for i in range(len(completions))}
pair = lambda completions, **_: (lengths(completions), ["note"])
nested = lambda completions, **_: [[1.0] for t in completions]
a_set = lambda completions, **_: {1.0, 2.0, 3.0, 4.0}
complex_ = lambda completions, **_: [1j] * 4
signalling = lambda completions, **_: [decimal.Decimal("sNaN")] * 4
frame = lambda completions, **_: pd.DataFrame({"score": lengths(completions)})
async def cancelled(completions, **_):
    raise asyncio.CancelledError("too slow")
async def cancels_itself(completions, **_):
    asyncio.current_task().cancel()
def closes(completions, **_):
    raise GeneratorExit("done")
def several(completions, **_):
    raise BaseExceptionGroup("many", [asyncio.CancelledError(), SystemExit(3)])
huge = lambda completions, **_: [10**400] * 4
async def async_generator(completions, **_):
    yield 1.0
def endless(completions, **_):
    while True:
        yield 1.0

def changes(prompts, completions, topic, **_):
    completions[0][0]["content"] += " more"
    prompts[0].append(completions[0][0])
    topic[0]["name"] = "other"
    completions.clear(), prompts.clear()
    return [1.0] * 4
def raises(completions, **_):
    return [1 / 0 for t in completions]
def fails_late(completions, **_):
    yield 1.0
    raise RuntimeError("first line\\nsecond line")
def key_error(completions, **columns):
    return columns["target"]
def no_ids(completions, **columns):
    return columns["completion_ids"]
def exits(completions, **_):
    raise SystemExit("stop here")
async def async_exits(completions, **_):
    raise SystemExit("stop here")
needs_ids = lambda completions, completion_ids, **_: [1.0] * 4
needs_state = lambda completions, trainer_state, **_: [1.0] * 4
def by_position(prompts, completions, /):
    return [1.0] * 4
"""
LENGTHS = [1.0, 2.0, 23.0, 1.0]
OVER_20 = [0.0, 0.0, 1.0, 0.0]


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("functions") / "rewards.py"
    path.write_text(FILE)
    return path


def load(path: Path, name: str, *, missing_ok: bool = False) -> Reward:
    return load_reward("r", RewardSpec(function=f"{path}:{name}"), missing_ok=missing_ok)


WORK = (
    "asynchronous async_object async_partial an_object partial method no_columns only_completions optional loggers "
    "tensor column grad bf16 array array_column scalars numpy_scalars fractions_ decimals tensors series a_tuple "
    "generator mapped"
)


@pytest.mark.parametrize("name", WORK.split())
def test_what_trl_takes_works(file, name):
    reward = load(file, name)
    for _ in range(2):
        assert reward.score(PROMPTS, TEXTS, {"topic": ["t"] * 4})[0] == LENGTHS


@pytest.mark.parametrize("name", ["booleans", "numpy_booleans"])
def test_booleans_are_one_and_zero(file, name):
    assert load(file, name).score(PROMPTS, TEXTS, {})[0] == OVER_20


def test_none_and_nan_are_missing_scores(file):
    scores, _ = load(file, "holes", missing_ok=True).score(PROMPTS, TEXTS, {})
    assert [math.isnan(score) for score in scores] == [True, True, True, False]


LIST = "; return a list of 4 numbers \\(or None\\), one for each completion in their order$"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("scalar", r"returned a float \(1\.0\)" + LIST),
        ("one", "returned a list of 1 for 4 completions" + LIST),
        ("nothing", "returned None" + LIST),
        ("heads", r"returned a Tensor of the shape \(4, 2\) for 4 completions" + LIST),
        ("zero_dimensional", r"returned a Tensor of the shape \(\) for 4 completions" + LIST),
        ("strings", r"returned a str \('1\.0'\) for completion 1 of 4" + LIST),
        ("text", r"returned a str \('1234'\)" + LIST),
        ("dicts", r"returned a mapping with the keys \['score'\] for completion 1 of 4" + LIST),
        ("one_dict", r"returned a mapping with the keys \['score'\]" + LIST),
        ("by_index", r"returned a mapping with the keys \[0, 1, 2, 3\]" + LIST),
        ("pair", "returned a tuple of 2 for 4 completions" + LIST),
        ("nested", r"returned a list \(\[1\.0\]\) for completion 1 of 4" + LIST),
        ("a_set", "returned a set .*" + LIST),
        ("complex_", r"returned a complex \(1j\) for completion 1 of 4" + LIST),
        ("signalling", "returned a Decimal .* for completion 1 of 4" + LIST),
        ("frame", r"returned a DataFrame of the shape \(4, 1\) for 4 completions" + LIST),
        ("huge", "returned inf for the prompt 'a'"),
        ("async_generator", "returned an async_generator .*" + LIST),
        ("endless", "returned a generator of at least 5 for 4 completions" + LIST),
        ("raises", r"failed: ZeroDivisionError: division by zero \(.*rewards\.py:\d+, in .*\)$"),
        ("fails_late", r"failed: RuntimeError: first line second line \(.*rewards\.py:\d+, in fails_late\)$"),
        (
            "key_error",
            r"KeyError: 'target' \(.*rewards\.py:\d+, in key_error\); it was given completions, prompts, topic$",
        ),
        ("no_ids", "KeyError: 'completion_ids' .*; only training has it$"),
        ("exits", r"failed: SystemExit: stop here \(.*rewards\.py:\d+, in exits\)$"),
        ("async_exits", r"failed: SystemExit: stop here \(.*rewards\.py:\d+, in async_exits\)$"),
        ("cancelled", r"failed: CancelledError: too slow \(.*rewards\.py:\d+, in cancelled\)$"),
        ("cancels_itself", "failed: CancelledError"),
        ("closes", r"failed: GeneratorExit: done \(.*rewards\.py:\d+, in closes\)$"),
        ("several", r"failed: BaseExceptionGroup: many \(2 sub-exceptions\) \(.*in several\)$"),
        ("needs_ids", "needs 'completion_ids', which only training has; give it a default"),
        ("needs_state", "needs 'trainer_state', which only training has; give it a default"),
        ("by_position", "takes 'prompts' by position only"),
        ("Plain", r"is a class; make an object of it in that file \(scorer = Plain\(\)\)"),
        ("module", "is a torch module; give the folder of its weights"),
    ],
)
def test_anything_else_is_one_line(file, name, told):
    with pytest.raises(RewardError, match=told) as caught:
        load(file, name, missing_ok=True).score(PROMPTS, TEXTS, {"topic": ["t"] * 4})
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("reward 'r'")


@pytest.mark.parametrize("own", [False, True])
def test_a_reward_that_changes_its_arguments_changes_no_other(file, own):
    class Own(Scorer):
        def score(self, prompts, completions, columns):
            completions[0].clear()
            prompts.pop()
            columns["topic"][0].clear()
            return [1.0] * 4, Cost()

    prompts = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    topic = [{"name": "t"} for _ in PROMPTS]
    before = repr([prompts, completions, topic])
    reward = Reward("r", Own()) if own else load(file, "changes")
    assert reward(prompts, completions, topic=topic) == [1.0] * 4
    assert repr([prompts, completions, topic]) == before


# --- importing a file


def test_a_file_imports_its_neighbour_also_later(tmp_path):
    (tmp_path / "neighbour_of_it.py").write_text("def length(text):\n    return len(text)\n")
    (tmp_path / "later_neighbour.py").write_text("BONUS = 1\n")
    (tmp_path / "first.py").write_text(
        "from neighbour_of_it import length\n\n\ndef f(completions, **_):\n    import later_neighbour\n"
        "    return [length(t) + later_neighbour.BONUS for t in completions]\n"
    )
    assert load(tmp_path / "first.py", "f").score(["p"], ["abc"], {})[0] == [4.0]


def test_a_neighbour_whose_name_is_taken_is_refused(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "taken_name.py").write_text(f"NAME = {folder!r}\n")
        (tmp_path / folder / "r.py").write_text("import taken_name\n\n\ndef f(completions, **_):\n    return [1.0]\n")
    load(tmp_path / "one" / "r.py", "f")
    with pytest.raises(RewardError, match=r"imports 'taken_name', which .*two.* is, but another module .*one.*rename"):
        load(tmp_path / "two" / "r.py", "f")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("def f(completions)\n    pass\n", r"SyntaxError: expected ':' \(.*bad\.py:1\)$"),
        (
            "import os\nKEY = os.environ['NO_SUCH_KEY']\n",
            r"KeyError: 'NO_SUCH_KEY' \(.*bad\.py:2, .*set that environment",
        ),
        ("import no_such_module\n", r"ModuleNotFoundError: No module named 'no_such_module' \(.*bad\.py:1"),
        ("open('/no/such/file')\n", r"FileNotFoundError: .*no/such/file.*bad\.py:1"),
        ("raise SystemExit\n", r"SystemExit \(.*bad\.py:1"),
        ("x = 1 / 0\n", r"ZeroDivisionError: division by zero \(.*bad\.py:1"),
        ("\0", "SyntaxError: source code string cannot contain null bytes"),
    ],
)
def test_a_file_that_cannot_be_imported_is_one_line(tmp_path, content, told):
    (tmp_path / "bad.py").write_text(content)
    for _ in range(2):
        with pytest.raises(RewardError, match=f"^reward 'r': cannot import function '.*bad\\.py:f': {told}") as caught:
            load(tmp_path / "bad.py", "f")
        assert "\n" not in str(caught.value)
    assert not any("bad" in name and name.startswith("iama_user") for name in sys.modules)


def test_a_scorer_of_ones_own_is_checked_alike(tmp_path):
    (tmp_path / "scorers.py").write_text(
        "from iama.cost import Cost\nfrom iama.rewards.reward import Scorer\n\n\n"
        "class Fixed(Scorer):\n    def __init__(self, what):\n        self.what = what\n\n"
        "    def score(self, prompts, completions, columns):\n"
        "        return {'list': ([1, None], Cost()), 'bare': [1, 2], 'keys': ({0: 1.0, 1: 2.0}, Cost()), 'no': 1}"
        "[self.what]\n"
    )
    spec = f"{tmp_path}/scorers.py:Fixed"

    def scores(what):
        reward = load_reward("r", RewardSpec(kind=f"{spec}(what={what})"), missing_ok=True)
        return reward.score(["p", "q"], ["a", "b"], {})[0]

    assert scores("list")[0] == 1.0
    assert math.isnan(scores("list")[1])
    for what, told in {
        "bare": r"returned a list .*; return a list of scores, and a Cost",
        "keys": "returned a mapping",
        "gone": r"KeyError: 'gone' \(.*scorers\.py:\d+, in score\)",
    }.items():
        with pytest.raises(RewardError, match=f"^reward 'r': Fixed.score .*{told}"):
            scores(what)


# --- what the prompts must hold, for every one of them


@pytest.fixture
def reads_topic(tmp_path) -> RewardSpec:
    (tmp_path / "topic.py").write_text(
        "def f(completions, topic, trainer_state=None):\n    return [1.0] * len(topic)\n"
    )
    return RewardSpec(function=f"{tmp_path}/topic.py:f")


@pytest.mark.parametrize("name", ["prompts", "completions"])
def test_a_column_with_the_name_of_an_argument_is_refused(reads_topic, name):
    for in_training in (True, False):
        with pytest.raises(RewardError, match=f"a column of the prompts is named '{name}', as what every"):
            check_columns("r", reads_topic, [{"prompt": "p", "topic": "t", name: 1}], in_training=in_training)


@pytest.mark.parametrize("name", ["completion_ids", "trainer_state", "log_extra", "log_metric"])
def test_a_column_with_a_name_of_trl_is_refused_in_training(reads_topic, name):
    with pytest.raises(RewardError, match=f"a column of the prompts is named '{name}', as what TRL hands"):
        check_columns("r", reads_topic, [{"prompt": "p", "topic": "t", name: 1}], in_training=True)


@pytest.mark.parametrize("name", ["self", "class", "completion", "images", "environment", "spec", "name", "rows"])
def test_any_other_column_may_have_any_name(tmp_path, name):
    (tmp_path / "any.py").write_text(f"def f(completions, **columns):\n    return columns[{name!r}]\n")
    spec = RewardSpec(function=f"{tmp_path}/any.py:f")
    check_columns("r", spec, [{"prompt": "p", name: 1}], in_training=True)
    assert load_reward("r", spec)(prompts=["p"], completions=["t"], **{name: [2]}) == [2.0]


def test_a_missing_column_is_refused_and_what_only_training_has_is_said(tmp_path, reads_topic):
    with pytest.raises(RewardError, match=r"needs the column 'topic', but the prompts have \['other'\]"):
        check_columns("r", reads_topic, [{"prompt": "p", "other": 1}], in_training=True)
    (tmp_path / "ids.py").write_text("def f(completions, completion_ids):\n    return [1.0]\n")
    spec = RewardSpec(function=f"{tmp_path}/ids.py:f")
    with pytest.warns(IamaWarning, match="needs 'completion_ids', which only training has.*evaluation cannot use it"):
        check_columns("r", spec, [{"prompt": "p"}], in_training=True)
    with pytest.raises(RewardError, match="needs 'completion_ids', which only training has"):
        check_columns("r", spec, [{"prompt": "p"}])


def test_right_answers_of_all_prompts_are_read(recwarn):
    spec = RewardSpec(verifier="math")
    rows = [
        {"prompt": f"p{i}", "answer": answer} for i, answer in enumerate(["1", 2, "x^2", "1/2", "", "#### 5", None])
    ]
    with pytest.raises(
        RewardError, match=r"no answer in column 'answer' of 2 of 7 prompts \(5, 7\), e\.g\. '' of 'p4'"
    ):
        check_columns("r", spec, rows)
    with pytest.raises(RewardError, match=r"prompt 2 has no column 'answer' \(answer_column\), only \['other'\]"):
        check_columns("r", spec, [{"prompt": "p", "answer": "1"}, {"prompt": "p", "other": "1"}])
    assert not recwarn.list
    with pytest.warns(IamaWarning, match="2 of 7 prompts .*; their completions have no score"):
        check_columns("r", spec, rows, missing_ok=True)
    reward = load_reward("r", spec, missing_ok=True)
    with pytest.warns(IamaWarning, match="is '', in which math-verify finds no answer") as warned:
        scores = reward(["a", "b", "c"], ["is 1", "is 1", "is 1"], answer=["1", "", None])
    assert len(warned) == 1
    assert scores[0] == 1.0
    assert all(map(math.isnan, scores[1:]))


def test_fractions_are_numbers():
    from iama.rewards.users_code import as_scores

    assert as_scores([Fraction(1, 4)], 1, "f") == [0.25]


def test_keys_of_a_mapping_have_an_order():
    from iama.rewards.users_code import as_scores

    assert as_scores({3.0: "a", 1.0: "b"}.keys(), 2, "f") == [3.0, 1.0]
