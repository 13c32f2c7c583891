"""What an export may say to strangers: no local path, what vLLM takes, and the push to the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iama.errors import ConfigError, RunError
from iama.manifest import Manifest, ManifestCriterion
from iama.schema import nearest, validate

if TYPE_CHECKING:
    from collections.abc import Mapping

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values that vLLM takes for max_lora_rank; an adapter's rank is padded up to one of them."""


def published(manifest: Manifest, base_model: str, rewards: Mapping[str, str]) -> Manifest:
    """The manifest under public names: the base's, and that of every reward in `rewards` (by criterion).

    A reward without one keeps the last part of its path, which tells what it was and not where. Raises `ConfigError`
    for a name of no criterion.
    """
    names = [c.name for c in manifest.criteria]
    for name in rewards:
        if name not in names:
            raise ConfigError(f"--reward-name {name}={rewards[name]}: no such criterion; {nearest(name, names)}")
    criteria = [_published(c, rewards.get(c.name)) for c in manifest.criteria]
    return manifest.model_copy(update={"base_model": base_model, "criteria": criteria})


def _published(criterion: ManifestCriterion, name: str | None) -> ManifestCriterion:
    raw = criterion.model_dump(mode="json")
    if name is not None and criterion.reward.model is None:
        raise ConfigError(
            f"--reward-name {criterion.name}={name}: its reward is a {criterion.reward.source}, which has no hub name; "
            "leave the option out"
        )
    raw["reward"] = _without_folders(raw["reward"]) | ({} if name is None else {"model": name})
    return validate(raw, ManifestCriterion, "iama.json")


def _without_folders(value: Any) -> Any:
    """A copy in which every text that names something on this machine has lost its folders."""
    if isinstance(value, dict):
        return {key: _without_folders(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_folders(item) for item in value]
    return _last_part(value) if isinstance(value, str) else value


def _last_part(text: str) -> str:
    path, colon, function = text.rpartition(":") if ".py:" in text else (text, "", "")
    return f"{Path(path).name}{colon}{function}" if _is_local(path) else text


def _is_local(text: str) -> bool:
    """Whether a text names a file or folder of this machine."""
    return "://" not in text and "/" in text and (Path(text).exists() or text.startswith(("/", "./", "../", "~")))


def vllm_objections(adapter: Path) -> list[str]:
    """Why vLLM would not take an adapter folder as a LoRA request; empty if it would.

    Its contract is of files: a rank that it pads to, no bias, no DoRA, no fully trained modules.
    """
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    objections = []
    if config["r"] > VLLM_RANKS[-1]:
        objections.append(f"rank {config['r']} is above {VLLM_RANKS[-1]}")
    if config.get("bias", "none") != "none":
        objections.append(f"bias is {config['bias']!r}, not 'none'")
    if config.get("use_dora"):
        objections.append("it uses DoRA")
    if config.get("modules_to_save"):
        objections.append(f"modules_to_save {config['modules_to_save']} were trained fully")
    return objections


def lora_rank(adapter: Path) -> int:
    """The `--max-lora-rank` with which vLLM serves an adapter folder."""
    rank = int(json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))["r"])
    return next((known for known in VLLM_RANKS if known >= rank), VLLM_RANKS[-1])


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload an export to the hub as `repository` (org/name); returns its address. Raises `RunError`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

    api = HfApi()
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export of iama")
    except (HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise RunError(
            f"--push-to-hub {repository}: {reason}; the export is whole in {str(folder)!r}, upload it with "
            f"`hf upload {repository} {folder}`"
        ) from error
    return str(url)
