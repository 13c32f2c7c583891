"""The README.md of an export: what the weights are, how they are meant to be served, and what they are without that."""

from __future__ import annotations

import filecmp
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from iama.config.manifest import FILE_NAME, Manifest, ManifestCriterion, load_manifest
from iama.errors import RunError
from iama.files import lacks
from iama.objective.operators import parse_operator, served_instead
from iama.reading import read_object

SUMMARY = "summary.json"
UNMEASURED = (
    "**Quality without a sampler was not measured.** A base made for a sampler can be worse without it, even unsafe: "
    "measure it with `iama evaluate`, and export with `--evaluation`."
)
TITLES = {"base": "the untrained base", "grpo": "linear GRPO"}


@dataclass(frozen=True)
class PlainQuality:
    """Mean reward of a single sample, by criterion and policy; `metric` is gold, or proxy where there is no gold."""

    trained: str
    values: dict[str, dict[str, float]]
    metric: dict[str, str]
    num_prompts: int


def read_plain_quality(evaluation: Path, run: Path, manifest: Manifest) -> PlainQuality:
    """What an evaluation says of single samples: of the trained policy, and of all references.

    Raises `RunError` where the folder holds no evaluation, or one of another policy than what `run` trained, of other
    criteria or without a single sample.
    """
    path = evaluation / SUMMARY
    if not path.is_file():
        raise RunError(f"--evaluation {lacks(evaluation, SUMMARY)}; give a folder of `iama evaluate`")
    summary = read_object(path, RunError, "run `iama evaluate` again")
    _check_trained(summary, evaluation)
    try:
        rows = [row for row in summary["curves"] if row["method"] == "bon" and row["samples"] == 1]
        policies = [summary["trained"], *summary["references"]]
        subject = dict(summary["config"]["policies"][summary["trained"]])
        num_prompts = int(summary["num_prompts"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"--evaluation {str(evaluation)!r}: its {SUMMARY} is not of `iama evaluate`") from error
    if not _is_trained_by(run, manifest, subject):
        model = subject.get("adapter") or subject.get("path") or subject.get("pool")
        raise RunError(
            f"--evaluation {str(evaluation)!r}: its {policies[0]!r} is {str(model)!r}, which is not what {str(run)!r} "
            f"trained; give an evaluation with the adapter {str(run / 'adapter')!r} as its trained policy"
        )
    values: dict[str, dict[str, float]] = {}
    metric: dict[str, str] = {}
    for criterion in (c.name for c in manifest.criteria):
        single = {row["policy"]: row for row in rows if row["criterion"] == criterion and row["policy"] in policies}
        if policies[0] not in single:
            raise RunError(
                f"--evaluation {str(evaluation)!r} has no single sample of {policies[0]!r} for the criterion "
                f"{criterion!r}; evaluate the method bon with 1 among its budgets"
            )
        metric[criterion] = "gold" if all(row["gold"] is not None for row in single.values()) else "proxy"
        values[criterion] = {name: float(single[name][metric[criterion]]) for name in policies if name in single}
    return PlainQuality(policies[0], values, metric, num_prompts)


def _check_trained(summary: Mapping[str, Any], evaluation: Path) -> None:
    """Raise `RunError` where an evaluation's trained policy is not among those that it evaluated."""
    trained, config = summary.get("trained"), summary.get("config")
    policies = config.get("policies") if isinstance(config, Mapping) else None
    if "trained" in summary and isinstance(policies, Mapping) and trained not in policies:
        raise RunError(
            f"--evaluation {str(evaluation)!r} evaluated no policy {trained!r}, which its configuration calls "
            f"the trained one, but {', '.join(map(repr, policies))}; set `trained:` there to the policy with the run's "
            "adapter, and run `iama evaluate` again"
        )


def _is_trained_by(run: Path, manifest: Manifest, policy: Mapping[str, Any]) -> bool:
    """Whether an evaluated policy is what a run trained, for every criterion that it was trained for.

    It is the run's adapter or a copy of its weights, a model with the run's `iama.json`, or a pool that names the run.
    """
    changes = policy.get("by_criterion") or {}
    adapters = {(changes.get(c.name) or {}).get("adapter") or policy.get("adapter") for c in manifest.criteria}
    if adapters != {None}:
        return all(name is not None and _is_same_adapter(Path(name), run / "adapter") for name in adapters)
    if policy.get("path") is not None:
        return load_manifest(Path(policy["path"])) == manifest
    return [Path(folder).resolve() for folder in policy.get("training_run") or ()] == [run.resolve()]


def _is_same_adapter(folder: Path, other: Path) -> bool:
    if folder.resolve() == other.resolve():
        return True
    first, second = folder / "adapter_model.safetensors", other / "adapter_model.safetensors"
    return first.is_file() and second.is_file() and filecmp.cmp(first, second, shallow=False)


def model_card(manifest: Manifest, merged: bool, quality: PlainQuality | None = None) -> str:
    """The text of README.md; its first line says what a criterion is worth without its sampler."""
    rows = "\n".join(
        f"| {_cell(c.name)} | {_served(c)} | {'-' if c.budget is None else f'{c.budget:g}'} | {c.weight:g} "
        f"| `{_cell(c.reward.model or c.reward.function or c.reward.kind or c.reward.source)}` |"
        for c in manifest.criteria
    )
    fields = {"base_model": manifest.base_model, "tags": ["iama", "lora", "inference-time-alignment"]}
    fields |= {} if merged else {"library_name": "peft"}
    header = yaml.safe_dump(fields, sort_keys=False, default_flow_style=None, allow_unicode=True, width=math.inf)
    sampling = ", ".join(f"{name} {value}" for name, value in manifest.sampling.model_dump().items() if name != "stop")
    kind = "A merged model" if merged else "A LoRA adapter"
    return f"""---
{header}---
{UNMEASURED if quality is None else without_a_sampler(quality)}

# Meta-aligned with non-linear GRPO

{kind} for `{manifest.base_model}`, trained so that each criterion below is served well by a cheap inference-time
algorithm with the reward that selects. Without that algorithm it may serve a single criterion worse than its base.

| criterion | serve with | samples | weight | reward |
|---|---|---|---|---|
{rows}
{_notes(manifest)}
Sampled in training with {sampling}; seed {manifest.seed}.
`{FILE_NAME}` holds the same for programs; `iama generate` reads it.
"""


def _notes(manifest: Manifest) -> str:
    """What the table cannot say: a system message, operators that are no samplers, weights that were drawn."""
    notes = []
    if manifest.system_prompt is not None:
        text = _cell(manifest.system_prompt)
        notes.append(
            f"Trained after the system message `{text}`: give it with every prompt, as `iama generate` does. "
            "`iama serve` and other servers take it from the request."
        )
    unserved = [f"{_cell(c.name)} was trained for `{c.operator}`" for c in manifest.criteria if _instead(c) is not None]
    if unserved:
        what = "what training assumed, and no sampler; the table names what stands nearest"
        notes.append(f"{', '.join(unserved)}: {what}. `iama generate` needs it as `--method`.")
    if manifest.weights == "simplex":
        names = ", ".join(_cell(c.name) for c in manifest.criteria)
        notes.append(
            "Weights were drawn for each group; those above are concentrations of the Dirichlet law. Training ranked a "
            f"group by the weighted sum of {names}, not by one of them."
        )
    return "".join(f"\n{note}\n" for note in notes)


def _instead(criterion: ManifestCriterion) -> str | None:
    """What to serve in the place of an operator that is no sampler; None where it is one."""
    operator = parse_operator(criterion.operator)
    return served_instead(operator) if operator.budget is None else None


def _served(criterion: ManifestCriterion) -> str:
    """A cell of the table: the method that serves the criterion."""
    return f"`{_instead(criterion) or criterion.operator}`"


def _cell(text: str) -> str:
    """A text within a table of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")


def without_a_sampler(quality: PlainQuality) -> str:
    """One line: each criterion's mean reward of a single sample, beside that of every reference."""
    parts = []
    for criterion, values in quality.values.items():
        others = [f"{TITLES.get(name, name)} {v:.3f}" for name, v in values.items() if name != quality.trained]
        beside = f" ({', '.join(others)})" if others else ""
        parts.append(f"{criterion} {values[quality.trained]:.3f}{beside}")
    kinds = " or ".join(dict.fromkeys(quality.metric.values()))
    return (
        f"**Without a sampler** (one sample, mean {kinds} reward, {quality.num_prompts} prompts): {'; '.join(parts)}. "
        "Where that is below the base, do not serve this model without its sampler."
    )
