"""Inference: a policy is served by any method, and what each method costs and gains is measured and reported.

Read `samplers/serve.py` first: it turns a method as people write it into the sampler that answers. The folders are
floors, each standing on those after it: `report` beside `serving`, `evaluation`, `hedging`, `statistics`, `pools`,
`samplers`, and `engine` beside `selection`. Each folder's `__init__` says what lives there and where to begin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from iama.lazy import lazy_names

if TYPE_CHECKING:
    from inference.engine.policy import Policy, load_policy
    from inference.engine.responses import Response
    from inference.evaluation.evaluate import evaluate
    from inference.evaluation.plan import make_plan
    from inference.samplers.args import Args, ArgsSettings
    from inference.samplers.base import Completion, Sampler, Segment
    from inference.samplers.best_of import SelectionSampler
    from inference.samplers.blockwise import Blockwise, BlockwiseSettings
    from inference.samplers.cards import Cards, CardsSettings, acceptance_summary, calibrate_target
    from inference.samplers.ggro import Ggro, GgroSettings
    from inference.samplers.redraw import Redraw, RedrawSettings
    from inference.samplers.sea import Sea, SeaSettings
    from inference.samplers.serve import serve
    from inference.samplers.tilted import TiltedSettings, TiltedTokens
    from inference.samplers.uncertainty import calibrate_entropy

__all__ = [
    "Args",
    "ArgsSettings",
    "Blockwise",
    "BlockwiseSettings",
    "Cards",
    "CardsSettings",
    "Completion",
    "Ggro",
    "GgroSettings",
    "Policy",
    "Redraw",
    "RedrawSettings",
    "Response",
    "Sampler",
    "Sea",
    "SeaSettings",
    "Segment",
    "SelectionSampler",
    "TiltedSettings",
    "TiltedTokens",
    "acceptance_summary",
    "calibrate_entropy",
    "calibrate_target",
    "evaluate",
    "load_policy",
    "make_plan",
    "serve",
]


# A part can be used without the libraries of the others.
__getattr__ = lazy_names(
    __name__,
    {
        "engine.policy": ["Policy", "load_policy"],
        "engine.responses": ["Response"],
        "evaluation.evaluate": ["evaluate"],
        "evaluation.plan": ["make_plan"],
        "samplers.args": ["Args", "ArgsSettings"],
        "samplers.base": ["Completion", "Sampler", "Segment"],
        "samplers.best_of": ["SelectionSampler"],
        "samplers.blockwise": ["Blockwise", "BlockwiseSettings"],
        "samplers.cards": ["Cards", "CardsSettings", "acceptance_summary", "calibrate_target"],
        "samplers.uncertainty": ["calibrate_entropy"],
        "samplers.ggro": ["Ggro", "GgroSettings"],
        "samplers.redraw": ["Redraw", "RedrawSettings"],
        "samplers.sea": ["Sea", "SeaSettings"],
        "samplers.serve": ["serve"],
        "samplers.tilted": ["TiltedSettings", "TiltedTokens"],
    },
)
