"""Which family a web UI belongs to, from its running modules and from its source files."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import forge_standin
import pytest


@pytest.fixture
def forge():
    with forge_standin.running() as webui:
        yield webui


@pytest.fixture
def copy(tmp_path):
    """The stand-in's source files, to be changed."""
    root = tmp_path / "webui"
    shutil.copytree(forge_standin.ROOT, root, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def edit(root: Path, file: str, old: str, new: str) -> None:
    text = (root / file).read_text("utf-8")
    assert old in text
    (root / file).write_text(text.replace(old, new), "utf-8")


def inspect_webui(path):
    from lib_qswap.forge.probe import inspect_webui

    return inspect_webui(path)


MEMORY = "backend/memory_management.py"
ARGUMENT = "model_gpu_memory_when_using_cpu_swap"


def test_the_running_stand_in_is_supported(forge):
    result = forge.qswap("probe").probe()
    assert (result.family, result.supported) == ("F1", True), result.reason
    assert all(hook.ok for hook in result.hooks)


def test_source_files_give_the_same_answer_as_the_running_modules(forge, copy):
    running, source = forge.qswap("probe").probe().as_dict(), inspect_webui(copy)
    assert source.pop("webui") == str(copy)
    assert [hook["name"] for hook in source["hooks"]] == [hook["name"] for hook in running["hooks"]]
    assert source == running


def test_inspecting_a_folder_runs_none_of_its_code(copy):
    (copy / MEMORY).write_text(
        (copy / MEMORY).read_text("utf-8") + "\nraise SystemExit('was run')\n", "utf-8"
    )
    assert inspect_webui(copy)["family"] == "F1"
    assert "backend" not in sys.modules


def test_pre_comfy_neo_is_known_by_its_argument_name(copy):
    edit(copy, MEMORY, ARGUMENT, "cpu_swap_memory")
    assert inspect_webui(copy)["family"] == "F1b"


def test_ersatz_forge_is_known_by_partial_loading(copy):
    edit(copy, MEMORY, ARGUMENT + "=-1", "memory_for_inference=0, keep_loaded=[], partial=None")
    assert inspect_webui(copy)["family"] == "F2"


def test_neo_is_known_by_the_comfy_patcher(copy):
    edit(copy, "backend/patcher/base.py", "def refresh_loras", "def partially_load")
    edit(copy, MEMORY, "current_loaded_models = []", "PINNING_ALLOWED_TYPES = ('Parameter',)")
    assert inspect_webui(copy)["family"] == "F3"


def test_a_web_ui_without_backend_is_recognised(copy):
    shutil.rmtree(copy / "backend")
    assert inspect_webui(copy)["family"] == "F4"


def test_an_unknown_memory_manager_is_unknown(copy):
    (copy / MEMORY).write_text("def load_models_gpu(models): ...\n", "utf-8")
    assert inspect_webui(copy)["family"] == "unknown"


@pytest.mark.parametrize("family", ["F1b", "F2", "F3", "F4", "unknown"])
def test_other_families_are_left_alone_with_a_sentence(copy, family):
    if family == "F1b":
        edit(copy, MEMORY, ARGUMENT, "cpu_swap_memory")
    elif family == "F2":
        edit(copy, MEMORY, "current_loaded_models = []", "class Partial: ...")
    elif family == "F3":
        edit(copy, "backend/patcher/base.py", "def refresh_loras", "def partially_load")
        edit(copy, MEMORY, "current_loaded_models = []", "PINNING_ALLOWED_TYPES = ()")
    elif family == "F4":
        shutil.rmtree(copy / "backend")
    else:
        (copy / MEMORY).write_text("", "utf-8")
    found = inspect_webui(copy)
    assert (found["family"], found["supported"]) == (family, False)
    assert "leaves" in found["reason"]


def test_a_missing_hook_point_is_named(copy):
    edit(copy, "backend/operations.py", "stash = {}", "")
    found = inspect_webui(copy)
    assert not found["supported"]
    assert found["reason"].startswith("backend.operations.stash is missing")
    assert [hook["name"] for hook in found["hooks"] if not hook["ok"]] == ["backend.operations.stash"]


def test_a_changed_signature_is_named_with_what_was_expected(copy):
    edit(copy, MEMORY, "def free_memory(memory_required, device,", "def free_memory(device, memory_required,")
    found = inspect_webui(copy)
    assert not found["supported"]
    assert (
        "(device, memory_required, keep_loaded, free_all) instead of (memory_required, device,"
        in found["reason"]
    )


def test_an_added_parameter_at_the_end_is_no_obstacle(copy):
    edit(copy, MEMORY, "free_all=False):", "free_all=False, quiet=False):")
    assert inspect_webui(copy)["supported"]


def test_a_wrapper_that_takes_anything_counts_as_the_function(forge):
    original = forge.memory_management.free_memory
    forge.memory_management.free_memory = lambda *args, **kwargs: original(*args, **kwargs)
    assert forge.qswap("probe").probe().supported


def test_a_module_that_fails_to_import_is_a_missing_hook_point(forge, copy, monkeypatch):
    del sys.modules["backend.patcher.controlnet"]
    monkeypatch.setattr(sys.modules["backend.patcher"], "__path__", [])
    result = forge.qswap("probe").probe()
    assert not result.supported
    assert "backend.patcher.controlnet.weights_manual_cast is missing" in result.reason


def test_a_folder_that_is_no_web_ui_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="is not the folder of a Stable Diffusion web UI"):
        inspect_webui(tmp_path)


def test_without_any_web_ui_the_probe_says_so():
    code = "from lib_qswap.forge.probe import probe; r = probe(); print(r.family, r.supported)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["F4", "False"]
