"""What the README says holds: its commands, its settings, its example, its links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lib_qswap import cli
from lib_qswap.forge.settings import OPTIONS
from lib_qswap.quant.formats import FORMATS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table_rows(text: str) -> list[list[str]]:
    lines = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in cells] for cells in lines]


def test_the_script_of_continuous_integration_runs_the_test_command_of_the_readme():
    commands = re.findall(r"^python3 -m venv .*$", README, re.MULTILINE)
    assert [command.rpartition("&& ")[2] for command in commands] == ["qswap demo", "pytest"]
    assert commands[1] in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()


@pytest.mark.parametrize("page", ["README.md", "ARCHITECTURE.md"])
def test_links_lead_to_files_that_exist(page):
    text = re.sub(r"<!--.*?-->", "", (ROOT / page).read_text("utf-8"), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", text)
    missing = [name for name in targets if "://" not in name and not (ROOT / name).exists()]
    assert not missing


def test_the_table_of_settings_has_every_option_with_its_default():
    def shown(default: object) -> str:
        return {True: "on", False: "off"}[default] if isinstance(default, bool) else f"{default:g}"

    expected = {
        option.label: option.default if isinstance(option.default, str) else shown(option.default)
        for option in OPTIONS.values()
    }
    found = {row[0]: row[1] for row in table_rows(section("Settings")) if row[0] in expected}
    assert found == expected


def test_the_table_of_swap_locations_has_every_choice():
    first_cells = [row[0] for row in table_rows(section("Settings"))]
    assert [cell for cell in first_cells if cell in OPTIONS["qswap_location"].choices] == list(
        OPTIONS["qswap_location"].choices
    )


def test_the_table_of_formats_has_every_format_and_says_whether_it_is_unpacked():
    rows = [
        row for row in table_rows(section("Formats")) if row[0].partition(",")[0].partition(" ")[0] in FORMATS
    ]
    unpacked = {
        name: row[1:3]
        for row in rows
        for name in re.findall(r"\b[A-Z]+[0-9A-Z_]*\b", row[0])
        if name in FORMATS
    }
    yes_or_no = {name: ["no" if row.unpack is None else "yes"] * 2 for name, row in FORMATS.items()}
    assert unpacked == yes_or_no


def test_every_command_of_the_command_line_is_in_its_table():
    (commands,) = (a.choices for a in cli.build_parser()._actions if isinstance(a.choices, dict))
    rows = [row[0] for row in table_rows(section("Command line")) if row[0].startswith("`qswap ")]
    assert {shlex.split(row.strip("`"))[1].strip("`,") for row in rows} == set(commands)


def test_the_first_example_in_python_runs():
    example = re.findall(r"```python\n(.*?)```", section("From Python"), re.DOTALL)[0]
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["output"].isfinite().all()
    assert names["output"].std() > 0
    assert {p.device.type for p in names["model"].parameters()} == {"cpu"}
