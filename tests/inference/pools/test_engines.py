"""Engines beside our own, and the commands that fill, score and merge pool files."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest

from iama.config.specs import PolicySpec, RewardSpec, Sampling
from iama.cost import Cost
from iama.errors import ConfigError
from iama.prompts.data import load_prompts
from iama.rewards.load import load_reward
from iama.rewards.remote import ChatAnswer, Endpoint
from inference.pools.engines import (
    _usage,
    openai_draw,
    request_seed,
    transformers_draw,
    vllm_draw,
)
from inference.pools.file import prompt_ids, read_pool
from inference.pools.fill import engine_header, fill_pool, pool_header
from tests.openai_server import MOODS, OpenAIServer

SERVER = ["--engine", "openai", "--url", "http://localhost:1/v1", "--model", "m"]
SAMPLING = Sampling(temperature=0.7, top_p=0.9, stop=["\n"], max_new_tokens=9)


@pytest.fixture
def openai_server():
    with OpenAIServer() as server:
        yield server


def endpoint(server, concurrency=4) -> Endpoint:
    return Endpoint(server.url, "big", "NO_SUCH_KEY", 30.0, 0, concurrency, "--engine openai")


def drawn(server, rows, sampling=SAMPLING, num_samples=2, seed=0, system_prompt=None, indices=None):
    draw = openai_draw(endpoint(server), sampling, num_samples, seed, system_prompt)
    return {index: rest for index, *rest in draw(rows, range(len(rows)) if indices is None else indices)}


def user(text: str):
    return {"prompt": [{"role": "user", "content": text}]}


# OpenAI-compatible servers. -----------------------------------------------------------------------------


def test_a_prompt_is_one_request_with_all_settings(openai_server):
    openai_server.answer = lambda body: [("one two three", "stop"), ("four", "length")]
    found = drawn(openai_server, [user("a b?")], system_prompt="be kind")
    (body,) = openai_server.requests
    assert body["messages"] == [{"role": "system", "content": "be kind"}, *user("a b?")["prompt"]]
    told = {key: body[key] for key in ("n", "temperature", "top_p", "stop", "max_tokens", "model")}
    assert told == {"n": 2, "temperature": 0.7, "top_p": 0.9, "stop": ["\n"], "max_tokens": 9, "model": "big"}
    assert not {"top_k", "min_p", "repetition_penalty"} & set(body)
    samples, cost, estimated = found[0]
    assert [(s.text, s.finish_reason, s.num_tokens) for s in samples] == [
        ("one two three", "stop", None),
        ("four", "length", None),
    ]
    # The server counts words: four read (two of the system prompt), four written, of which two end a sample.
    assert (cost.policy_prefill_tokens, cost.policy_decode_tokens, estimated) == (4, 2, False)
    assert cost.seconds > 0


def test_settings_that_the_protocol_lacks_are_sent_where_they_are_used(openai_server):
    drawn(openai_server, [user("a?")], Sampling(top_k=5, min_p=0.1, repetition_penalty=1.2))
    (body,) = openai_server.requests
    assert {key: body[key] for key in ("top_k", "min_p", "repetition_penalty")} == {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
    }


def test_text_prompts_are_continued_and_one_sample_has_its_length(openai_server):
    openai_server.answer = lambda body: "one two three"
    ((samples, cost, _),) = drawn(openai_server, [{"prompt": "once upon"}], num_samples=1).values()
    assert openai_server.paths == ["/v1/completions"]
    assert samples[0].num_tokens == 3
    assert cost == Cost(2, 2, seconds=cost.seconds)


def test_costs_are_estimates_where_the_server_tells_no_usage(openai_server):
    openai_server.has_usage = False
    openai_server.answer = lambda body: ["12345678", "1234567890"]
    ((samples, cost, estimated),) = drawn(openai_server, [user("123456789")]).values()
    assert estimated
    assert [s.num_tokens for s in samples] == [None, None]
    assert (cost.policy_prefill_tokens, cost.policy_decode_tokens) == (3, 2 + 3 - 2)


@pytest.mark.parametrize("told", [(None, 9), (9, None)])
def test_half_a_usage_is_an_estimate(told):
    answer = ChatAnswer(["12345678"], ["stop"], *told)
    assert _usage("123456789", answer) == ((told[0] or 3, (told[1] or 2) - 1), True)
    assert _usage("123456789", replace(answer, prompt_tokens=9, completion_tokens=9)) == ((9, 8), False)


def test_seeds_differ_by_prompt_occurrence_and_seed_and_not_by_what_else_is_drawn(openai_server):
    rows = [user("a?"), user("b?"), user("a?")]

    def seeds(**kwargs):
        openai_server.requests.clear()
        drawn(openai_server, rows, **kwargs)
        return {body["seed"] for body in openai_server.requests}

    whole = seeds()
    assert len(whole | seeds(seed=1)) == 6
    assert seeds(indices=[2]) == {request_seed(0, prompt_ids(rows)[2])} < whole
    assert all(0 <= seed < 2**31 for seed in whole)


def test_a_server_that_gives_one_answer_at_a_time_fills_the_pool_as_well(openai_server):
    openai_server.max_n = 1
    openai_server.answer = lambda body: f"{body['messages'][-1]['content']} {body['seed']}"
    ((samples, cost, _),) = drawn(openai_server, [user("a?")], num_samples=3).values()
    assert len({s.text for s in samples}) == 3  # each with a seed of its own
    assert cost.policy_decode_tokens == 3 * (2 - 1)
    assert cost.policy_prefill_tokens == 1  # once, as where one reply holds all


def test_remote_pools_resume_and_hold_what_the_local_engine_drew(openai_server, tiny, tmp_path):
    """The server answers with greedy texts of the local policy: engines differ in who answers, in nothing else."""
    rows = load_prompts(tiny.prompts)
    greedy, spec = Sampling(top_k=1, max_new_tokens=6), PolicySpec(path=str(tiny.policy))
    header = pool_header("base", spec, None, "transformers", greedy, 2, 0)
    local = fill_pool(
        tmp_path / "local", header, rows, transformers_draw("base", spec, None, 2, greedy, 0, 64), lambda _: None
    )
    by_prompt = {json.dumps(p.prompt): [s.text for s in p.samples] for p in local.prompts}
    openai_server.answer = lambda body: by_prompt[json.dumps(body["messages"])]
    header = engine_header({"name": "big", "path": "big"}, None, "openai", greedy, 2, 0)

    def fill():
        draw = openai_draw(endpoint(openai_server), greedy, 2, 0)
        return fill_pool(tmp_path / "remote", header, rows, draw, lambda _: None)

    remote = fill()
    assert remote.texts == local.texts
    assert [p.prompt_id for p in remote.prompts] == [p.prompt_id for p in local.prompts]
    assert all(s.text == p.samples[0].text for p in remote.prompts for s in p.samples)  # greedy
    data = (tmp_path / "remote").read_bytes()
    (tmp_path / "remote").write_bytes(data[:-10])
    openai_server.requests.clear()
    assert fill().texts == local.texts
    assert len(openai_server.requests) == 1


# vLLM: its laws are in tests/inference/engine/test_vllm.py. -----------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vllm is installed")
def test_a_missing_vllm_is_told_at_once():
    with pytest.raises(ConfigError, match=r"policy 'base': engine vllm, but vLLM is not installed; pip install"):
        vllm_draw("base", PolicySpec(path="nowhere"), None, 2, Sampling(), 0)


# Commands. ----------------------------------------------------------------------------------------------


def test_pool_score_and_merge_end_to_end(run, tiny, tmp_path, gold_file):
    prompts = ("--prompts", tiny.prompts, "--max-prompts", 3, "--n", 2, "--max-new-tokens", 6)
    whole = tmp_path / "whole.jsonl"
    code, out, err = run("pool", whole, *prompts, "--policy", tiny.policy)
    assert (code, out.splitlines()) == (0, [out.strip()]), err
    assert "3 prompts x 2 samples, " in out
    assert "3/3 prompts" in " ".join(err.split())
    parts = [tmp_path / f"part-{i}.jsonl" for i in (1, 2)]
    for i, part in enumerate(parts, start=1):
        assert run("pool", part, *prompts, "--policy", tiny.policy, "--shard", f"{i}/2")[0] == 0
    code, told, _ = run("merge", tmp_path / "merged.jsonl", *parts, "--json")
    assert code == 0
    assert json.loads(told).items() >= {"command": "merge", "num_prompts": 3, "num_samples": 2}.items()

    def by_id(path):
        return {p.prompt_id: (p.prompt, p.columns, p.samples) for p in read_pool(path).prompts}

    assert by_id(tmp_path / "merged.jsonl") == by_id(whole)
    code, _, err = run("merge", tmp_path / "merged.jsonl", *parts)
    assert (code, "exists already" in err) == (2, True)

    code, out, err = run("score", whole, "--reward", tiny.reward, "--column", "helpful")
    assert code == 0, err
    assert out.startswith("helpful: mean ")
    assert out.endswith("0 of 6 scores missing\n")
    assert run("score", whole, "--reward", f"{gold_file}:vowels", "--column", "helpful/gold")[0] == 0
    reward = load_reward("r", RewardSpec(model=str(tiny.reward)))
    for prompt in read_pool(whole).prompts:
        values, _ = reward.score([prompt.prompt] * 2, [s.text for s in prompt.samples], {})
        assert [s.scores["helpful"] for s in prompt.samples] == pytest.approx(values, abs=1e-5)
        assert all(set(s.scores) == {"helpful", "helpful/gold"} for s in prompt.samples)


def test_what_only_a_model_reads_is_refused_elsewhere(run, tiny, tmp_path):
    path = tmp_path / "foreign.jsonl"
    lines = [{"iama_pool": 1, "policy": {"name": "theirs"}}, {"prompt": "a?", "text": "one"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "f.py").write_text("def one(completions, **columns):\n    return [1.0] * len(completions)\n")
    (tmp_path / "reward.yaml").write_text(f"model: {tiny.reward}\n")
    score = ("score", path, "--column", "c", "--dtype", "bfloat16")
    code, _, err = run(*score, "--reward", f"{tmp_path}/f.py:one")
    assert (code, err) == (2, "error: --dtype 'bfloat16' belongs to a model, not to a function; drop it\n")
    file = tmp_path / "reward.yaml"
    code, _, err = run(*score, "--spec", file)
    assert (code, err) == (2, f"error: --dtype 'bfloat16' belongs to --reward; write dtype: bfloat16 into {file}\n")
    assert run(*score, "--reward", tiny.reward)[0] == 0


def test_a_column_is_overwritten_only_on_demand_and_a_file_names_any_reward(run, tiny, tmp_path):
    path = tmp_path / "foreign.jsonl"
    header = {"iama_pool": 1, "policy": {"name": "theirs"}}
    lines = [header, {"prompt": "a?", "text": "one", "scores": {"helpful": 1}, "columns": {"topic": "x"}}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "reward.yaml").write_text(f"model: {tiny.two_headed_reward}\nhead: good\n")
    score = ("score", path, "--spec", tmp_path / "reward.yaml", "--column", "helpful")
    code, _, err = run(*score)
    assert (code, err) == (2, f"error: {path} has a column 'helpful' already; give --replace, or another --column\n")
    assert run(*score, "--replace")[0] == 0
    reward = load_reward("r", RewardSpec(model=str(tiny.two_headed_reward), head="good"))
    (prompt,) = read_pool(path).prompts
    assert prompt.samples[0].scores["helpful"] == pytest.approx(reward.score(["a?"], ["one"], {})[0][0])
    assert prompt.columns == {"topic": "x"}


def test_a_server_fills_a_pool(run, tiny, tmp_path, openai_server):
    path, server = tmp_path / "remote.jsonl", ("--engine", "openai", "--url", openai_server.url, "--model", "org/big")
    renamed = tmp_path / "renamed.jsonl"
    renamed.write_text('{"question": "a?"}\n')
    code, _, err = run("pool", path, "--prompts", renamed, "--column", "prompt=question", "--n", 3, *server)
    assert code == 0, err
    pool = read_pool(path)
    assert pool.header["policy"] == {
        "name": "big",
        "path": "org/big",
        "adapter": None,
        "fingerprint": f"org/big at {openai_server.url}",
    }
    assert pool.texts == [["ok"] * 3]
    code, _, err = run("pool", path, "--prompts", renamed, "--column", "prompt=question", "--n", 4, *server)
    assert code == 2
    assert "holds other samples (num_samples was 3, is 4)" in err


@pytest.mark.filterwarnings("default::iama.errors.IamaWarning")
def test_several_servers_fill_one_pool(run, tmp_path, openai_server):
    """One dies in the middle; the pool is the one that a single server fills, in whatever order it names them."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"{i}?"}) + "\n" for i in range(12)))
    openai_server.answer = lambda body: [f"{body['prompt']} {body['seed']} {i}" for i in range(body["n"])]
    asked = ("--prompts", tmp_path / "prompts.jsonl", "--n", 3, "--engine", "openai", "--model", "m")
    assert run("pool", tmp_path / "one.jsonl", *asked, "--url", openai_server.url)[0] == 0
    with OpenAIServer(openai_server.answer) as other:
        other.dies_at = 3
        urls = ["--url", openai_server.url, "--url", other.url]
        code, _, err = run("pool", tmp_path / "two.jsonl", *asked, *urls)
        assert (code, err.count(f"warning: --engine openai: the model 'm' at '{other.url}' gave no answer")) == (0, 1)
        one, two = (read_pool(tmp_path / f"{name}.jsonl") for name in ("one", "two"))
        assert {p.prompt_id: p.samples for p in two.prompts} == {p.prompt_id: p.samples for p in one.prompts}
        assert len(two.prompts) == 12
        addresses = ", ".join(sorted([openai_server.url, other.url]))
        assert two.header["policy"]["fingerprint"] == f"m at {addresses}"
        assert run("pool", tmp_path / "two.jsonl", *asked, *urls[2:], *urls[:2])[0] == 0
    code, _, err = run("pool", tmp_path / "x.jsonl", *asked, *urls[:2], *urls[:2])
    assert (code, "is given twice" in err) == (2, True)


def test_what_is_left_to_the_server_stands_in_the_header(run, tmp_path, openai_server):
    """A pool of another law is another pool: it is neither drawn unasked nor continued under the old header."""
    openai_server.mood = MOODS["no temperature"]
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a?"}\n{"prompt": "b?"}\n')
    path, asked = tmp_path / "pool.jsonl", ("--prompts", tmp_path / "prompts.jsonl", "--n", 2, "--engine", "openai")
    asked += ("--url", openai_server.url, "--model", "m")
    code, _, err = run("pool", path, *asked, "--temperature", 0.7)
    assert code == 2
    assert "without temperature the answers would be others, so write a --temperature that it takes, or leave" in err
    assert "leave it to the server (--leave-out temperature)" in err
    code, _, err = run("pool", path, *asked, "--leave-out", "temperature", "--leave-out", "seed")
    assert (code, "warning" in err) == (0, False), err
    assert not {"temperature", "seed"} & openai_server.requests[-1].keys()
    assert read_pool(path).header["left_out"] == ["temperature"]  # the seed is not of the law
    assert run("pool", path, *asked, "--leave-out", "temperature")[0] == 0
    code, _, err = run("pool", path, *asked)
    assert code == 2
    assert "holds other samples (left_out was ['temperature'], is None)" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "vlm"], "--engine 'vlm' is not known; did you mean 'vllm'? write transformers, vllm, openai"),
        ([], "--engine transformers needs --policy"),
        (["--engine", "openai", "--model", "m"], "--engine openai needs --url"),
        ([*SERVER, "--vllm", "max_model_len=9"], "--vllm 'max_model_len=9' has no use with --engine openai"),
        (["--policy", "p", "--url", "u"], "--url 'u' has no use with --engine transformers"),
        (["--policy", "p", "--vllm", "a=1"], "--vllm 'a=1' has no use with --engine transformers"),
        (["--policy", "p", "--concurrency", "8"], "--concurrency 8 has no use with --engine transformers"),
        (["--policy", "p", "--engine", "vllm", "--batch-size", "4"], "--batch-size 4 has no use with --engine vllm"),
        ([*SERVER, "--batch-size", "256"], "--batch-size 256 has no use with --engine openai"),
        ([*SERVER, "--device", "cpu"], "--device 'cpu' has no use with --engine openai"),
        ([*SERVER, "--trust-remote-code"], "--trust-remote-code has no use with --engine openai"),
        (["--policy", "p", "--column", "question"], "--column 'question': write ours=theirs"),
        (
            ["--policy", "p", "--leave-out", "seed"],
            "--leave-out 'seed': with --engine openai write temperature, max_to",
        ),
        ([*SERVER, "--leave-out", "top_p"], "--leave-out 'top_p': with --engine openai write temperature, max_tokens,"),
        (
            [*SERVER, "--leave-out", "temperature", "--temperature", "0.5"],
            "--temperature 0.5 has no use with --leave-out",
        ),
        ([*SERVER, "--leave-out", "max_tokens", "--max-new-tokens", "5"], "--max-new-tokens 5 has no use with --leave"),
        ([*SERVER, "--timeout-s", "0"], "--timeout-s 0.0: write a number of seconds above 0"),
        ([*SERVER, "--timeout-s", "nan"], "--timeout-s nan: write a number of seconds above 0"),
        (["--policy", "POLICY", "--shard", "3/2"], "--shard '3/2'"),
        (["--policy", "POLICY", "--max-new-tokens", "500"], "prompt 1 "),
    ],
)
def test_what_cannot_be_sampled_is_told_before_anything_is(run, tiny, tmp_path, arguments, message):
    arguments = [str(tiny.policy) if a == "POLICY" else a for a in arguments]
    code, _, err = run("pool", tmp_path / "x.jsonl", "--prompts", tiny.prompts, "--n", 2, *arguments)
    assert code == 2
    assert err.startswith(f"error: {message}")
    assert not (tmp_path / "x.jsonl").exists()


@pytest.mark.parametrize("arguments", [[], ["--reward", "a.py:b", "--spec", "c.yaml"], ["--spec", "c", "--head", "x"]])
def test_score_wants_one_reward(run, tmp_path, arguments):
    code, _, err = run("score", tmp_path / "x.jsonl", "--column", "c", *arguments)
    assert code == 2
    assert err.startswith(("error: give --reward DIR or file.py:function, or --spec FILE", "error: --head 'x' belongs"))


@pytest.mark.parametrize("command", ["pool", "score", "merge"])
def test_every_command_has_an_example(run, command):
    code, out, _ = run(command, "--help")
    assert (code, f"Examples: iama {command} " in " ".join(out.split())) == (0, True)
