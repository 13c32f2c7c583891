"""What was trained and how it was judged: names and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iama.config.specs import SOURCES
from inference.evaluation.summary import Summary
from inference.report import words
from inference.statistics.break_even import NOT_KNOWN


def _texts(value: Any) -> list[str]:
    """A text, or the texts of a list; of several seeds together, those of each."""
    if isinstance(value, list):
        return list(dict.fromkeys(text for item in value for text in _texts(item)))
    return [value] if isinstance(value, str) else []


def facts(summary: Summary) -> list[tuple[str, str]]:
    """What was trained and how it was judged: a name and its value."""
    config, trained = summary["config"], summary["trained"]
    spec = (config.get("policies") or {}).get(trained) or {}
    places = [", ".join(_texts(spec.get(key))) for key in ("path", "adapter", "pool")]
    sampling = config.get("sampling") or {}
    limits = {"temperature {}": sampling.get("temperature"), "at most {} tokens": sampling.get("max_new_tokens")}
    seeds = f" in each of {words.num_seeds(summary)} seeds" if words.num_seeds(summary) > 1 else ""
    held_out = "held-out " if summary.get("num_seen_prompts") == 0 else ""
    rows = [
        ("Policy", f"{trained}: {' + '.join(p for p in places if p)}" if any(places) else trained),
        ("Trained for", _operators(summary)),
        ("Training runs", ", ".join(_texts(spec.get("training_run")))),
        ("Compared with", ", ".join(r for r in summary["references"] if r in summary["policies"])),
        ("Criteria", "; ".join(_criterion(c) for c in config.get("criteria") or [])),
        ("Served with", ", ".join(words.method_title(m) for m in summary["methods"])),
        ("Judged on", f"{words.number(words.num_asked(summary))} {held_out}prompts{seeds}, "
         f"{words.number(summary['num_samples'])} samples a prompt and policy"),
        ("Sampling", "as its pool file says" if spec.get("pool") else
         ", ".join(text.format(words.number(v)) for text, v in limits.items() if v is not None)),
        ("Pays back", _pays_back(summary)),
    ]  # fmt: skip
    return [(name, value) for name, value in rows if value]


def _operators(summary: Summary) -> str:
    """The manifest's operators, or else the budget that savings are told for."""
    manifest = summary["manifest"]
    if not manifest:
        return f"not recorded; savings are told for {words.number(summary['trained_budget'])} samples"
    operators = ", ".join(f"{c['name']} by {c['operator']}" for c in manifest.get("criteria") or [])
    drawn = ", weights drawn for each group" if manifest.get("weights") == "simplex" else ""
    aggregate, estimator = manifest.get("aggregate", "sum"), manifest.get("estimator", "-")
    return f"{operators} ({aggregate} of them{drawn}, estimator {estimator})"


def _criterion(criterion: Mapping[str, Any]) -> str:
    proxy, gold = (_source(criterion.get(role)) for role in ("proxy", "gold"))
    return f"{criterion.get('name')}: {proxy} selects, {gold + ' judges' if gold else 'nothing judges'}"


def _source(spec: Mapping[str, Any] | None) -> str:
    """What a reward reads, in a few words."""
    if not spec:
        return ""
    if ensemble := spec.get("ensemble"):
        return f"{ensemble.get('aggregate', 'mean')} of {', '.join(map(_source, ensemble.get('members') or []))}"
    kind = next((name for name in SOURCES if spec.get(name)), None)
    value = spec.get(kind) if kind else None
    return f"{value.get('model', kind)} (judge)" if isinstance(value, dict) else str(value or "?")


def _pays_back(summary: Summary) -> str:
    """When training has paid for itself, at best and at worst over references and criteria."""
    known = [row["queries"] for row in summary["break_even"] if row["queries"] is not None]
    most = "at most " if any(row["bound"] for row in summary["break_even"]) else ""
    lacking = [row["note"] or "" for row in summary["break_even"] if row["queries"] is None]
    unknown = sum(NOT_KNOWN in note for note in lacking)
    told = (("never", len(lacking) - unknown), ("not known", unknown))
    others = [f"{what} in {number} case{'s' * (number > 1)}" for what, number in told if number]
    if not known:
        return "; ".join(others)
    first, last = words.number(min(known)), words.number(max(known))
    reach = f"after {most}{first if first == last else f'{first} to {last}'} queries"
    return "; ".join([f"{reach}, by reference and criterion", *others])
