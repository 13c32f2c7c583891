"""Models as files and as numbers: what every model shares, whether it answers or scores.

Read `loading` first: folders are checked, and errors become one line; then `checkpoint`, which tells whether a model is
what it is used as. `flops` counts operations, `generation` says what a generation_config.json would change, `inputs`
what a model's `forward` accepts, and `fingerprint` tells models apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iama.lazy import lazy_names

if TYPE_CHECKING:
    from iama.models.fingerprint import revision
    from iama.models.flops import ModelSize, forward_flops, row_flops, size_from_folder, size_of
    from iama.models.generation import check_generation_config
    from iama.models.loading import check_model_dir, pick_device

__all__ = [
    "ModelSize",
    "check_generation_config",
    "check_model_dir",
    "forward_flops",
    "pick_device",
    "revision",
    "row_flops",
    "size_from_folder",
    "size_of",
]

# Fingerprints are taken before torch is imported.
__getattr__ = lazy_names(
    __name__,
    {
        "fingerprint": ["revision"],
        "flops": ["ModelSize", "forward_flops", "row_flops", "size_from_folder", "size_of"],
        "generation": ["check_generation_config"],
        "loading": ["check_model_dir", "pick_device"],
    },
)
