"""The methods of an evaluation that take their number from a tuning file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iama.config.files import EvaluationConfig
from iama.config.methods import Method
from iama.config.specs import Sampling
from iama.errors import DataError
from inference.evaluation.sources import Source
from inference.hedging.tuning_file import Calibration, Wanted, find, load_tuning, setting, text_id
from inference.pools.file import prompt_ids


def tuned_methods(
    config: EvaluationConfig, methods: Sequence[Method], rows: Sequence[Mapping[str, Any]], sources: Sequence[Source]
) -> dict[tuple[str, str, str], Method]:
    """By (policy, criterion, method as written) what each method that is written `tuned` is there.

    Raises `ConfigError` as `find` and `setting` do, `DataError` for a file that cannot be read, and where prompts of
    the evaluation are among those that were calibrated on.
    """
    asked = [method for method in methods if method.is_tuned]
    if not asked:
        return {}
    assert config.tuning is not None
    path = Path(config.tuning)
    tuning, numbers = load_tuning(path), {}
    for source in sources:
        header = source.header
        sampling = None if header["sampling"] is None else Sampling.model_validate(header["sampling"])
        for criterion in (c for c in config.criteria if c.name in source.criteria):
            rewards = (criterion.proxy, criterion.name, criterion.gold)
            calibration = find(tuning, path, Wanted(header["policy"], header["system_prompt"], sampling, *rewards))
            _check_disjoint(path, calibration, rows)
            for method in asked:
                numbers[source.policy, criterion.name, method.text] = setting(calibration, path, method)
    return numbers


def _check_disjoint(path: Path, calibration: Calibration, rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise `DataError` for prompts that were calibrated on, in whichever form; a repeated prompt's id has a number."""
    known, texts = {name.partition("-")[0] for name in calibration.prompt_ids}, set(calibration.text_ids)
    ids = [name.partition("-")[0] for name in prompt_ids(rows)]
    count = sum(name in known or text_id(row["prompt"]) in texts for name, row in zip(ids, rows, strict=True))
    if count:
        raise DataError(
            f"{path}: {count} of the evaluation's {len(ids)} prompts are among the {len(calibration.prompt_ids)} that "
            f"{calibration.policy.name!r} was calibrated on, or ask the same; tune on other prompts, or evaluate on "
            "others"
        )
