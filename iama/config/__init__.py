"""What configuration files may say. Importing it does not import torch.

Read `specs` first: policies, rewards, prompts, sampling. `files` holds the two schemas, of training and of evaluation,
`methods` the ways to serve, as text; `manifest` is `iama.json` beside an exported model, and `schema` reads YAML and
turns every mistake into one line.
"""

from iama.config.files import EvaluationConfig, KLConfig, TrainingConfig
from iama.config.manifest import Manifest, load_manifest
from iama.config.methods import Method
from iama.config.schema import Strict, load_config, validate
from iama.config.specs import PolicySpec, PromptsSpec, RewardScale, RewardSpec, Sampling

__all__ = [
    "EvaluationConfig",
    "KLConfig",
    "Manifest",
    "Method",
    "PolicySpec",
    "PromptsSpec",
    "RewardScale",
    "RewardSpec",
    "Sampling",
    "Strict",
    "TrainingConfig",
    "load_config",
    "load_manifest",
    "validate",
]
