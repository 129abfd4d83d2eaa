"""Options: what they are worth when they are read, how they are set, and what Forge's own controls may do to
them."""

from __future__ import annotations

import json
import threading

import forge_standin
import gradio as gr
import pytest


@pytest.fixture
def forge():
    with forge_standin.running() as webui:
        yield webui


@pytest.fixture
def settings(forge):
    module = forge.qswap("settings")
    module.register()
    forge.qswap("notices").to_console("info")
    return module


@pytest.fixture
def controls(forge):
    module = forge.qswap("controls")
    patches = module.patches()
    for patch in patches:
        patch.apply()
    return module


def test_the_options_are_those_of_the_architecture_in_their_own_section(forge, settings):
    added = {key: info for key, info in forge.shared.opts.data_labels.items() if key.startswith("qswap_")}
    assert set(added) == {
        "qswap_enabled",
        "qswap_location",
        "qswap_gpu_budget_mb",
        "qswap_pin_budget_mb",
        "qswap_ring_mb",
        "qswap_arithmetic",
        "qswap_compute_dtype",
        "qswap_unpack_kernel",
        "qswap_keep_outputs",
        "qswap_panel_hz",
        "qswap_log_level",
    }
    assert {info.section for info in added.values()} == {("qswap", "QSwap")}
    assert all(info.comment_after for info in added.values())


def test_every_option_can_be_shown_by_gradio(forge, settings):
    with gr.Blocks():
        for info in forge.shared.opts.data_labels.values():
            if info.component is not None:
                shown = info.component(value=info.default, label=info.label, **info.component_args)
                assert shown.label


def test_defaults_hold_before_the_settings_tab_exists(forge):
    assert forge.qswap("settings").current().enabled is True
    assert "qswap_enabled" not in forge.shared.opts.data


def test_sizes_are_bytes_and_zero_is_automatic(forge, settings):
    forge.shared.opts.set("qswap_gpu_budget_mb", 512)
    current = settings.current()
    assert current.gpu_budget_bytes == 512 * 1024 * 1024
    assert (current.pin_budget_bytes, current.ring_bytes) == (None, None)


def test_locations_are_the_words_that_attach_takes(forge, settings):
    for word in ("Auto", "GPU", "Shared", "CPU", "Disk"):
        forge.shared.opts.set("qswap_location", word)
        assert settings.current().location == word.lower()


def test_a_bad_stored_value_counts_as_the_default_and_is_named_once(forge, settings, capsys):
    forge.shared.opts.set("qswap_location", "Moon")
    forge.shared.opts.set("qswap_ring_mb", "much")
    for _ in range(3):
        current = settings.current()
    assert (current.location, current.ring_bytes) == ("auto", None)
    said = capsys.readouterr().out
    assert said.count("qswap_location must be one of Auto, GPU, Shared, CPU, Disk, not 'Moon'") == 1
    assert said.count("qswap_ring_mb must be a number, not 'much'; using 0") == 1


def test_applied_settings_are_saved(forge, settings):
    answer = settings.apply({"qswap_location": "shared", "qswap_pin_budget_mb": 256.0})
    assert answer["applied"] == {"qswap_location": "Shared", "qswap_pin_budget_mb": 256}
    assert answer["messages"] == ["takes effect at the next generation"]
    with open(forge.shared.config_filename, encoding="utf8") as file:
        saved = json.load(file)
    assert (saved["qswap_location"], saved["qswap_pin_budget_mb"]) == ("Shared", 256)


def test_applying_what_is_set_already_promises_no_effect(forge, settings):
    assert settings.apply({"qswap_location": "Auto"})["messages"] == []


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"qswap_speed": 11}, "qswap_speed is not a setting of QSwap"),
        (
            {"qswap_location": "Tape"},
            "qswap_location must be one of Auto, GPU, Shared, CPU, Disk, not 'Tape'",
        ),
        ({"qswap_enabled": "no"}, "qswap_enabled must be true or false, not 'no'"),
        ({"qswap_ring_mb": -1}, "qswap_ring_mb must be between 0 and"),
        ({"qswap_ring_mb": True}, "qswap_ring_mb must be a number, not True"),
        ({"qswap_panel_hz": float("nan")}, "qswap_panel_hz must be a number, not nan"),
        ({"qswap_gpu_budget_mb": [1]}, r"qswap_gpu_budget_mb must be a number, not \[1\]"),
    ],
)
def test_one_bad_value_is_refused_with_a_sentence_and_nothing_is_set(forge, settings, changes, sentence):
    before = dict(forge.shared.opts.data)
    with pytest.raises(ValueError, match=sentence) as error:
        settings.apply({"qswap_arithmetic": "like Forge", **changes})
    assert "\n" not in str(error.value)
    assert forge.shared.opts.data == before


def test_frozen_settings_are_refused_with_a_sentence(forge, settings):
    object.__setattr__(forge.shared.opts, "frozen", True)
    with pytest.raises(ValueError, match="the settings cannot be changed: changing settings is disabled"):
        settings.apply({"qswap_location": "Disk"})
    assert settings.current().location == "auto"


def test_a_change_during_a_generation_counts_from_the_next_one(forge, settings):
    forge.shared.state.begin("first")
    settings.begin_generation({})
    settings.apply({"qswap_location": "Disk"})
    assert settings.in_effect().location == "auto"
    forge.shared.state.job = "Batch 2 out of 3"  # as Forge and its scripts name parts of it
    assert settings.in_effect().location == "auto"
    forge.shared.state.end()
    assert settings.in_effect().location == "disk"
    forge.shared.state.begin("second")
    assert settings.begin_generation({}).location == "disk"


def test_the_thread_of_a_generation_is_known_as_long_as_its_job_is(forge, settings):
    assert settings.generation_thread() is None
    forge.shared.state.begin("first")
    settings.begin_generation({})
    assert settings.generation_thread() == threading.get_ident()
    forge.shared.state.job = "Batch 1 out of 3"
    assert settings.generation_thread() == threading.get_ident()
    forge.shared.state.begin("interrogate")
    assert settings.generation_thread() is None
    forge.shared.state.end()
    assert settings.generation_thread() is None


def test_overrides_of_a_request_hold_for_its_generation_only(forge, settings):
    forge.shared.state.begin("api")
    settings.begin_generation({"qswap_location": "CPU", "sd_model_checkpoint": "other"})
    assert settings.in_effect().location == "cpu"
    forge.shared.state.end()
    assert settings.in_effect().location == "auto"
    assert forge.shared.opts.qswap_location == "Auto"


def test_a_page_load_neither_asks_for_an_unload_nor_limits_the_weights(forge, controls):
    forge.main_entry.ui_refresh_memory_management_settings(7168)
    assert forge.processing.need_global_unload is False
    assert controls.weight_limit_bytes() is None


def test_an_unload_that_was_asked_for_stays_asked_for(forge, controls):
    forge.processing.need_global_unload = True
    forge.main_entry.ui_refresh_memory_management_settings(7168)
    assert forge.processing.need_global_unload is True


def test_a_changed_value_reaches_forge_and_asks_for_the_unload(forge, controls):
    forge.main_entry.ui_refresh_memory_management_settings(6000, "Async", "Shared")
    assert forge.stream.stream_activated
    assert forge.memory_management.PIN_SHARED_MEMORY
    assert forge.memory_management.current_inference_memory == (8192 - 6000) << 20
    assert forge.processing.need_global_unload is True


def top_of_page(forge, controls):
    """The page's event functions by (component, event), as Gradio would run them."""
    forge.script_callbacks.on_after_component(controls.watch_component)
    with gr.Blocks() as page:
        forge.main_entry.make_checkpoint_manager_ui()
    labels = {
        number: block.elem_id or getattr(block, "label", "page") for number, block in page.blocks.items()
    }
    return {
        (labels.get(component, "page"), event): function.fn
        for function in page.fns.values()
        for component, event in function.targets
        if function.fn.__module__.startswith("lib_qswap")
    }


def test_a_slider_that_the_user_moves_limits_the_weights(forge, controls):
    events = top_of_page(forge, controls)
    events["GPU Weights (MB)", "input"](3000)
    forge.main_entry.ui_refresh_memory_management_settings(3000)
    assert controls.weight_limit_bytes() == 3000 << 20
    assert controls.inference_minimum_bytes() == (8192 - 3000) << 20


def test_only_the_slider_at_the_top_of_the_page_is_listened_to(forge, controls, capsys):
    assert set(top_of_page(forge, controls)) == {
        ("forge_ui_preset", "change"),
        ("page", "load"),
        ("GPU Weights (MB)", "input"),
    }
    controls.watch_component(gr.Slider(label="GPU Weights (MB)"))  # made outside of a page
    assert capsys.readouterr().out == ""


def test_a_slider_that_a_preset_moves_does_not(forge, controls):
    forge.main_entry.ui_refresh_memory_management_settings(3000)
    assert controls.weight_limit_bytes() is None
    assert controls.inference_minimum_bytes() == 1 << 30


@pytest.mark.parametrize("event", [("forge_ui_preset", "change"), ("page", "load")])
def test_a_preset_or_a_page_load_ends_the_users_limit(forge, controls, event):
    events = top_of_page(forge, controls)
    events["GPU Weights (MB)", "input"](3000)
    events[event]()
    assert controls.weight_limit_bytes() is None


def test_inference_memory_through_the_api_limits_the_weights(forge, controls):
    forge.processing.set_config({"forge_inference_memory": 4096})
    assert controls.weight_limit_bytes() == 4096 << 20


def test_inference_memory_as_an_override_limits_one_generation(forge, controls):
    seen = []
    forge.generate(
        override_settings={"forge_inference_memory": 4096},
        during=lambda p: seen.append(controls.weight_limit_bytes()),
    )
    assert seen == [4096 << 20]
    assert controls.weight_limit_bytes() is None
    assert forge.shared.opts.forge_inference_memory == 1024
