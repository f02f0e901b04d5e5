"""What is installed: three import packages, their type markers, the licence, one command; nothing else."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"metadata", "nbd", "thinpool"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the tracked tree, so that nothing is left behind in the checkout."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    names = [*sorted(PACKAGES), "pyproject.toml", "LICENSE", "README.md", "tools", "tests", "docs"]
    subprocess.run(
        ["cp", "-r", *[str(ROOT / name) for name in names if (ROOT / name).exists()], str(source)], check=True
    )
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(work), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = work.glob("thinpool-*.whl")
    return built


def test_top_level_names(wheel: Path) -> None:
    names = {name.split("/", maxsplit=1)[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == PACKAGES


def test_typed_licensed_and_with_a_command(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = archive.namelist()
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    assert any(name.endswith("/LICENSE") for name in names)
    (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
    assert "thinpool = thinpool.cli:main" in archive.read(entry_points).decode()


def test_every_package_and_module_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {
        path.relative_to(ROOT).as_posix() for package in PACKAGES for path in (ROOT / package).rglob("*.py")
    }
    assert modules <= names


def test_every_runtime_dependency_is_justified() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    prose = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in project["dependencies"]:
        name = requirement.split(">")[0].split("=")[0].strip()
        assert f"**{name}**" in prose, f"{name} is not justified in docs/dependencies.md"
