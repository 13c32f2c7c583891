"""Options that several commands share: how a policy is sampled."""

from __future__ import annotations

from typing import Annotated

import typer

Temperature = Annotated[float | None, typer.Option(help="Else that of iama.json, or 1.")]
TopP = Annotated[float | None, typer.Option(help="Else that of iama.json, or 1 (all tokens).")]
TopK = Annotated[int | None, typer.Option(help="Else that of iama.json, or 0 (all tokens).")]
MinP = Annotated[float | None, typer.Option(help="Else that of iama.json, or 0 (all tokens).")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Else that of iama.json, or 1 (none).")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text. Repeatable.")]
MaxNewTokens = Annotated[int | None, typer.Option(help="Else that of iama.json, or 128.")]
