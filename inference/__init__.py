"""Inference: a policy is served by any method, and what each method costs and gains is measured and reported.

Read `samplers/serve.py` first: it turns a method as people write it into the sampler that answers. The folders are
floors, each standing on those after it: `report`, `evaluation`, `hedging`, `statistics`, `pools`, `samplers`, and
`engine` beside `selection`. Each folder's `__init__` says what lives there and where to begin.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inference.engine.policy import Policy, load_policy
    from inference.engine.responses import Response
    from inference.evaluation.evaluate import evaluate
    from inference.evaluation.plan import make_plan
    from inference.samplers.args import Args, ArgsSettings
    from inference.samplers.base import Completion, Sampler, Segment
    from inference.samplers.best_of import SelectionSampler
    from inference.samplers.cards import Cards, CardsSettings, acceptance_summary, calibrate_target
    from inference.samplers.ggro import Ggro, GgroSettings
    from inference.samplers.sea import Sea, SeaSettings
    from inference.samplers.serve import serve

# Where each public name lives; imported on first use, so that a part can be used without the models' libraries.
_HOME = {
    "Args": "samplers.args",
    "ArgsSettings": "samplers.args",
    "Cards": "samplers.cards",
    "CardsSettings": "samplers.cards",
    "Completion": "samplers.base",
    "Ggro": "samplers.ggro",
    "GgroSettings": "samplers.ggro",
    "Policy": "engine.policy",
    "Response": "engine.responses",
    "Sampler": "samplers.base",
    "Sea": "samplers.sea",
    "SeaSettings": "samplers.sea",
    "Segment": "samplers.base",
    "SelectionSampler": "samplers.best_of",
    "acceptance_summary": "samplers.cards",
    "calibrate_target": "samplers.cards",
    "evaluate": "evaluation.evaluate",
    "load_policy": "engine.policy",
    "make_plan": "evaluation.plan",
    "serve": "samplers.serve",
}

__all__ = [
    "Args",
    "ArgsSettings",
    "Cards",
    "CardsSettings",
    "Completion",
    "Ggro",
    "GgroSettings",
    "Policy",
    "Response",
    "Sampler",
    "Sea",
    "SeaSettings",
    "Segment",
    "SelectionSampler",
    "acceptance_summary",
    "calibrate_target",
    "evaluate",
    "load_policy",
    "make_plan",
    "serve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
