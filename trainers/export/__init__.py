"""From a finished run to a model that others can use.

Read `export` first. `model_card` writes the README of an exported model, and `publish` puts it on the hub.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iama.lazy import lazy_names

if TYPE_CHECKING:
    from trainers.export.export import export_run
    from trainers.export.publish import push

__all__ = ["export_run", "push"]

# The command line starts without torch.
__getattr__ = lazy_names(
    __name__,
    {
        "export": ["export_run"],
        "publish": ["push"],
    },
)
