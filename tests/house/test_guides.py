"""What the guides for newcomers name exists: files, functions, imports between folders, commands, versions of tools."""

import ast
import re
from pathlib import Path

import pytest
from test_house import BASE, MAY_IMPORT, ROOT

ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
GUIDES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/architecture.md", "docs/dependencies.md")
LINK = re.compile(r"\[([^\]]+)\]\(([^)#]*)(#[^)]+)?\)")
PLACES = re.compile(r"`((?:pgolf|csrc|triton_kernels|tests|bench|docs)/[\w./]*|[\w.]+\.(?:txt|md|toml))`")


def defined_in(path: Path) -> set[str]:
    """Names of functions, classes and constants at the top of a module, and `Class.method`."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.M)
    return {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("guide", GUIDES)
def test_links_lead_somewhere(guide):
    page = ROOT / guide
    for words, target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        path = page.parent / target if target else page
        assert path.exists(), f"{guide}: {target}"
        assert not anchor or anchor in anchors(path), f"{guide}: {target}{anchor}"
        if path.suffix == ".py":
            for name in re.findall(r"`([\w.]+)`", words):
                assert name in defined_in(path), f"{guide}: {name} is not in {target}"


@pytest.mark.parametrize("guide", ["README.md", "CONTRIBUTING.md", "docs/architecture.md"])
def test_files_that_are_named_exist(guide):
    for name in PLACES.findall((ROOT / guide).read_text(encoding="utf-8")):
        made = name.startswith("bench/results") or (ROOT / name).exists()
        assert made, f"{guide}: {name}"


def test_the_architecture_shows_the_walls():
    table = ARCHITECTURE.partition("| folder | imports from |")[2].partition("\n\n")[0]
    shown = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", table, re.M))
    assert shown.keys() == MAY_IMPORT.keys()
    for folder, allowed in MAY_IMPORT.items():
        found = set(re.findall(r"`(\w+)`", shown[folder]))
        assert found == (allowed - BASE | {"base"} if allowed >= BASE else allowed), folder


def test_every_folder_has_its_line():
    named = set(re.findall(r"^\| \[([\w/]+)/\]", ARCHITECTURE, re.M))
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "pgolf").glob("*/__init__.py")}
    assert named == folders | {"csrc", "triton_kernels", "bench", "tests"}
    for path in (ROOT / "pgolf").glob("*.py"):
        assert path.stem.startswith("__") or f"[{path.name}]" in ARCHITECTURE, path.name


def test_no_word_is_explained_twice():
    glossary = ARCHITECTURE.partition("## Glossary")[2].partition("\n## ")[0]
    words = [word for word in re.findall(r"^\| (.+?) \| .+ \|.*\|$", glossary, re.M) if word != "word"]
    assert len(words) > 40
    assert sorted(words) == sorted({*words})


def commands(page: str) -> set[str]:
    """Targets after `make` in a page's blocks and in its text."""
    return {target for line in re.findall(r"(?:^|`)make ([a-z ]+?)(?: *#|`|$)", page, re.M) for target in line.split()}


def test_the_makefile_has_the_commands_that_the_guides_use():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):  ## \S", text, re.M))
    assert targets == set(re.search(r"^\.PHONY: (.+)$", text, re.M)[1].split())
    assert {"install", "test", "quick"} <= commands(CONTRIBUTING) <= targets
    for path in re.findall(r"(?:tests|bench)/[\w/.]+", text):
        assert (ROOT / path).exists(), path


def test_the_tools_before_a_commit_have_the_versions_of_the_constraints():
    text = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = re.findall(r'"([\w-]+==[\w.]+)"', text)
    assert found
    assert {*found} <= {*pinned}


def test_the_picture_of_a_report_is_small():
    (picture,) = (ROOT / "docs").glob("*.png")
    assert picture.stat().st_size < 150_000
    assert "docs/report.png" in (ROOT / "README.md").read_text(encoding="utf-8")
