"""What people expect of a repository: workflows that call make targets, links that lead somewhere, one version."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.version import Version

from iama import __version__

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
PAGES = sorted(ROOT.glob("*.md"))


def jobs(path: Path) -> dict[str, Any]:
    return dict(yaml.safe_load(path.read_text())["jobs"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_make_targets_and_nothing_else(path):
    for name, job in jobs(path).items():
        for step in job["steps"]:
            if "run" in step:
                found = re.fullmatch(r"make ([a-z-]+)( [A-Z]+=\S.*)?", step["run"].strip())
                assert found, (name, step["run"])
                assert found[1] in TARGETS, (name, found[1])
            else:
                assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]), step


def test_workflows_call_what_a_submission_must_pass():
    called = {word for path in WORKFLOWS for word in re.findall(r"run: make ([a-z-]+)", path.read_text())}
    assert {"check", "quick", "test", "docs", "release", "test-trl"} <= called


def test_workflows_try_both_ends_of_what_is_supported():
    supported = [text.rsplit(" ", 1)[1] for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", text)]
    for name, wanted in (("quick", supported), ("wheel", [supported[0], supported[-1]])):
        assert jobs(WORKFLOWS[0])[name]["strategy"]["matrix"]["python"] == wanted
    assert jobs(WORKFLOWS[0])["trl"]["strategy"]["matrix"]["trl"] == ["oldest", "newest"]


@pytest.mark.parametrize("end", ["oldest", "newest"])
def test_the_target_for_trl_takes_the_ends_of_the_range(end):
    (wanted,) = [text.removeprefix("trl") for text in PROJECT["dependencies"] if text.startswith("trl")]
    done = subprocess.run(
        ["make", "-n", "test-trl", f"TRL={end}"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    low = wanted.split(",")[0].replace(">=", "==")
    assert f"'trl{low if end == 'oldest' else wanted}'" in done.stdout


def test_the_version_stands_in_one_place():
    """The citation is of the last release; the sources after it may have a development version of the next."""
    assert "version" in PROJECT["dynamic"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    version, date = re.findall(r"^## (\d\S+) - (\d{4}-\d\d-\d\d)$", changes, flags=re.MULTILINE)[0]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (citation["version"], str(citation["date-released"])) == (version, date)
    assert __version__ == version or (Version(__version__) > Version(version) and Version(__version__).is_devrelease)


def test_the_citation_has_what_its_format_asks_for():
    """Of the schema of CFF 1.2.0; `cffconvert --validate` checks all of it."""
    content = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= content.keys()
    assert content["cff-version"] == "1.2.0"
    assert content["license"] == PROJECT["license"]
    paper = content["preferred-citation"]
    assert {"type", "title", "authors"} <= paper.keys()
    assert "Non-Linear GRPO" in paper["title"]


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_issue_forms_are_whole(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        return
    assert form["name"]
    assert form["description"]
    names = [field["id"] for field in form["body"]]
    assert len(names) == len(set(names))
    assert any("iama doctor" in field["attributes"]["label"] for field in form["body"])
    assert all(field["attributes"]["label"] and field["type"] == "textarea" for field in form["body"])


def anchors(page: str) -> set[str]:
    """Names of a page's headings, as GitHub makes them."""
    heads = re.findall(
        r"^#+ (.*)$", re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE), flags=re.MULTILINE
    )
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_link_of_a_page_leads_nowhere(path):
    """Relative ones, with their anchors; pages in docs/ are checked by `make docs`."""
    text = re.sub(r"`[^`\n]*`", "", path.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset|href)=\"([^\"\s]+)\"", text)
    for link in (first or second for first, second in links):
        if re.match(r"https?://|mailto:", link):
            continue
        name, _, anchor = link.partition("#")
        target = path if not name else path.parent / name
        assert target.exists(), link
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text()), link


def test_no_address_of_this_repository_is_made_up():
    for path in (*PAGES, *FORMS, *WORKFLOWS, ROOT / "CITATION.cff", ROOT / "pyproject.toml"):
        assert not re.search(r"github\.com/[^/\s]+/iama\b", path.read_text()), path
