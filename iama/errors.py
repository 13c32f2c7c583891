"""Errors that a user can mend, each told in one line: the value, where it came from, what to write instead."""


class IamaError(ValueError):
    """Base of every error caused by input; the command line prints it without a traceback."""


class ConfigError(IamaError):
    """A configuration file, flag or override that cannot be used."""


class ModelError(IamaError):
    """A model, tokenizer or adapter directory that cannot be loaded."""


class DataError(IamaError):
    """Prompts that are missing, malformed or do not fit the model."""


class RewardError(IamaError):
    """A reward that cannot be loaded or that returned something unusable."""


class RunError(IamaError):
    """A run directory that is in the way, incomplete or damaged."""


class IamaWarning(UserWarning):
    """Something configured is not used, or is used in a way that may surprise."""
