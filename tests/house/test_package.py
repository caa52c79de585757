"""What is installed: the sdist has all that git has, the wheel made of it carries its sources, and every way to install
and run the same code counts the same code.

The wheels here take the extension that is built already; tests/house/test_build.py builds it.
"""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from pgolf import _native
from pgolf.artifact import packed_code
from pgolf.cli import main
from pgolf.runtime import checkout, sources

pytest.importorskip("setuptools", "77", reason="building needs setuptools 77 or newer")
ROOT = Path(__file__).resolve().parents[2]
NOT_SHIPPED = re.compile(r"\.ci/|\.git")  # what only the repository itself needs
# setup.py, but for the compiler: the extension is a copy of the one in use.
SETUP = f"""
import runpy, setuptools, shutil, sys
real = setuptools.setup
def setup(**given):
    given["cmdclass"]["build_ext"].build_extension = lambda command, extension: (
        command.mkpath(command.build_lib + "/pgolf"), shutil.copy({_native.__file__!r}, command.build_lib + "/pgolf"))
    real(**given)
setuptools.setup = setup
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


def python(*arguments: str, cwd: Path, path: Path | str = "", status: int = 0) -> subprocess.CompletedProcess:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PGOLF_"))}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**environ, "PYTHONPATH": str(path), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def install(folder: Path, target: Path) -> None:
    """Make a wheel of the checkout in `folder` and unpack it, which is what pip does with it."""
    python("-c", SETUP, "-q", "bdist_wheel", "--dist-dir", str(target / "dist"), cwd=folder)
    (wheel,) = (target / "dist").iterdir()
    zipfile.ZipFile(wheel).extractall(target)


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory):
    """The files that `sdist` packs, by the list that it packs them from."""
    target = tmp_path_factory.mktemp("sdist")
    python("-c", SETUP, "-q", "egg_info", "--egg-base", str(target), cwd=ROOT)
    for name in (target / "pgolf.egg-info" / "SOURCES.txt").read_text().splitlines():
        if ".egg-info" not in name:
            (target / "pgolf" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / "pgolf" / name)
    return target / "pgolf"


@pytest.fixture(scope="module")
def installed(unpacked_sdist, tmp_path_factory):
    """A folder to put into the path: a wheel of the sdist, unpacked."""
    target = tmp_path_factory.mktemp("installed")
    install(unpacked_sdist, target)
    return target


# The size is that of these bytes through xz, which takes seconds.
COUNTED = """
import hashlib
from pgolf import _native, triton_kernels
from pgolf.artifact import packed_code
print(hashlib.sha256(packed_code.tar_code()).hexdigest(), _native.__file__, triton_kernels.__file__)
"""


@pytest.fixture(scope="module")
def counted_here():
    return hashlib.sha256(packed_code.tar_code()).hexdigest()


def test_the_sdist_has_all_that_git_has(unpacked_sdist):
    if not (ROOT / ".git").exists():
        pytest.skip("not a git repository")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout.splitlines()
    expected = {name for name in listed if not NOT_SHIPPED.match(name) and (ROOT / name).is_file()}
    found = {path.relative_to(unpacked_sdist).as_posix() for path in unpacked_sdist.rglob("*") if path.is_file()}
    assert sorted(expected - found) == []
    assert sorted(found - expected) == []


def test_a_wheel_counts_the_same_code_anywhere(installed, unpacked_sdist, counted_here, tmp_path):
    """From elsewhere, and in a checkout, whose own kernels it then runs with the extension of the wheel."""
    elsewhere = python("-c", COUNTED, cwd=tmp_path, path=installed).stdout.split()
    in_checkout = python("-c", COUNTED, cwd=unpacked_sdist, path=installed).stdout.split()
    native = str(installed / "pgolf" / Path(_native.__file__).name)
    assert elsewhere == [counted_here, native, str(installed / "pgolf/triton_kernels/__init__.py")]
    assert in_checkout == [elsewhere[0], native, str(unpacked_sdist / "triton_kernels" / "__init__.py")]


def test_the_unpacked_archive_installs_and_counts_itself(counted_here, tmp_path):
    folder, target = tmp_path / "checkout", tmp_path / "installed"
    folder.mkdir()
    with tarfile.open(fileobj=io.BytesIO(packed_code.tar_code())) as archive:
        archive.extractall(folder)
    assert sources.native_digest(folder) == _native.build_info()["sources"]
    install(folder, target)
    found = python("-c", COUNTED, cwd=tmp_path, path=target).stdout.split()
    assert found[0] == counted_here
    assert python("-c", COUNTED, cwd=folder, path=target).stdout.split()[0] == found[0]


def test_a_checkout_with_nothing_installed_says_what_to_run(unpacked_sdist):
    """-S: without site-packages, so without torch and all the rest."""
    told = f"not installed for {sys.executable}; run: pip install -e . -c constraints.txt"
    done = python("-S", "train_gpt.py", cwd=unpacked_sdist, status=2)
    assert re.fullmatch(rf"train_gpt\.py: torch, numpy, [^\n]+: {re.escape(told)}\n", done.stderr)
    assert done.stdout == ""
    report = python("-S", "-m", "pgolf", "doctor", cwd=unpacked_sdist, status=1).stdout
    assert report.count("Mend: ") == 1
    assert "Mend: pip install -e . -c constraints.txt\n" in report


def test_a_checkout_that_is_not_built_says_what_to_run(monkeypatch, capsys):
    (finder,) = (finder for finder in sys.meta_path if isinstance(finder, checkout.CheckoutFinder))
    monkeypatch.setattr(finder, "find_built", lambda: None)
    monkeypatch.delitem(sys.modules, "pgolf._native")
    monkeypatch.chdir(finder.folder)
    with pytest.raises(SystemExit) as end:
        checkout.require_installation("train_gpt.py")
    assert end.value.code == 2
    text = capsys.readouterr().err
    assert text == (
        f"train_gpt.py: the sources in {finder.folder} are not built for {sys.executable}; run: pip install -e .\n"
    )


def test_an_extension_of_other_sources_is_refused_in_one_line(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    loader = checkout.CheckedLoader(tmp_path, _native.__file__)
    loader.exec_module(_native)  # of the same sources
    with (tmp_path / "csrc" / "coder.cpp").open("a") as file:
        file.write("// changed\n")
    with pytest.raises(
        ImportError, match=r"was built from other sources than those in \S+csrc; run: pip install [^\n]+$"
    ):
        loader.exec_module(_native)


def test_train_runs_the_script_of_this_installation(capsys, monkeypatch, tmp_path):
    assert main(["train", "--where"]) == 0
    script = Path(capsys.readouterr().out.strip())
    assert script.samefile(ROOT / "train_gpt.py")
    changed = tmp_path / "train_gpt.py"
    changed.write_text("import sys\nprint(__name__, sys.argv)\nsys.exit(4)\n")
    monkeypatch.setattr(sources, "root", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["pgolf"])
    with pytest.raises(SystemExit) as end:
        main(["train", "SEED=42", "PRESET=demo"])
    assert end.value.code == 4
    assert capsys.readouterr().out == f"__main__ {[str(changed), 'SEED=42', 'PRESET=demo']}\n"


def test_the_wheel_has_the_script_to_train_with(installed, tmp_path):
    where = python("-m", "pgolf", "train", "--where", cwd=tmp_path, path=installed).stdout.strip()
    assert Path(where) == installed / "pgolf" / "_sources" / "train_gpt.py"
    assert Path(where).read_bytes() == (ROOT / "train_gpt.py").read_bytes()


def test_every_package_is_installed(installed):
    """Every module of the checkout, and every file that lies beside one."""
    for folder, target in ((ROOT / "pgolf", "pgolf"), (ROOT / "triton_kernels", "pgolf/triton_kernels")):
        for path in folder.rglob("*"):
            if path.suffix in (".py", ".html"):
                assert (installed / target / path.relative_to(folder)).is_file(), path
