"""The report of an evaluation: one self-contained HTML file, and tables for the terminal, from `summary.json` alone.

Read `html` first: it fills the templates in `assets/`. `first` makes the first screen: `headlines` has its sentence,
`figure` its curve, `risks` its risks, and `findings` what they rest on. `words` puts numbers into words, `terminal`
prints the tables, `compare` sets two evaluations side by side.
"""

from inference.report.browser import open_page
from inference.report.compare import print_comparison, write_comparison
from inference.report.headlines import headline
from inference.report.html import FILE_NAME, render_html, write_report
from inference.report.terminal import print_differences, print_tables

__all__ = [
    "FILE_NAME",
    "headline",
    "open_page",
    "print_comparison",
    "print_differences",
    "print_tables",
    "render_html",
    "write_comparison",
    "write_report",
]
