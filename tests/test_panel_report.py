"""Residency as text."""

from __future__ import annotations

import pytest
from fake_panel_host import FakeHost

from lib_qswap.panel.report import format_bytes, residency_table, summary_lines


def _layer(
    name: str, state: str = "resident", home: str = "shared", quant: str = "Q4_K", size: int = 1024
) -> dict:
    return {"name": name, "kind": "Linear", "quant": quant, "bytes": size, "state": state, "home": home}


def _snapshot(layers: list[dict], **fields: object) -> dict:
    return {"enabled": True, "models": [{"name": "KModel", "layers": layers, **fields}], "messages": []}


def test_hundreds_of_layers_are_grouped_over_the_blocks_of_the_model():
    layers = [
        _layer(f"double_blocks.{block}.img_attn.qkv", "resident" if block < 12 else "swapped", size=1024**2)
        for block in range(19)
    ]
    layers += [_layer(f"double_blocks.{block}.img_mlp.{part}") for block in range(19) for part in (0, 2)]

    lines = residency_table(_snapshot(layers)).splitlines()

    assert lines[0] == "KModel"
    assert lines[1].split("  ")[1:] == [
        "double_blocks.0-18.img_attn.qkv",
        "19 x Q4_K",
        "19 MB",
        "12 resident, 7 shared",
    ]
    assert [line.split()[0] for line in lines[2:4]] == [
        "double_blocks.0-18.img_mlp.0",
        "double_blocks.0-18.img_mlp.2",
    ]
    assert lines[4].split()[:3] == ["total", "57", "layers"]
    assert len(lines) == 5


def test_a_group_holds_one_format_only_and_names_the_blocks_it_has():
    layers = [_layer(f"blocks.{i}.proj", quant="Q6_K" if i in (3, 7) else "Q4_K") for i in range(45)]

    table = residency_table(_snapshot(layers))

    assert "blocks.0-2,4-6,8-44.proj  43 x Q4_K" in table
    assert "blocks.3,7.proj" in table
    assert "2 x Q6_K" in table


def test_few_layers_have_a_line_each_that_says_state_and_home():
    table = residency_table(
        _snapshot(
            [
                _layer("a", "fetching"),
                _layer("b", "in_use"),
                _layer("c", "swapped", "disk"),
                _layer("d", "ready"),
            ]
        )
    )

    places = [line.split("KB  ")[1] for line in table.splitlines()[1:5]]
    assert places == ["1 on its way", "1 in use", "1 disk", "1 ready"]


def test_a_layer_name_cannot_steer_the_terminal():
    table = residency_table(_snapshot([_layer("evil\x1b[2J\nname")]))

    assert "\x1b" not in table
    assert "evil\\x1b[2J\\nname" in table


def test_a_model_that_is_left_to_the_host_says_why():
    snapshot = _snapshot([], managed=False, reason="plain weights that fit")

    assert residency_table(snapshot) == "KModel: left to the host, plain weights that fit"
    assert summary_lines(snapshot) == ["KModel: left to the host, plain weights that fit"]


def test_the_summary_has_the_numbers_of_the_step_and_the_warnings():
    lines = summary_lines(FakeHost(clock=lambda: 10.0).snapshot())

    assert lines[0].startswith("cuda:0: ")
    assert lines[0].endswith("free of 12.0 GB")
    step = next(line for line in lines if line.startswith("KModel: step"))
    assert "step 1.92 s (bound 1.90 s)" in step
    assert "stall 20 ms (1%)" in step
    assert lines[-1].startswith("warning: Page-locked memory is full")


def test_the_summary_says_what_another_image_of_the_same_prompt_is_spared():
    step = {"seconds": 2.0, "stall_s": 0.0, "bound_s": 2.0, "h2d_bytes": 2 * 1024**3}
    spared = _snapshot([], step=step, bytes={"spared_per_step": 3 * 1024**2})
    assert (
        "2.0 GB swapped at 1.0 GB/s (3.0 MB spared: prompt and steps seen before)" in summary_lines(spared)[1]
    )
    assert "spared" not in summary_lines(_snapshot([], step=step, bytes={"spared_per_step": 0}))[1]


def test_missing_numbers_are_dashes_and_no_error():
    snapshot = {"models": [{"name": "m", "step": None, "bytes": {}, "layers": [{"name": "a"}]}]}

    assert summary_lines(snapshot) == ["m: 1 layer, - of 0 B resident, - fixed, ring -, page-locked - of -"]
    assert "1 x ?" in residency_table(snapshot)


def test_off_is_one_line():
    assert summary_lines({"enabled": False, "models": []}) == ["QSwap is off."]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "-"),
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (19 * 1024**2, "19 MB"),
        (1.25 * 1024**3, "1.2 GB"),
        (24 * 1024**3, "24.0 GB"),
        (999.9 * 1024**2, "1.0 GB"),
    ],
)
def test_bytes_are_counted_in_units_of_1024(count, text):
    assert format_bytes(count) == text
