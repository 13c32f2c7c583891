"""SEA as it is described: one chain, no padding, dense one-hot weights, and autograd through all of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from iama.prompts.render import render_prompt
from inference.engine.random_streams import prompt_keys, stream_keys
from inference.samplers.sea import NOISE_STREAM

BETAS, EPSILON = (0.9, 0.999), 1e-8


@dataclass
class SlowChain:
    token_ids: tuple[int, ...] = ()
    state_TV: torch.Tensor | None = None
    rewards: list[float] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    best_step: int = 0


def straight_through(state_TV):
    """One-hot forward, softmax backward."""
    law_TV = state_TV.softmax(dim=-1)
    hard_TV = torch.nn.functional.one_hot(state_TV.argmax(dim=-1), state_TV.shape[1]).to(law_TV)
    return hard_TV + law_TV - law_TV.detach()


def end_of(tokens, end_ids):
    """Tokens before the first end token, and with it."""
    number = next((i for i, token in enumerate(tokens) if token in end_ids), len(tokens))
    return number, min(number + 1, len(tokens))


def parts(policy, reward, prompt_ids, before, after, weight_TV):
    """Log-probability and reward of weights [T, V], the text being that of each row's greatest weight."""
    num_text, num_counted = end_of(weight_TV.argmax(dim=-1).tolist(), policy.eos_token_ids)
    table = policy.model.get_input_embeddings().weight
    inputs = torch.cat([table[torch.tensor(prompt_ids)], weight_TV @ table[: weight_TV.shape[1]]])
    logits = policy.model(inputs_embeds=inputs[None]).logits[0, len(prompt_ids) - 1 : -1]
    log_prob = (weight_TV * logits.log_softmax(dim=-1))[:num_counted].sum()
    classifier = reward.classifier
    table = classifier.model.get_input_embeddings().weight
    size = min(len(table), weight_TV.shape[1])
    text = weight_TV[:num_text, :size] @ table[:size]
    before, after = (table[torch.tensor(ids, dtype=torch.long)] for ids in (before, after))
    logits = classifier.model(inputs_embeds=torch.cat([before, text, after])[None]).logits
    return log_prob, logits[0, classifier.head] * classifier.sign


def slow_chain(policy, reward, settings, prompt, template, token_ids, silent_V, *, c, seed):
    """Chain `c` of a prompt, from a sampled response."""
    prompt_ids = render_prompt(policy.tokenizer, prompt)
    (stream,) = stream_keys(seed, prompt_keys([prompt_ids]), [NOISE_STREAM + c]).tolist()
    generator = torch.Generator().manual_seed(stream % 2**63)
    shape = len(token_ids), policy.model.config.vocab_size

    def noise():
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    if settings.init == "random":
        state = noise().masked_fill(silent_V, -torch.inf)
    else:
        with torch.no_grad():
            logits = policy.model(torch.tensor([[*prompt_ids, *token_ids]])).logits[0, len(prompt_ids) - 1 : -1]
        state = logits.masked_fill(silent_V, -torch.inf)
        for t, token in enumerate(token_ids):
            state[t, token] = logits[t].max() + settings.margin
    chain, best = SlowChain(), -torch.inf
    mean = square = torch.zeros_like(state)
    for step in range(settings.num_steps + 1):
        state = state.detach().requires_grad_()
        log_prob, value = parts(policy, reward, prompt_ids, *template, straight_through(state))
        chain.rewards.append(value.item())
        chain.log_probs.append(log_prob.item())
        kept = value.item() if settings.keep == "reward" else (log_prob + settings.alpha * value).item()
        if kept > best:
            best, chain.best_step = kept, step
            tokens = state.argmax(dim=-1).tolist()
            chain.token_ids = tuple(tokens[: end_of(tokens, policy.eos_token_ids)[1]])
        chain.state_TV = state.detach()
        if step == settings.num_steps:
            break
        (gradient,) = torch.autograd.grad(-(log_prob + settings.alpha * value), state)
        gradient = gradient.nan_to_num(0.0)  # of what the policy may not say: 0 times infinity
        mean = BETAS[0] * mean + (1 - BETAS[0]) * gradient
        square = BETAS[1] * square + (1 - BETAS[1]) * gradient**2
        if settings.optimiser == "adam":
            spread = (square / (1 - BETAS[1] ** (step + 1))).sqrt() + EPSILON
            move = mean / (1 - BETAS[0] ** (step + 1)) / spread
        else:
            move = gradient
        state = state.detach() - settings.learning_rate * move
        if settings.noise and step < settings.num_steps - 1:
            state = state + settings.noise * (1 - step / (settings.num_steps - 1)) * noise()
    return chain


def slow_top_k(policy, prompt, state_TV, k, silent_V):
    """Left to right, the best of the policy's `k` likeliest after what is decoded; of those with text if need be."""
    prompt_ids, tokens = render_prompt(policy.tokenizer, prompt), []
    for state_V in state_TV:
        with torch.no_grad():
            logits = policy.model(torch.tensor([[*prompt_ids, *tokens]])).logits[0, -1]
        ranked = sorted(range(len(logits)), key=lambda v: -logits[v].item())
        tokens.append(max(ranked[:k], key=lambda v: state_V[v].item()))
        if silent_V[tokens[-1]]:
            tokens[-1] = max([v for v in ranked if not silent_V[v]][:k], key=lambda v: state_V[v].item())
        if tokens[-1] in policy.eos_token_ids:
            break
    return tuple(tokens)
