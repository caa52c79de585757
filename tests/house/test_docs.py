"""Every public name says, where `help` looks for it, what a user needs; and its example runs."""

import doctest
import inspect
import re
from pathlib import Path

import pytest

import pgolf
from pgolf import NgramCache, ops, settings
from pgolf.artifact import coder
from pgolf.artifact import file as artifact
from pgolf.evaluation import scoring as evaluate
from pgolf.training import muon

LIBRARY = {
    coder: "Description decode decode_floats describe encode encode_floats",
    artifact: "Artifact ByteCount StoredTensor read_artifact write_artifact",
    evaluate: "Score evaluate",
    muon: "Muon",
    settings: "load_settings",
}
# They neither take nor return an array, and nothing published lies behind them.
TOOLS = {"Availability", "BackendUnavailable", "available", "backend", "fallbacks", "used"}
SHAPE = re.compile(r"\((\.\.\.|\w[^()\n]*(\([^()\n]*\))?,[^()\n]*)(, ?[^()\n]+)?\)")  # (N,), (..., D), (1 + streams, D)
TOO_SMALL_FOR_THE_README = {"ops.Availability", "ops.BackendUnavailable"}
DTYPE = re.compile(r"float|int\d|uint8|bool|dtype|like|integers")
ARRAY = re.compile(r"(?<!Stored)Tensor|ndarray|nn.Parameter")


def public() -> dict[str, object]:
    found = {f"ops.{name}": getattr(ops, name) for name in ops.__all__ if name != "BACKENDS"}
    found |= {"NgramCache": NgramCache}
    found |= {f"NgramCache.{name}": method for name, method in vars(NgramCache).items() if not name.startswith("_")}
    for module, names in LIBRARY.items():
        short = module.__name__.removeprefix("pgolf.")
        found |= {f"{short}.{name}": getattr(module, name) for name in names.split()}
    return found


PUBLIC = public()


def parameters_of(thing: object) -> dict[str, bool]:
    """The names of what it takes or holds, and whether it is an array."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return {}
    parameters = inspect.signature(thing).parameters
    return {name: bool(ARRAY.search(str(p.annotation))) for name, p in parameters.items() if name != "self"}


def section(text: str, name: str) -> str:
    """What is indented below `name:`; "" where there is no such section."""
    found = re.search(rf"^{name}:\n((?:    .*\n|\n)+)", text + "\n", re.M)
    return found[1] if found else ""


@pytest.mark.parametrize("name", PUBLIC)
def test_help_tells_arguments_errors_and_where_it_comes_from(name):
    text = inspect.cleandoc(PUBLIC[name].__doc__ or "")
    assert re.match(r"\S.{20,}\.", text), "the first line says what it computes"
    described = section(text, "Args") + section(text, "Attributes")
    for parameter, is_array in parameters_of(PUBLIC[name]).items():
        entry = re.search(rf"^    {parameter}: \S.*\n(        .*\n)*", described, re.M)
        assert entry, f"{parameter} is not described"
        assert not is_array or SHAPE.search(entry[0]) or re.search(r"\blike\b|\bshape\b", entry[0]), (
            f"{parameter}: shape"
        )
        assert DTYPE.search(entry[0]) or not is_array, f"{parameter}: dtype"
    assert section(text, "Raises"), "no section `Raises:`"
    assert section(text, "Example"), "no section `Example:`"
    own, method = name.rpartition(".")[2], name.startswith("NgramCache.")  # a method's source is that of its class
    assert own in TOOLS or method or re.search(r"^Sources?: \S", text, re.M), "no `Source:`"


@pytest.mark.parametrize("name", [name for name in PUBLIC if name.rpartition(".")[2] not in TOOLS])
def test_help_tells_the_shapes_of_arrays(name):
    text = inspect.cleandoc(PUBLIC[name].__doc__ or "")
    assert not ARRAY.search(str(inspect.signature(PUBLIC[name]))) or SHAPE.search(text), "no shape"


@pytest.mark.parametrize("name", PUBLIC)
def test_the_example_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = doctest.DocTestParser().get_doctest(PUBLIC[name].__doc__ or "", {}, name, name, 0)
    report: list[str] = []
    failed, tried = doctest.DocTestRunner().run(example, out=report.append)
    assert tried
    assert not failed, "".join(report)


def test_the_readme_has_a_place_for_each_name():
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for name in PUBLIC.keys() - TOO_SMALL_FOR_THE_README:
        if not name.startswith("NgramCache."):
            assert re.search(rf"\b{name.rpartition('.')[2]}\b", readme), name


def test_the_coder_has_no_other_public_function():
    functions = {name for name, f in vars(coder).items() if inspect.isfunction(f) and f.__module__ == coder.__name__}
    assert {name for name in functions if not name.startswith("_")} < set(LIBRARY[coder].split())


def test_errors_have_one_heading_in_the_whole_package():
    for path in Path(pgolf.__file__).parent.rglob("*.py"):
        assert not re.search(r"^\s*Errors:", path.read_text(encoding="utf-8"), re.M), f"{path.name}: `Raises:`"
