"""vLLM against our own engine, on one small model: the same law, whatever it is asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import chi2_contingency, chisquare

from iama.config.specs import PolicySpec, Sampling
from iama.errors import ConfigError
from iama.models.vllm import check_sampling, close_llm, llm_settings
from iama.prompts.conversations import render_prompts
from inference.engine.decode import decode
from inference.engine.next_token import probabilities
from inference.engine.policy import load_policy
from inference.engine.responses import Ends
from inference.engine.vllm import iter_vllm, load_vllm_policy, vllm_arguments
from tests.finished_runs import finished_run
from trainers.export.export import export_run

NUM_SAMPLES = 10_000
NEVER = 1e-4
"""A p-value that the fixed seeds below are far from; a law that is off by a few percent falls far below it."""
QUICK = {"enforce_eager": True, "kv_cache_memory_bytes": 2**28, "max_num_seqs": 1024}


# Settings, which need no vLLM. --------------------------------------------------------------------------


def test_settings_mean_the_same_to_vllm():
    given = vllm_arguments(Sampling(top_k=3, stop=["a", "b"], temperature=0.5, max_new_tokens=7), [5, 3], 4, 9)
    told = {"n": 4, "seed": 9, "max_tokens": 7, "top_k": 3, "stop": ["a", "b"], "temperature": 0.5}
    assert {key: given[key] for key in told} == told
    assert (given["stop_token_ids"], given["ignore_eos"], given["detokenize"]) == ([3, 5], True, True)
    assert vllm_arguments(Sampling(), [3], 1, 0)["top_k"] == -1


@pytest.mark.parametrize(
    ("sampling", "told"),
    [
        ({"temperature": 0.001}, r"sampling.temperature 0.001 is outside 0.01 to 2"),
        ({"temperature": 2.5}, r"sampling.temperature 2.5 is outside 0.01 to 2"),
        ({"top_p": 0.9, "min_p": 0.1}, r"min_p 0.1 beside sampling.top_p 0.9: vLLM applies min_p first"),
    ],
)
def test_sampling_that_vllm_would_change_is_refused(sampling, told):
    with pytest.raises(ConfigError, match=told):
        check_sampling(Sampling(**sampling))


def test_vllm_is_told_the_rank_of_an_adapter(tmp_path):
    spec = PolicySpec(path="base", dtype="bfloat16", engine="vllm", vllm={"max_model_len": 64})
    told = {"dtype": "bfloat16", "generation_config": "vllm", "use_tqdm_on_load": False, "max_model_len": 64}
    assert llm_settings(spec) == told
    for rank, largest in ((4, 8), (64, 64), (65, 128)):
        (tmp_path / "adapter_config.json").write_text(f'{{"r": {rank}}}')
        settings = llm_settings(spec, str(tmp_path))
        assert (settings["enable_lora"], settings["max_lora_rank"]) == (True, largest)
    (tmp_path / "adapter_config.json").write_text('{"r": 1024}')
    with pytest.raises(
        ConfigError, match=r"not take the adapter .* \(rank 1024 is above 512\); merge it with iama export"
    ):
        llm_settings(spec, str(tmp_path))


# Laws. --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter(wide, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    finished_run(folder / "run", wide)
    export_run(folder / "run", folder / "out", merge=False)
    export_run(folder / "run", folder / "merged", merge=True)
    return folder


@pytest.fixture(scope="module")
def adapted(wide, adapter):
    """The policy with its adapter in vLLM, which serves the base by itself, too."""
    spec = PolicySpec(path=str(wide.policy), adapter=str(adapter / "out"), engine="vllm", vllm=QUICK)
    policy = load_vllm_policy("base", spec, Sampling(max_new_tokens=8))
    yield policy
    close_llm(policy.llm)


@pytest.fixture(scope="module")
def base(adapted):
    return replace(adapted, lora=None)


@pytest.fixture(scope="module")
def ours(wide):
    return load_policy("base", PolicySpec(path=str(wide.policy)))


@pytest.fixture(scope="module")
def prompt_ids(ours):
    message = [{"role": "user", "content": "how to bake bread"}]
    return render_prompts(ours.tokenizer, [message], ours.eos_token_ids, "policy")[0]


def samples(policy, ids, sampling, num_samples=NUM_SAMPLES, seed=1):
    ((_, responses, cost),) = list(iter_vllm(policy, [ids], num_samples, sampling, [seed]))
    return responses, cost


def first_token_law(ours, ids, sampling):
    with torch.inference_mode():
        logits_1V = ours.model(input_ids=torch.tensor([ids])).logits[:, -1]
    return probabilities(logits_1V, sampling, [ids], source="test")[0].numpy()


def check_first_tokens(responses, law_V):
    """Chi-squared of the first tokens; those that are expected fewer than 8 times are put together."""
    counts_V = np.bincount([r.token_ids[0] for r in responses], minlength=len(law_V))
    assert not counts_V[law_V == 0].any()
    expected_V = law_V * len(responses)
    often = expected_V >= 8
    seen, wanted = [*counts_V[often]], [*expected_V[often]]
    if (rest := expected_V[~often].sum()) > 0:
        seen, wanted = [*seen, counts_V[~often].sum()], [*wanted, rest]
    if len(seen) > 1:
        assert chisquare(seen, wanted).pvalue > NEVER


def check_same(one, other):
    """Chi-squared of two samples of anything that can be counted; what is rare is put together."""
    counts = [Counter(one), Counter(other)]
    keys = [key for key in {**counts[0], **counts[1]} if counts[0][key] + counts[1][key] >= 16]
    table = np.asarray([[count[key] for key in keys] for count in counts])
    rest = np.asarray([[len(one)], [len(other)]]) - table.sum(axis=1, keepdims=True)
    table = np.concatenate([table, rest], axis=1) if rest.sum() else table
    assert table.shape[1] > 1
    assert chi2_contingency(table).pvalue > NEVER


def token_log_probabilities(policy, ids):
    """Of each token but the first, by vLLM."""
    import vllm

    given = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0)
    (output,) = policy.llm.generate([{"prompt_token_ids": ids}], [given], use_tqdm=False, lora_request=policy.lora)
    return np.asarray([row[i].logprob for i, row in zip(ids[1:], output.prompt_logprobs[1:], strict=True)])


def our_log_probabilities(policy, ids):
    with torch.inference_mode():
        law = torch.log_softmax(policy.model(input_ids=torch.tensor([ids])).logits[0].double(), dim=-1)
    return law[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()


@pytest.mark.vllm
@pytest.mark.slow
def test_tokens_have_the_same_log_probabilities(base, adapted, ours, adapter, prompt_ids):
    """Of the base, and of an exported adapter against merged weights."""
    merged = load_policy("merged", PolicySpec(path=str(adapter / "merged")))
    texts, _ = decode(ours, [prompt_ids], 8, Sampling(max_new_tokens=40), seed=0, batch_size=8)
    for response in texts[0]:
        ids = [*prompt_ids, *response.token_ids]
        np.testing.assert_allclose(token_log_probabilities(base, ids), our_log_probabilities(ours, ids), atol=1e-4)
        by_adapter = token_log_probabilities(adapted, ids)
        np.testing.assert_allclose(by_adapter, our_log_probabilities(merged, ids), atol=1e-4)
    assert np.abs(by_adapter - our_log_probabilities(ours, ids)).max() > 0.01  # the adapter says something else


@pytest.mark.vllm
@pytest.mark.slow
def test_log_probabilities_of_samples_are_those_of_the_whole_law(base, ours, prompt_ids):
    """Raw, at temperature 1, whatever the sample was drawn by."""
    import vllm

    given = vllm.SamplingParams(max_tokens=8, logprobs=0, temperature=0.5, top_k=3, seed=1)
    (output,) = base.llm.generate([{"prompt_token_ids": prompt_ids}], [given], use_tqdm=False)
    ids = list(output.outputs[0].token_ids)
    told = [row[i].logprob for i, row in zip(ids, output.outputs[0].logprobs, strict=True)]
    expected = our_log_probabilities(ours, [*prompt_ids, *ids])[len(prompt_ids) - 1 :]
    np.testing.assert_allclose(told, expected, atol=1e-4)


@pytest.mark.vllm
@pytest.mark.slow
def test_first_tokens_and_lengths_have_our_law(base, ours, prompt_ids):
    sampling = Sampling(max_new_tokens=12)
    theirs, cost = samples(base, prompt_ids, sampling)
    check_first_tokens(theirs, first_token_law(ours, prompt_ids, sampling))
    ((mine,), our_cost) = decode(ours, [prompt_ids], NUM_SAMPLES, sampling, seed=0, batch_size=512)
    check_same([r.num_tokens for r in theirs], [r.num_tokens for r in mine])
    check_same([r.text for r in theirs], [r.text for r in mine])
    assert {r.finish_reason for r in theirs} == {"stop", "length"}
    assert cost.policy_prefill_tokens == our_cost.policy_prefill_tokens == len(prompt_ids)
    assert cost.policy_decode_tokens == sum(r.num_tokens - 1 for r in theirs)


LAWS = {
    "top_p": {"top_p": 0.7},
    "top_k": {"top_k": 5},
    "top_k and top_p": {"top_k": 9, "top_p": 0.8},
    "min_p": {"min_p": 0.2, "temperature": 1.5},
    "repetition penalty": {"repetition_penalty": 1.6, "temperature": 0.8},
}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
def test_what_cuts_and_bends_the_law_does_so_alike(base, ours, prompt_ids, name):
    sampling = Sampling(max_new_tokens=4, **LAWS[name])
    theirs, _ = samples(base, prompt_ids, sampling, 4000)
    check_first_tokens(theirs, first_token_law(ours, prompt_ids, sampling))
    ((mine,), _) = decode(ours, [prompt_ids], 4000, sampling, seed=0, batch_size=512)
    check_same([r.text for r in theirs], [r.text for r in mine])


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("plain", [False, True])
def test_stop_strings_end_where_ours_do(base, ours, prompt_ids, plain):
    """A continued text begins with a blank for vLLM and without one by itself; " b" must not stop there."""
    ids = ours.tokenizer("how to bake").input_ids if plain else prompt_ids
    sampling = Sampling(max_new_tokens=10, stop=[" b", "re", "tom"])
    theirs, cost = samples(base, ids, sampling, 4000)
    ((mine,), _) = decode(ours, [ids], 4000, sampling, seed=0, batch_size=512)
    check_same([r.text for r in theirs], [r.text for r in mine])
    check_same([r.num_tokens for r in theirs], [r.num_tokens for r in mine])
    ends = Ends(ours, sampling)
    for response in theirs[:500]:
        assert ends.reason(response.token_ids) == response.finish_reason
        assert not any(ends.reason(response.token_ids[:n]) for n in range(1, response.num_tokens))
    assert cost.policy_decode_tokens >= sum(r.num_tokens - 1 for r in theirs)


@pytest.mark.vllm
@pytest.mark.slow
def test_responses_end_at_all_end_tokens_and_no_other(base, ours, prompt_ids):
    """Those of the generation config, which vLLM is told to leave alone, and not the tokenizer's unless it is one."""
    law_V = first_token_law(ours, prompt_ids, Sampling())
    law_V[[*ours.eos_token_ids]] = 0
    ends = frozenset(int(i) for i in law_V.argsort()[-2:])
    sampling = Sampling(max_new_tokens=10)
    theirs, _ = samples(replace(base, eos_token_ids=ends), prompt_ids, sampling, 4000)
    ((mine,), _) = decode(replace(ours, eos_token_ids=ends), [prompt_ids], 4000, sampling, seed=0, batch_size=512)
    check_same([r.num_tokens for r in theirs], [r.num_tokens for r in mine])
    assert {r.token_ids[-1] for r in theirs if r.finish_reason == "stop"} == ends
    special = next(iter(ours.eos_token_ids))
    assert any(special in r.token_ids[:-1] for r in theirs)


@pytest.mark.vllm
@pytest.mark.slow
def test_an_adapter_is_sampled_as_its_merged_weights_are(adapted, adapter, prompt_ids):
    merged = load_policy("merged", PolicySpec(path=str(adapter / "merged")))
    theirs, _ = samples(adapted, prompt_ids, Sampling(max_new_tokens=4), 4000)
    check_first_tokens(theirs, first_token_law(merged, prompt_ids, Sampling()))


@pytest.mark.vllm
@pytest.mark.slow
def test_every_prompt_has_as_many_samples_as_it_is_asked_for(base, prompt_ids, monkeypatch):
    monkeypatch.setattr("inference.engine.vllm.ROWS_AT_ONCE", 4)
    counts, sampling = [3, 0, 2, 1], Sampling(max_new_tokens=3)
    drawn = list(iter_vllm(base, [prompt_ids] * 4, counts, sampling, [1, 2, 3, 4]))
    assert [(i, len(responses)) for i, responses, _ in drawn] == list(enumerate(counts))
    assert len({r.token_ids for _, responses, _ in drawn for r in responses}) > 1
