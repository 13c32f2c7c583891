"""What an export may say to strangers: no local path, and the push to the hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from iama.calls import read_call
from iama.config.manifest import Manifest, ManifestCriterion
from iama.config.schema import validate
from iama.errors import ConfigError, RunError
from iama.nearest import nearest

HUB_COMMIT = re.compile(r"[0-9a-f]{40}")
"""The revision of a model of the hub; that of a local folder has 32 digits (`iama.models.fingerprint`)."""
JUDGE_URL = "http://JUDGE-HOST/v1"
"""In the place of a judge's address, which may name a machine of a private network."""


def published(manifest: Manifest, base_model: str, rewards: Mapping[str, str]) -> Manifest:
    """The manifest under public names: the base's, and that of every reward in `rewards` (by criterion).

    A local reward without one keeps the last part of its path, which tells what it was and not where; a judge's address
    becomes `JUDGE_URL`. Raises `ConfigError` for a name of no criterion.
    """
    names = [c.name for c in manifest.criteria]
    for name in rewards:
        if name not in names:
            raise ConfigError(
                f"--reward-name {name}={rewards[name]}: no such criterion; {nearest(name, names, 'criteria')}"
            )
    criteria = [_published(c, rewards.get(c.name)) for c in manifest.criteria]
    return manifest.model_copy(update={"base_model": base_model, "criteria": criteria})


def _published(criterion: ManifestCriterion, name: str | None) -> ManifestCriterion:
    reward = criterion.reward
    if name is not None and reward.model is None:
        raise ConfigError(
            f"--reward-name {criterion.name}={name}: its reward is a {reward.source}, which has no hub name; "
            "leave the option out"
        )
    raw = criterion.model_dump(mode="json")
    raw["reward"] = _without_places(raw["reward"], [criterion.reward_revision, *criterion.member_revisions])
    raw["reward"] |= {} if name is None else {"model": name}
    return validate(raw, ManifestCriterion, "iama.json")


def _without_places(reward: dict[str, Any], revisions: Sequence[str | None]) -> dict[str, Any]:
    """A reward without folders and hosts, by what is recorded: what lies on this disk at this moment tells nothing.

    `revisions` are the reward's, and those of an ensemble's members. A model keeps its whole name where its revision is
    a commit of the hub.
    """
    renamed = dict(reward)
    if reward["model"] is not None and not HUB_COMMIT.fullmatch(revisions[0] or ""):
        renamed["model"] = _last_part(reward["model"])
    if reward["function"] is not None:
        renamed["function"] = _code_without_places(reward["function"])
    if reward.get("kind") is not None:
        renamed["kind"] = _kind_without_places(reward["kind"])
    if reward["judge"] is not None:
        renamed["judge"] = reward["judge"] | {"url": JUDGE_URL}
        for key in ("model", "prompt_file", "cache"):
            renamed["judge"][key] = _last_part(reward["judge"][key])
    if reward["ensemble"] is not None:
        members = zip_longest(reward["ensemble"]["members"], revisions[1:])
        public = [_without_places(member, [known]) for member, known in members]
        renamed["ensemble"] = reward["ensemble"] | {"members": public}
    return renamed


def _code_without_places(reference: str) -> str:
    """`path/to/file.py:name` without the folders; `package.module:name` as it is."""
    path, colon, name = reference.rpartition(":")
    return f"{_last_part(path)}{colon}{name}" if path.endswith(".py") else reference


def _kind_without_places(kind: str) -> str:
    """A kind, whose settings may be paths and addresses, too."""
    call = read_call(kind)
    name = _code_without_places(call.name)
    settings = [f"{key}={_value_without_places(value)}" for key, value in call.arguments]
    return f"{name}({', '.join(settings)})" if settings else name


def _value_without_places(value: str) -> str:
    return _last_part(value.strip("'\"")) or value if re.search(r"[/\\]", value) else value


def _last_part(path: str) -> str:
    """Behind the last slash, of either kind."""
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload an export to the hub as `repository` (org/name); returns its address. Raises `RunError`."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of iama")
    except Exception as error:  # of many classes: of the hub, and of its HTTP library where there is no network
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise RunError(
            f"--push-to-hub {repository}: {reason}; the export is whole in {str(folder)!r}, upload it with "
            f"`hf upload {repository} {folder}`"
        ) from error
    return str(url)
