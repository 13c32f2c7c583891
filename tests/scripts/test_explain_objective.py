from __future__ import annotations

from pathlib import Path

import numpy as np
from typer.testing import CliRunner

from scripts import explain_objective


def test_the_page_shows_what_the_command_prints(tmp_path):
    app = explain_objective.typer.Typer()
    app.command()(explain_objective.main)
    result = CliRunner().invoke(app, ["--picture", str(tmp_path / "objective.svg")])
    assert result.exit_code == 0
    docs = Path(__file__).parents[2] / "docs/design"
    page = (docs / "objective.md").read_text()
    rows = [line.strip() for line in result.output.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(explain_objective.COMPLETIONS)
    assert all(row in page for row in rows)
    assert (tmp_path / "objective.svg").read_text() == (docs / "objective.svg").read_text()


def test_the_picture_shows_densities():
    y = (np.arange(200_000) + 0.5) / 200_000
    for num_samples in (2, 4):
        assert abs(explain_objective.optimal_density(y, num_samples).mean() - 1) < 0.02
