from __future__ import annotations

import dataclasses

import pytest
import torch
from cards_reference import double
from classifiers import ENCODER_DECODER, GPT2_TEMPLATE, gpt2_tokenizer, save_classifiers, tiny_classifier
from families import CONFIGS, CONTEXT
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from iama.config.specs import RewardSpec
from iama.errors import ConfigError
from iama.models.flops import ModelSize, backward_flops, forward_flops
from iama.prompts.render import render_exchange
from iama.rewards.classifier import Classifier
from iama.rewards.function import reward_from_function
from iama.rewards.load import load_reward
from iama.rewards.reward import Reward
from inference.engine.reward_gradient import (
    EmbeddedReward,
    GradientRows,
    around,
    suffix_backward_flops,
    whole_with_gradient,
)
from inference.engine.reward_rows import reads_in_pieces
from inference.engine.vocabulary import check_shared_vocabulary

CHAT = [{"role": "user", "content": "how to bake"}]
CLOSED = "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] | trim }}{{ eos_token }}{% endfor %}"
OPEN = (
    "{% for m in messages %}[{{ m['role'] }}]\n{{ m['content'] | trim }}{% if not loop.last %}\n{% endif %}{% endfor %}"
)
STEP = 1e-5


@pytest.fixture
def exact_norms(monkeypatch):
    """Norms of Llama in the precision of their input; by themselves they compute in float32."""

    def forward(self, hidden_states):
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    """Llama (two outputs), GPT-2 (without a padding token) and BERT, in float64, with a sign and a scale."""
    root = tmp_path_factory.mktemp("classifiers")
    save_classifiers(root)
    scale = {"mean": 0.3, "std": 2.0}
    heads = {"llama": 1, "gpt2": None, "bert": None}
    specs = {name: RewardSpec(model=str(root / name), head=head, sign=-1, scale=scale) for name, head in heads.items()}
    return {name: double(load_reward(name, spec)) for name, spec in specs.items()}


def with_template(reward, template):
    tokenizer = AutoTokenizer.from_pretrained(reward.classifier.path)
    tokenizer.chat_template = template
    return Reward(reward.name, dataclasses.replace(reward.classifier, tokenizer=tokenizer))


def family(name):
    torch.manual_seed(0)
    config = type(CONFIGS[name])(**{**CONFIGS[name].to_dict(), "num_labels": 2, "pad_token_id": 0, "vocab_size": 300})
    model = AutoModelForSequenceClassification.from_config(config).eval().double()
    return Classifier(model, gpt2_tokenizer(), 1, 1, 0, CONTEXT, 4, name, f"reward {name!r}")


def ragged(lengths):
    return [[(7 * i + 3 * length) % 40 + 5 for i in range(length)] for length in lengths]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_scores_of_embeddings_are_those_of_the_tokens(rewards, name):
    reward = rewards[name]
    embedded = EmbeddedReward(reward)
    texts = [" bread", " bake bread, grow tomatoes", " mix water and flour", ""]
    ids = [around(reward, "how to") for _ in texts]
    tokenize = reward.classifier.tokenizer
    rows = [
        before + tokenize(text, add_special_tokens=False)["input_ids"] + after
        for (before, after), text in zip(ids, texts, strict=True)
    ]
    found = embedded.scores([embedded.embeddings[row] for row in rows])
    expected = reward.score(["how to"] * len(texts), texts, {})[0]
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert not any(weight.requires_grad for weight in reward.classifier.model.parameters())


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.usefixtures("exact_norms")
def test_gradients_of_embeddings_equal_finite_differences(rewards, name):
    embedded = EmbeddedReward(rewards[name])
    rows = [embedded.embeddings[row].clone().requires_grad_() for row in ragged([6, 9, 4])]
    gradients = torch.autograd.grad(embedded.scores(rows).sum(), rows)
    torch.manual_seed(1)
    for r, gradient in enumerate(gradients):
        direction = torch.randn_like(rows[r])
        ends = []
        for sign in (1, -1):
            moved = [row.detach() + (sign * STEP * direction if i == r else 0) for i, row in enumerate(rows)]
            ends.append(float(embedded.scores(moved).sum()))
        assert float((gradient * direction).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * STEP), rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma3", "gpt2", "gpt_neo", "gpt_neox"])
def test_a_gradient_after_a_cached_prefix_is_that_of_the_whole_row(name):
    """Rows of unlike lengths, some read in three passes, one rolled back in between."""
    classifier = family(name)
    assert reads_in_pieces(classifier)
    classifier.model.requires_grad_(False)
    ids, cuts = ragged([13, 9, 16, 7]), [5, 8, 11, 0]
    places = [7, 8, 11, 3]
    held = GradientRows(classifier.model, "reward")
    slots = held.allocate(4)
    read = [i for i in range(4) if cuts[i]]
    held.extend([slots[i] for i in read], [ids[i][: cuts[i]] for i in read])
    num_read = sum(cuts)
    for _ in range(2):  # what a gradient pass leaves behind serves as what any pass leaves
        logits, gradients = held.extend_with_gradient(
            slots,
            [row[cut:] for row, cut in zip(ids, cuts, strict=True)],
            [p - c for p, c in zip(places, cuts, strict=True)],
            1,
        )
        whole_logits, expected = whole_with_gradient(classifier, ids, places)
        torch.testing.assert_close(logits, whole_logits)
        torch.testing.assert_close(gradients, expected)
        assert gradients.abs().sum(dim=1).min() > 0
        num_read += sum(len(row) - cut for row, cut in zip(ids, cuts, strict=True))
        cuts = [c + 1 if c < p else c for c, p in zip(cuts, places, strict=True)]
        for slot, cut in zip(slots, cuts, strict=True):
            held.roll_back(slot, cut)
    assert held.num_forwarded == num_read
    again = held.extend(slots, [row[cut:] for row, cut in zip(ids, cuts, strict=True)])
    torch.testing.assert_close(again, whole_logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.usefixtures("exact_norms")
def test_a_gradient_after_a_cached_prefix_equals_finite_differences(name):
    classifier = family(name)
    classifier.model.requires_grad_(False)
    (row,) = ragged([12])
    held = GradientRows(classifier.model, "reward")
    (slot,) = held.allocate(1)
    held.extend([slot], [row[:6]])
    _, (gradient,) = held.extend_with_gradient([slot], [row[6:]], [1], 1)
    embeds = classifier.model.get_input_embeddings().weight[row].detach()
    for i in (0, 9, 31):
        ends = []
        for sign in (1, -1):
            moved = embeds.clone()
            moved[7, i] += sign * STEP
            with torch.no_grad():
                ends.append(float(classifier.model(inputs_embeds=moved[None]).logits[0, 1]))
        assert float(gradient[i]) == pytest.approx((ends[0] - ends[1]) / (2 * STEP), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("template", [CLOSED, OPEN])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_response_is_put_into_the_rewards_own_template(rewards, name, template):
    reward = with_template(rewards[name], template)
    tokenizer = reward.classifier.tokenizer
    before, after = around(reward, CHAT)
    for text in ("bread", "grow red tomatoes", "no, thanks"):
        row = before + tokenizer(text, add_special_tokens=False)["input_ids"] + after
        rendered = render_exchange(tokenizer, CHAT, text)
        assert rendered[: len(row)] == row
        assert all(token == reward.classifier.pad_id for token in rendered[len(row) :])
    assert (len(after) > 0) == (template == CLOSED)


@pytest.mark.parametrize("template", [GPT2_TEMPLATE, GPT2_TEMPLATE.replace("content'] }}", "content'] | trim }}")])
def test_a_response_that_begins_with_a_space_follows_a_template_that_ends_with_one(rewards, template):
    """As policies write it whose generation prompt ends at the colon; any other is the same text."""
    reward = with_template(rewards["gpt2"], template)
    tokenizer = reward.classifier.tokenizer
    before, after = around(reward, CHAT)
    for text in (" bread", " grow red tomatoes", "no, thanks"):
        row = before + tokenizer(text, add_special_tokens=False)["input_ids"] + after
        rendered = render_exchange(tokenizer, CHAT, text)
        if text.startswith(" "):
            assert rendered[: len(row)] == row
        elif "trim" not in template:
            assert tokenizer.decode(rendered[: len(row)]).startswith(tokenizer.decode(row))


@pytest.mark.parametrize("change", ["upper", "replace('a', '')"])
def test_a_template_that_changes_a_response_is_refused(rewards, change):
    template = f"{{% for m in messages %}}{{{{ m['content'] | {change} }}}}\n{{% endfor %}}"
    with pytest.raises(ConfigError, match=r"^reward 'gpt2': where a response begins and ends cannot be told in its"):
        around(with_template(rewards["gpt2"], template), CHAT)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ConfigError, match=r"^reward 'r': 'tiny' asked to score embeddings in place of tokens cannot"):
        EmbeddedReward(tiny_classifier(ENCODER_DECODER))


def test_one_vocabulary_is_needed(policy, tiny, rewards):
    own = load_reward("proxy", RewardSpec(model=str(tiny.reward)))
    check_shared_vocabulary(policy, own, "ggro")

    def having(**added):
        tokenizer = AutoTokenizer.from_pretrained(tiny.reward)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<more>"]}) if "special" in added else None
        if "plain" in added:
            tokenizer.add_tokens(["zebra"])
        return Reward("r", dataclasses.replace(own.classifier, tokenizer=tokenizer, source="reward 'r'"))

    check_shared_vocabulary(policy, having(special=True), "ggro")
    number = len(policy.tokenizer)
    with pytest.raises(ConfigError, match=rf"'r' \(.*\) differ in 1 token ids, e\.g\. {number} \(None and 'zebra'\)"):
        check_shared_vocabulary(policy, having(plain=True), "ggro")
    with pytest.raises(
        ConfigError, match=r"^sea needs one vocabulary, but policy 'base' and reward 'llama'.*cards or bon"
    ):
        check_shared_vocabulary(policy, rewards["llama"], "sea")
    function = reward_from_function(lambda prompts, **_: [0.0] * len(prompts), "f")
    with pytest.raises(ConfigError, match="'f' is no classifier; use method cards or bon instead"):
        check_shared_vocabulary(policy, function, "sea")


def test_what_is_constant_costs_no_gradient():
    size = ModelSize(num_parameters=1000, full_width=64)
    assert suffix_backward_flops(size, 0, 9) == backward_flops(size, 9)
    # The last 9 of 30: attention to the first 21 has one factor with a gradient in each of its products.
    assert suffix_backward_flops(size, 21, 9) == 2 * 1000 * 9 + 4 * 64 * 9 * 21 + 8 * 64 * 45
    assert suffix_backward_flops(size, 21, 9) < 2 * forward_flops(size, 21, 9)
