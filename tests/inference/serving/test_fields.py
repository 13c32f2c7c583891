from __future__ import annotations

import pytest
from openai import types
from openai.types import chat
from test_catalogue import catalogue

from iama.config.serving import Limits
from iama.config.specs import Sampling
from inference.serving.fields import FIELDS, LABELS, MEANINGLESS, read_body
from inference.serving.refusals import RefusedError

LIMITS = Limits(n=4, max_tokens=64, messages=3, prompt_characters=100, stop=2, stop_characters=10)
HELLO = [{"role": "user", "content": "hello"}]


def read(route="chat", **fields):
    body = {"model": "iama", **({"messages": HELLO} if route == "chat" else {"prompt": "hello"})} | fields
    return read_body({key: value for key, value in body.items() if value is not ...}, route, catalogue(), LIMITS)


def refusal(route="chat", **fields) -> RefusedError:
    with pytest.raises(RefusedError) as error:
        read(route, **fields)
    assert error.value.status in (400, 404)
    assert "\n" not in str(error.value)
    return error.value


def test_the_shortest_request_is_a_single_sample_as_the_policy_is_sampled():
    asked = read()
    assert asked.model.id == "iama:single"
    assert asked.prompts == (HELLO,)
    assert (asked.n, asked.sampling, asked.stream, asked.has_max_tokens) == (1, Sampling(), False, False)
    assert asked.seed != read().seed, "a seed that is not given is drawn"


def test_standard_fields_mean_what_they_mean():
    asked = read(temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, repetition_penalty=1.1, max_tokens=7, stop="x", n=2)
    expected = Sampling(temperature=0.5, top_p=0.9, min_p=0.1, repetition_penalty=1.1, max_new_tokens=7, stop=("x",))
    assert (asked.sampling, asked.n, asked.has_max_tokens) == (expected, 2, True)
    assert read(max_completion_tokens=9).sampling.max_new_tokens == 9
    assert read(stop=["a", "b"]).sampling.stop == ("a", "b")
    assert read(seed=5).seed == 5
    assert read(seed=5, iama={"seed": 6}).seed == 6
    assert read(iama={"seed": -3}).seed == -3
    streamed = read(stream=True, stream_options={"include_usage": True}, iama={"events": True}, user="me")
    assert (streamed.stream, streamed.include_usage, streamed.events) == (True, True, True)
    assert read("completions", prompt=["a", "b"], n=2).num_choices == 4


def test_temperature_0_is_the_likeliest_token_where_one_sample_is_drawn():
    assert read(temperature=0).sampling == Sampling(top_k=1)
    assert "bon(4) chooses among different ones" in str(refusal(model="iama/helpful:bon(4)", temperature=0))
    assert refusal(temperature=1e-9).param == "temperature"


def test_top_k_1_is_the_same():
    assert read(top_k=1).sampling == Sampling(top_k=1)
    refused = refusal(model="iama/helpful:bon(4)", top_k=1)
    assert (refused.param, "top_k = 1 draws one answer again and again" in str(refused)) == ("top_k", True)


@pytest.mark.parametrize(
    ("method", "draws"),
    [
        ("args", False),
        ("ggro(num_candidates=3)", False),
        ("ggro(num_candidates=3, greedy=false)", True),
        ("cards(target=1)", True),
        ("blockwise(2)", True),
        ("bon(4, stop=pandora(0.1))", True),
        ("redraw(2, 2)", True),
        ("sea", True),
    ],
)
@pytest.mark.parametrize("greedy", [{"temperature": 0}, {"top_k": 1}])
def test_only_a_method_that_draws_refuses_it(method, draws, greedy):
    body = greedy | {"model": f"iama/helpful:{method}", "messages": HELLO}
    if draws:
        with pytest.raises(RefusedError, match="draws one answer again and again") as error:
            read_body(body, "chat", catalogue((method,)), LIMITS)
        assert error.value.param == next(iter(greedy))
    else:
        assert read_body(body, "chat", catalogue((method,)), LIMITS).sampling == Sampling(top_k=1)


def test_contents_may_come_in_parts_of_text():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}]
    assert read(messages=messages).prompts == (
        [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a\nb"}],
    )
    sent_back = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "annotations": []}
    assert read(messages=[*HELLO, sent_back]).prompts[0][1] == {"role": "assistant", "content": "hi"}
    image = {"type": "image_url", "image_url": {"url": "data:..."}}
    wrong = refusal(messages=[{"role": "user", "content": [image]}])
    assert "'image_url' is no text" in str(wrong)
    assert wrong.param == "messages.0.content.0" or wrong.param == "messages.0.content"


@pytest.mark.parametrize("name", MEANINGLESS)
def test_what_is_not_supported_is_named_and_values_without_effect_pass(name):
    fine, _ = MEANINGLESS[name]
    for value in (None, *fine):
        read(**{name: value})
    wrong = refusal(**{name: {"something": "else"}})
    assert (wrong.param, wrong.code) == (name, "unsupported")
    assert str(wrong).startswith(name)


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"model": ...}, "model", "model is missing"),
        ({"model": 3}, "model", "write a text, not 3"),
        ({"messages": ...}, "messages", "write a list of messages"),
        ({"messages": []}, "messages", "write a list of messages"),
        ({"messages": HELLO * 4}, "messages", "4 are more than 3"),
        ({"messages": ["hello"]}, "messages.0", "an object with role and content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role", "'tool' is not known"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "write a text"),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages.0.name", "leave it out"),
        ({"messages": [{"role": "user", "content": "x" * 101}]}, "messages", "101 characters are more than 100"),
        ({"n": 0}, "n", "from 1 to 4, not 0"),
        ({"n": 5}, "n", "from 1 to 4, not 5"),
        ({"n": True}, "n", "not true"),
        ({"n": 10**400}, "n", "too many digits"),
        ({"temperature": -1}, "temperature", "from 0 to 100, not -1"),
        ({"temperature": "hot"}, "temperature", "not 'hot'"),
        ({"top_p": 0}, "top_p", "above 0 to 1, not 0"),
        ({"min_p": 1}, "min_p", "to below 1"),
        ({"repetition_penalty": 1e-308}, "repetition_penalty", "from 0.01 to 100, not 1e-308"),
        ({"top_k": 1.5}, "top_k", "a whole number"),
        ({"max_tokens": 65}, "max_tokens", "from 1 to 64"),
        ({"max_tokens": 4, "max_completion_tokens": 5}, "max_tokens", "contradict"),
        ({"stop": ["a", "b", "c"]}, "stop", "3 texts are more than 2"),
        ({"stop": ""}, "stop", "not empty"),
        ({"stop": "x" * 11}, "stop", "longer than 10"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "set stream: true"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "'x' is not known"),
        ({"seed": 2**64}, "seed", "a whole number"),
        ({"presence_penalty": 0.5}, "presence_penalty", "use repetition_penalty"),
        ({"temprature": 1}, "temprature", "did you mean 'temperature'?"),
        ({"prompt": "x"}, "prompt", "is no field"),
        ({"iama": 3}, "iama", "write an object"),
        ({"iama": {"budgets": 3}}, "iama", "did you mean 'budget'?"),
        ({"iama": {"budget": 0}}, "iama.budget", "from 1"),
        ({"iama": {"events": True}}, "iama.events", "set stream: true"),
    ],
)
def test_mistakes_are_named_with_what_to_write(fields, param, said):
    wrong = refusal(**fields)
    assert wrong.param == param
    assert said in str(wrong)


@pytest.mark.parametrize("prompt", [[1, 2, 3], [[1, 2]], "", [""], [], 3, None, ["a"] * 5])
def test_prompts_are_texts(prompt):
    assert refusal("completions", prompt=prompt).param == "prompt"
    assert "more than 4" in str(refusal("completions", prompt=["a", "b", "c"], n=2))


@pytest.mark.parametrize(
    ("route", "params"),
    [
        ("chat", chat.completion_create_params.CompletionCreateParamsBase),
        ("completions", types.completion_create_params.CompletionCreateParamsBase),
    ],
)
def test_every_field_of_openai_s_own_client_is_known(route, params):
    """Read, or refused by its name; none is one that nobody has heard of."""
    unknown = [
        name
        for name in params.__annotations__
        if name not in FIELDS[route] and refusal(route, **{name: {"a": "b"}}).code != "unsupported"
    ]
    assert unknown == []


def test_names_of_whom_an_answer_is_for_are_texts_that_change_nothing():
    for name in LABELS:
        asked = read(seed=1, **{name: "me"})
        assert asked == read(seed=1)
        assert refusal(**{name: 5}).param == name


def test_values_are_shown_as_json_has_them():
    """A client writes no Python."""
    for value, shown in ((None, "null"), (True, "true"), ({}, "an object"), ([], "a list"), ("x", "'x'"), (5, "5")):
        assert str(refusal(messages=[{"role": "user", "content": value if value != "x" else [value]}])).endswith(
            f"not {shown}" if value != "x" else "'x' is no text; policies here read text alone"
        )
    assert "(no tools are called here)" in str(refusal(messages=[{"role": "tool", "content": "x"}]))
