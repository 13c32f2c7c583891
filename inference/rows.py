"""`inference.engine.rows` under the name that it had at first, for scripts that import `Rows` from here."""

from inference.engine.rows import Rows

__all__ = ["Rows"]
