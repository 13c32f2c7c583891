"""How far a policy is from the base on held-out prompts, from samples that are on disk."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.progress import track

from iama.config.specs import PolicySpec
from iama.files import write_atomically
from iama.models.fingerprint import fingerprint
from iama.prompts.data import load_prompts
from iama.prompts.render import render_prompt
from inference.pools.journal import digest
from scripts.experiments import common
from scripts.experiments.pools import SAMPLING, prefixed, quieten

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from inference.engine.policy import Policy

NUM_SAMPLES = 8
Sequences = list[tuple[list[int], list[int]]]


def kl_to_base(
    seed: int,
    adapters: Mapping[str, Path | None],
    texts: Mapping[str, list[list[str]]],
    prefixes: Mapping[str, str],
    split: str = "test",
) -> dict[str, float]:
    """KL to the base, nats per token, of each policy on its own samples `[P][S]` (the first 8 of a prompt).

    The mean of the log ratio over tokens. Texts are tokenised again, which can differ from how they were sampled; the
    base always sees the plain prompt. Kept on disk.
    """
    home = common.world(seed)
    rows = load_prompts(home / f"prompts-{split}.jsonl")
    path = common.FOLDER / "pools" / f"{split}-{seed}" / "kl.json"
    known: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {}
    for name, adapter in track(adapters.items(), f"KL to the base, seed {seed}", total=len(adapters), transient=True):
        if adapter is None:
            found[name] = 0.0
            continue
        kept = [some[:NUM_SAMPLES] for some in texts[name]]
        key = digest([name, fingerprint(adapter), kept])
        if key not in known:
            known[key] = _measure(home, adapter, rows, kept, prefixes.get(name, ""))
            write_atomically(path, json.dumps(known))
        found[name] = known[key]
    return found


def _measure(home: Path, adapter: Path, rows: list[dict[str, Any]], texts: list[list[str]], prefix: str) -> float:
    from inference.engine.policy import load_policy

    quieten()
    base = load_policy("base", PolicySpec(path=str(home / "policy")))
    policy = load_policy("policy", PolicySpec(path=str(home / "policy"), adapter=str(adapter)))
    told = _log_probs(policy, _sequences(policy, [prefixed(row, prefix) for row in rows], texts))
    plain = _log_probs(base, _sequences(base, rows, texts))
    assert len(told) == len(plain)
    return float(sum(told) - sum(plain)) / len(told)


def _sequences(policy: Policy, rows: Sequence[dict[str, Any]], texts: list[list[str]]) -> Sequences:
    """Prompt and response ids of every sample; a response that leaves room is taken to have ended itself."""
    end = policy.tokenizer.eos_token_id
    pairs = []
    for row, some in zip(rows, texts, strict=False):  # fewer texts where a pool took fewer prompts
        prompt = render_prompt(policy.tokenizer, row["prompt"])
        for text in some:
            ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
            pairs.append((prompt, [*ids, end][: SAMPLING.max_new_tokens]))
    return pairs


def _log_probs(policy: Policy, pairs: Sequences, batch_size: int = 64) -> list[float]:
    """Log probability of every response token, one after the other."""
    import torch

    out: list[float] = []
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        width = max(len(prompt) + len(response) for prompt, response in batch)
        ids = torch.tensor([[*p, *r, *[0] * (width - len(p) - len(r))] for p, r in batch])  # what follows is not read
        with torch.inference_mode():
            log_probs = policy.model(input_ids=ids).logits[:, :-1].float().log_softmax(dim=-1)
        taken = log_probs.gather(2, ids[:, 1:, None])[..., 0]
        for row, (prompt, response) in zip(taken, batch, strict=True):
            out += row[len(prompt) - 1 : len(prompt) - 1 + len(response)].tolist()
    return out
