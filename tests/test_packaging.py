"""What is installed is all that runs: the wheel and the source distribution."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from lib_qswap.panel.page import javascript, stylesheet

ROOT = Path(__file__).resolve().parents[1]
BUILDS_FROM = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "style.css", "javascript", "lib_qswap")


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, Path]:
    """A wheel and a source distribution, built from a copy: setuptools leaves files where it builds."""
    tree, output = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    for name in BUILDS_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree)
    # The builders overwrite sys.argv.
    script = (
        "import sys; from setuptools import build_meta; output = sys.argv[1];"
        "build_meta.build_sdist(output); build_meta.build_wheel(output)"
    )
    subprocess.run([sys.executable, "-c", script, str(output)], cwd=tree, check=True, capture_output=True)
    (wheel,), (source,) = output.glob("*.whl"), output.glob("*.tar.gz")
    return wheel, source


def modules_in_checkout() -> set[str]:
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / "lib_qswap").rglob("*.py")}


def page_files() -> set[str]:
    return {path.name for path in (ROOT / "javascript").glob("*.js")} | {"style.css"}


def test_a_wheel_carries_every_module_and_the_files_of_the_page_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        licences = [name for name in wheel.namelist() if name.endswith("/LICENSE")]
    assert names == modules_in_checkout() | {f"lib_qswap/panel/web/{name}" for name in page_files()}
    assert len(licences) == 1


def test_the_command_of_a_wheel_is_the_command_line(built):
    with zipfile.ZipFile(built[0]) as wheel:
        (entry_points,) = (name for name in wheel.namelist() if name.endswith("/entry_points.txt"))
        parser = configparser.ConfigParser()
        parser.read_string(wheel.read(entry_points).decode())
    assert dict(parser["console_scripts"]) == {"qswap": "lib_qswap.cli:main"}


def test_the_page_of_a_wheel_is_the_page_of_the_checkout(built, tmp_path):
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path)
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); from lib_qswap.panel import page;"
        "assert page.__file__.startswith(sys.argv[1]); print(page.javascript() + page.stylesheet(), end='')"
    )
    command = [sys.executable, "-I", "-c", script, str(tmp_path)]
    found = subprocess.run(command, check=True, capture_output=True, text=True, encoding="utf-8")
    assert found.stdout == javascript() + stylesheet()
    assert len(found.stdout) > 10_000


def test_a_source_distribution_has_all_that_a_wheel_is_built_from(built):
    with tarfile.open(built[1]) as source:
        names = {name.partition("/")[2] for name in source.getnames()}
    wanted = {"pyproject.toml", "setup.py", "README.md", "LICENSE", "style.css"}
    wanted |= {f"javascript/{name}" for name in page_files() - {"style.css"}} | modules_in_checkout()
    assert wanted <= names, sorted(wanted - names)
