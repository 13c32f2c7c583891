"""The report of an evaluation: one self-contained HTML file, and tables for the terminal, from `summary.json` alone.

Read `html` first: it fills the templates in `assets/`. `words` puts numbers into words, `risks` finds what could be
wrong with a policy, `terminal` prints the tables, `compare` sets two evaluations side by side.
"""

from inference.report.compare import print_comparison, write_comparison
from inference.report.html import FILE_NAME, render_html, write_report
from inference.report.sentences import headline
from inference.report.terminal import print_differences, print_tables

__all__ = [
    "FILE_NAME",
    "headline",
    "print_comparison",
    "print_differences",
    "print_tables",
    "render_html",
    "write_comparison",
    "write_report",
]
