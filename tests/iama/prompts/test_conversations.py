"""Templates by every kind of conversation: what they lose, refuse, or do not end where an answer begins."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing

from iama.errors import IamaWarning, ModelError
from iama.prompts.conversations import check_exchanges, render_prompts
from iama.prompts.render import render_prompt
from tests.conftest import CHAT_TEMPLATE, make_tokenizer

USER = [{"role": "user", "content": "how to bake bread"}]
SYSTEM = [{"role": "system", "content": "be careful"}, *USER]
ROWS = [USER] * 6 + [SYSTEM] + [USER]
ASKS = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
IN_LISTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
) + ASKS
LISTS_ONLY = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'][0]['text'] }}<|end|>{% endfor %}" + ASKS
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS + ASKS
DROPS_SYSTEM = TURNS.replace("in messages", "in messages if m['role'] != 'system'") + ASKS
LAST_ONLY = "<|{{ messages[-1]['role'] }}|>{{ messages[-1]['content'] }}<|end|>" + ASKS
NO_ANSWER = TURNS.replace("in messages", "in messages if m['role'] != 'assistant'") + ASKS
INST = "{% for m in messages %}{% if m['role'] == 'assistant' %} {{ m['content'] }}<|end|>{% else %}"
INST += "[I]{{ m['content'] }}[/I]{% endif %}{% endfor %}"
CHATML = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
CHATML += "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
THINKING = TURNS + "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
NO_THOUGHT = THINKING.replace("<think>\n", "<think>\n\n</think>\n")
EMPTY_THOUGHT = TURNS.replace(
    "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}<t></t>{% endif %}{{ m['content'] }}"
)
CUTS = TURNS.replace("m['content']", "m['content'][:20]")
BY_WORD = "{% if 'careful' in messages[0]['content'] %}{{ raise_exception('no care') }}{% endif %}" + TURNS
CHANGES_WORD = TURNS.replace("m['content']", "m['content'] | replace('careful', '')")
NOT_JINJA = TURNS + "{% if %}"
LISTS = "reads contents as lists of parts, and loses those that are texts"
THE_SEVENTH = r"^prompts: prompt 7 \('system: be careful\\nuser: how to bake bread'\): the chat template of .*"


def of(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            TURNS,
            r"prompt 1 .* has no generation prompt, so the policy would answer before '<\|assistant\|>'; add {% if",
        ),
        (TURNS.replace("<|end|>", "\n"), "has no generation prompt"),
        (
            TURNS + "{% if add_generation_prompt %}<|assistant|><|end|>{% endif %}",
            "ends with '<|end|>', which ends a resp",
        ),
        (IN_LISTS, LISTS),
        (LISTS_ONLY, LISTS),
        (NO_SYSTEM, f"{THE_SEVENTH}refuses messages with the roles system, user .*no system"),
        (DROPS_SYSTEM, f"{THE_SEVENTH}leaves out the message of the role 'system'; mend the template"),
        (LAST_ONLY, "prompt 1 .*leaves out the message of the role 'user'"),  # once it is answered
        (NO_ANSWER, "leaves out the answer; mend the template"),
        (CUTS + ASKS, "cuts the message of the role 'user'"),
        (BY_WORD + ASKS, f"{THE_SEVENTH}refuses .*no care"),
        (CHANGES_WORD + ASKS, f"{THE_SEVENTH}leaves out, or changes, words"),
        (None, "prompt 1 .*has no chat template"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*does not begin an answer so:iama.errors.IamaWarning")
def test_templates_that_spoil_a_policys_prompts(template, told):
    tokenizer = of(template)
    with pytest.raises(
        ModelError, match=told.replace("<|", r"<\|").replace("|>", r"\|>") if "\\" not in told else told
    ):
        render_prompts(tokenizer, ROWS, {tokenizer.eos_token_id}, "prompts")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (IN_LISTS, LISTS),
        (LISTS_ONLY, LISTS),
        (NO_SYSTEM, f"{THE_SEVENTH}refuses messages with the roles system, user, assistant"),
        (DROPS_SYSTEM, f"{THE_SEVENTH}leaves out the message of the role 'system'"),
        (NO_ANSWER, "leaves out the answer"),
        (CUTS, "cuts the message of the role 'user'"),
        (TURNS.replace("m['content']", "m['content'] | truncate(1000)"), "cuts the message of the role 'user'"),
        (BY_WORD, f"{THE_SEVENTH}refuses .*no care"),
        (CHANGES_WORD, f"{THE_SEVENTH}leaves out, or changes, words of the message of the role 'system'"),
        (NOT_JINJA, r"is not valid Jinja \(line 1: .*\); mend that line"),
        (None, "prompt 1 .*has no chat template"),
    ],
)
def test_templates_that_spoil_what_a_reward_reads(template, told):
    with pytest.raises(ModelError, match=told):
        check_exchanges(of(template), ROWS, "prompts")


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, INST, CHATML, THINKING, NO_THOUGHT, EMPTY_THOUGHT + ASKS, TURNS + ASKS]
)
def test_templates_that_are_well(template):
    """Generation prompts that open a thought, answers that stand behind an empty one, and no header at all."""
    tokenizer = of(template)
    rendered = render_prompts(tokenizer, ROWS, {tokenizer.eos_token_id}, "prompts")
    assert rendered == [render_prompt(tokenizer, prompt) for prompt in ROWS]
    check_exchanges(tokenizer, ROWS, "prompts")


def test_an_answer_that_begins_otherwise_than_it_is_asked_for_is_told_of():
    tokenizer = of(TURNS + "{% if add_generation_prompt %}<|bot|>{% endif %}")
    with pytest.warns(IamaWarning, match=r"ends a prompt with '.*<\|bot\|>', but does not begin an answer so"):
        render_prompts(tokenizer, [USER], {tokenizer.eos_token_id}, "prompts")


def test_text_prompts_that_end_with_an_end_token():
    tokenizer = make_tokenizer()
    ends = {tokenizer.eos_token_id}
    assert render_prompts(tokenizer, ["bake bread"], ends, "p") == [tokenizer("bake bread")["input_ids"]]
    with pytest.raises(
        ModelError, match=r"^p: prompt 2 \('bread<\|end\|>'\) ends with .*; leave it out of the prompt$"
    ):
        render_prompts(tokenizer, ["bake bread", "bread<|end|>"], ends, "p")
    special = [("<|end|>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A <|end|>", special_tokens=special)
    with pytest.raises(
        ModelError,
        match=r"prompt 1 .*puts it behind every text: take it out of post_processor in tokenizer",
    ):
        render_prompts(tokenizer, ["bake bread"], ends, "p")


def test_where_a_word_ends_responses_prompts_may_end_with_it():
    tokenizer = make_tokenizer()
    last = tokenizer("bake bread")["input_ids"][-1]
    assert len(render_prompts(tokenizer, ["bake bread"], {last}, "p")) == 1


def test_the_words_beside_a_call_of_a_tool_may_be_passed_over():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}
    prompt = [*USER, call, {"role": "tool", "content": "5"}]
    tokenizer = of(TURNS.replace("in messages", "in messages if not m['tool_calls']") + ASKS)
    check_exchanges(tokenizer, [prompt, [*USER, {**call, "content": "now"}, prompt[-1]]], "r")


def test_thoughts_and_switches_of_thinking_may_be_taken_out():
    prompt = [
        {"role": "system", "content": "be careful /no_think"},
        *USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nmix flour"},
        {"role": "tool", "content": 'say "5"'},
        {"role": "user", "content": " and then? "},
    ]
    content = "m['content'].split('</think>')[-1].replace('/no_think', '') | trim"
    content = f"(m['content'] | tojson if m['role'] == 'tool' else {content})"
    check_exchanges(of(TURNS.replace("m['content']", content)), [prompt], "r")


def test_prompts_that_come_in_pieces_are_looked_at_once():
    checked = set()
    check_exchanges(of(CHAT_TEMPLATE), [USER, SYSTEM], "r", checked)
    known = set(checked)
    assert all(message["content"] not in repr(known) for prompt in (USER, SYSTEM) for message in prompt)
    check_exchanges(of(CHAT_TEMPLATE), [USER, SYSTEM] * 2, "r", checked)
    assert checked == known
    no_cake = of(BY_WORD.replace("careful", "cake").replace("no care", "no cake"))
    with pytest.raises(ModelError, match=r"^r: the prompt 'make a cake': .*refuses .*no cake"):
        check_exchanges(no_cake, [USER, [{"role": "user", "content": "make a cake"}]], "r", checked)
    check_exchanges(of(None), [USER, SYSTEM], "r", checked)
    with pytest.raises(ModelError, match=r"^r: the prompt '5': "):
        check_exchanges(of(None), [[{"role": "tool", "content": "5"}]], "r", checked)


def test_a_kind_that_was_refused_is_refused_again():
    """What is known to be written rightly is not what was merely looked at."""
    checked = set()
    for _ in range(2):
        with pytest.raises(ModelError, match="leaves out the message of the role 'system'"):
            render_prompts(of(DROPS_SYSTEM), [SYSTEM], {0}, "p", checked)
    spoils = of(TURNS.replace("m['content']", "m['content'] | replace('cake', '')"))
    for _ in range(2):
        with pytest.raises(ModelError, match="leaves out, or changes, words"):
            check_exchanges(spoils, [[{"role": "user", "content": "make a cake"}]], "r", checked)
