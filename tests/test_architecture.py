"""No file imports, directly or through others, a file that imports it. Layers: the contract of `make check`."""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter

import grimp

PACKAGES = ("iama", "inference", "trainers", "scripts")


def test_no_file_takes_part_in_a_circle_of_imports():
    """Imports inside functions and those for type checkers alone count as well."""
    graph = grimp.build_graph(*PACKAGES, exclude_type_checking_imports=False, cache_dir=None)
    imported = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    try:
        TopologicalSorter(imported).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(reversed(error.args[1]))) from None
