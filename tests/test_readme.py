"""What the README says holds: its commands, its settings, its example, its links."""

from __future__ import annotations

import json
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


def test_the_table_of_settings_has_the_name_of_each_in_the_api():
    found = {row[0]: row[2] for row in table_rows(section("Settings"))}
    for key, option in OPTIONS.items():
        assert found[option.label] == f"`{key}`"


def test_the_words_of_the_panel_are_those_of_the_page():
    scripts = "".join(path.read_text("utf-8") for path in (ROOT / "javascript").glob("*.js"))
    rows = table_rows(section("Install in Forge"))[3:]  # Before: the heading, and Forge's names.
    words = [word for row in rows for word in row[0].split(", ")]
    assert {"In use", "Waited for", "Left to the host", "Travels each step"} <= set(words)
    assert [word for word in words if f'"{word}"' not in scripts] == []


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


def test_the_example_of_a_profile_is_planned_by_the_command_beside_it(tmp_path, capsys):
    text = section("Command line")
    (profile,) = re.findall(r"```json\n(.*?)```", text, re.DOTALL)
    (tmp_path / "P.json").write_text(profile)
    (command,) = re.findall(r"`qswap (plan --profile P\.json --budget [^B`]+)`", text)
    arguments = [str(tmp_path / word) if word == "P.json" else word for word in shlex.split(command)]
    assert cli.main([*arguments, "--json"]) == 0
    kept = json.loads(capsys.readouterr().out)["resident"]
    assert 0 < len(kept) < len(json.loads(profile)["layers"])


def test_the_addresses_of_the_api_answer_and_its_examples_work(tmp_path):
    fastapi = pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    import torch
    from fastapi.testclient import TestClient

    from lib_qswap.panel.routes import add_routes
    from lib_qswap.standalone.demo_file import make_demo_file
    from lib_qswap.standalone.host import Settings, StandaloneHost

    text = section("API")
    app = fastapi.FastAPI()
    path = tmp_path / "tiny.gguf"
    make_demo_file(path, "Q4_K", hidden=256, double=1, single=1)
    host = StandaloneHost(path, torch.device("cpu"), Settings(pixels=64))
    try:
        add_routes(app, host)
        served = {
            f"{method} {route.path}"
            for route in app.routes
            if route.path.startswith("/qswap/")
            for method in route.methods
        }
        assert set(re.findall(r"`((?:GET|POST) \S+)`", text)) == served
        answers = []
        for command in re.findall(r"^curl (.*)$", text, re.MULTILINE):
            option, header, data, body, address = shlex.split(command)
            assert (option, data) == ("-H", "-d")
            name, value = header.split(": ")
            posted = TestClient(app).post(address.partition("7860")[2], content=body, headers={name: value})
            assert posted.status_code == 200, posted.text
            answers.append(posted.json())
        assert answers[0]["applied"] == {"qswap_location": "CPU"}
        assert answers[1]["step_s"] > 0
        assert host.snapshot()["location"] == "cpu"
    finally:
        host.close()


def test_the_first_example_in_python_runs():
    example = re.findall(r"```python\n(.*?)```", section("From Python"), re.DOTALL)[0]
    names: dict = {}
    exec(compile(example, "README.md", "exec"), names)
    assert names["output"].isfinite().all()
    assert names["output"].std() > 0
    assert {p.device.type for p in names["model"].parameters()} == {"cpu"}
