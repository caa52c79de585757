"""The dependencies as pyproject.toml names them, beside docs/dependencies.md and constraints.txt."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

from pgolf.runtime.checkout import REQUIRED
from pgolf.runtime.probes import PACKAGES
from pgolf.runtime.tried import TRIED, release

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
RUN = [Requirement(text) for text in PROJECT["dependencies"]]
EXTRAS = {name: [Requirement(text) for text in texts] for name, texts in PROJECT["optional-dependencies"].items()}
BUILD = [Requirement(text) for text in PYPROJECT["build-system"]["requires"]]
PYTHONS = re.findall(r":: (3\.\d+)$", "\n".join(PROJECT["classifiers"]), re.M)


def test_the_table_has_every_direct_dependency_with_its_range():
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    expected = {"To run": RUN, "To build": BUILD, **{f"`[{name}]`": found for name, found in EXTRAS.items()}}
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.M | re.S))
    assert sections.keys() == expected.keys()
    for title, requirements in expected.items():
        rows = re.findall(r"^\| (\S+) \| (\S+).*? \| (.+?) \| (.+?) \|$", sections[title], re.M)
        rows = [row for row in rows if row[0] != "distribution"]
        assert [(name, wanted) for name, wanted, *_ in rows] == [
            (requirement.name, str(requirement.specifier) or "any") for requirement in requirements
        ]


def test_the_doctor_looks_at_what_a_run_needs():
    lower = {requirement.name: [s.version for s in requirement.specifier if s.operator == ">="] for requirement in RUN}
    assert lower == {name: [oldest] for name, oldest in PACKAGES.items()}
    assert {*REQUIRED} < {*PACKAGES}


def test_no_version_is_claimed_that_was_not_tried():
    """docs/versions.md has a row of each end of what TRIED says, and pyproject.toml asks for no more."""
    text = (ROOT / "docs" / "versions.md").read_text(encoding="utf-8")
    heads = re.findall(r"^\| (Python.*?) \|$", text, re.M)[0].lower().split(" | ")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| 3\.", line)]
    for name, ends in TRIED.items():
        found = sorted(filter(None, (release(row[heads.index(name)])[:2] for row in rows)))  # some are not noted
        assert (found[0], found[-1]) == tuple(map(release, ends)), name
    assert (PYTHONS[0], PYTHONS[-1]) == TRIED["python"]
    for requirement in RUN:
        if requirement.name in TRIED:
            oldest, newest = TRIED[requirement.name]
            assert not requirement.specifier.contains(f"{release(oldest)[0]}.{release(oldest)[1] - 1}.9")
            assert requirement.specifier.contains(f"{oldest}.0")
            after = f"{release(newest)[0]}.{release(newest)[1] + 1}.0"
            assert requirement.name == "numpy" or not requirement.specifier.contains(after)


@pytest.mark.parametrize("python", PYTHONS)
def test_the_constraints_name_one_good_version_for_each_python(python):
    """What `pip install` needs on Python 3.10 too, which newer versions of some have left."""
    environment = {"python_version": python, "python_full_version": f"{python}.1"}
    pinned: dict[str, Requirement] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            constraint = Requirement(line)
            if not constraint.marker or constraint.marker.evaluate(environment):
                name = canonicalize_name(constraint.name)
                assert name not in pinned, line
                pinned[name] = constraint
    for requirement in [*RUN, *(each for found in EXTRAS.values() for each in found)]:
        if requirement.name != "triton":  # torch pins it
            (limit,) = pinned[canonicalize_name(requirement.name)].specifier
            assert limit.operator == "==" or requirement.name == "torch"
            assert limit.version in requirement.specifier, limit


def test_the_pythons_that_are_claimed():
    assert PYTHONS == ["3.10", "3.11", "3.12", "3.13"]
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"
