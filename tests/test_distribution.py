"""What is uploaded: the wheel and the source distribution hold what they should, and install."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import phatgoose

PROJECT = Path(__file__).parents[1]
BUILD = [sys.executable, "-m", "build", "--no-isolation"]


def run(*command: object, **options: object) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=PROJECT, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both, the wheel being made of the unpacked source distribution."""
    folder = tmp_path_factory.mktemp("dist")
    run(*BUILD, "--outdir", folder)
    return folder


def tracked(*folders: str) -> set[str]:
    return set(run("git", "ls-files", *folders).split("\n")) - {""}


def test_the_wheel_is_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    about = f"phatgoose-{phatgoose.__version__}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith(about)}
    assert {f"src/{name}" for name in names} == tracked("src/phatgoose")
    assert {"phatgoose/py.typed", "phatgoose/default/tiny/demo.jsonl"} <= names


def test_the_source_distribution_has_its_tests(built: Path) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    wanted = {name for name in tracked() if not name.startswith(".")}
    assert names - {"PKG-INFO", ".gitignore"} == wanted


def test_the_page_of_the_index_renders(built: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())


def test_the_wheel_runs_from_where_it_is_unpacked(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    command = "import phatgoose; print(phatgoose.__file__, phatgoose.__version__)"
    said = run(sys.executable, "-c", command, env={"PYTHONPATH": str(tmp_path), "PATH": ""})
    assert said.split() == [str(tmp_path / "phatgoose" / "__init__.py"), phatgoose.__version__]
