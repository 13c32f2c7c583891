"""The documentation site: what `make docs` adds to the pages in docs/.

Read `hooks` first: mkdocs calls it. `reference` writes the command line, the configuration and the Python names from
the code itself; `readability` counts words a sentence on every page.
"""
