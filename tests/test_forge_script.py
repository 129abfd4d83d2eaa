"""QSwap as an extension: loaded, switched on and off, reloaded, shown and asked through the API."""

from __future__ import annotations

import base64
import threading
import time
import weakref
from types import SimpleNamespace

import forge_standin
import gradio as gr
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from lib_qswap.quant.formats import FORMATS
from lib_qswap.quant.packed import PackedTensor

RESIDENCY = "/qswap/v1/residency"


@pytest.fixture
def forge():
    with forge_standin.running() as webui:
        from lib_qswap.forge.patches import Patch

        memory = webui.memory_management
        webui.gpu_loads = []

        def load_models_gpu(original, models, *args, **kwargs):
            webui.gpu_loads.append(args)
            return original(models, *args, **kwargs)

        webui.replace_parts(memory=lambda: [Patch(memory, "load_models_gpu", load_models_gpu)])
        yield webui


@pytest.fixture
def loaded(forge):
    """Forge after its start, the Settings tab built."""
    forge.load_scripts()
    forge.script_callbacks.run("ui_settings")
    return forge


def is_on(forge):
    return forge.qswap("extension").applied()


def test_loading_the_script_replaces_forges_functions(loaded):
    loaded.memory_management.load_models_gpu([], 5)
    assert loaded.gpu_loads == [(5,)]


def test_switched_off_in_the_settings_file_nothing_is_replaced(forge):
    before = forge.memory_management.load_models_gpu
    forge.shared.opts.data["qswap_enabled"] = False
    forge.load_scripts()
    assert forge.memory_management.load_models_gpu is before


def test_an_unsupported_web_ui_is_left_alone_and_says_why(forge, capsys):
    before = forge.memory_management.load_models_gpu
    del forge.operations.stash
    forge.load_scripts()
    forge.load_scripts()
    assert forge.memory_management.load_models_gpu is before
    assert capsys.readouterr().out.count("backend.operations.stash is missing") == 1
    forge.generate()


def test_a_part_that_fails_leaves_forge_as_it_was(forge, capsys):
    before = forge.memory_management.load_models_gpu

    def broken():
        raise RuntimeError("no such hook")

    forge.replace_parts(lora=broken)
    forge.load_scripts()
    assert forge.memory_management.load_models_gpu is before
    assert "[QSwap] off, Forge stays as it is: RuntimeError: no such hook" in capsys.readouterr().out
    status = forge.qswap("extension").status()
    assert (status["supported"], status["error"]) == (True, "RuntimeError: no such hook")
    forge.generate()


def test_switching_off_takes_effect_at_the_next_generation_which_loads_the_model_again(loaded):
    original = loaded.qswap("extension")._table.patches[0].original
    loaded.generate()
    assert loaded.sd_models.loads == 1
    loaded.shared.opts.set("qswap_enabled", False)
    assert is_on(loaded)
    p = loaded.generate()
    assert loaded.memory_management.load_models_gpu is original
    assert loaded.sd_models.loads == 2
    assert p.prompt_caches_cleared == 1
    loaded.generate()
    assert loaded.sd_models.loads == 2


def test_switching_off_unloads_through_qswaps_own_functions(forge):
    from lib_qswap.forge.patches import Patch

    unloaded = []
    memory = forge.memory_management
    forge.replace_parts(
        memory=lambda: [
            Patch(memory, "free_memory", lambda original, *a, **k: unloaded.append(k) or original(*a, **k))
        ]
    )
    forge.load_scripts()
    forge.script_callbacks.run("ui_settings")
    forge.generate()
    forge.shared.opts.set("qswap_enabled", False)
    forge.generate()
    assert unloaded == [{"free_all": True}]


def test_switching_on_loads_the_model_again_too(forge):
    forge.shared.opts.data["qswap_enabled"] = False
    forge.load_scripts()
    forge.script_callbacks.run("ui_settings")
    forge.generate()
    forge.shared.opts.set("qswap_enabled", True)
    forge.generate()
    assert is_on(forge)
    assert forge.sd_models.loads == 2


def test_each_switching_is_said_in_the_console(loaded, capsys):
    loaded.generate()
    for on in (False, True, False):
        loaded.shared.opts.set("qswap_enabled", on)
        capsys.readouterr()
        loaded.generate()
        assert f"[QSwap] {'on' if on else 'off'}: " in capsys.readouterr().out


def test_a_request_can_switch_qswap_off_for_itself(loaded):
    seen = []
    loaded.generate(override_settings={"qswap_enabled": False}, during=lambda p: seen.append(is_on(loaded)))
    loaded.generate(during=lambda p: seen.append(is_on(loaded)))
    assert seen == [False, True]


def test_an_image_within_a_job_does_not_switch(loaded):
    """Another extension makes its own pass in the middle of a generation, after the setting was changed."""

    def second_pass(p):
        loaded.shared.state.job = "Batch 1 out of 1"
        loaded.shared.opts.set("qswap_enabled", False)
        inner = loaded.processing.StableDiffusionProcessing()
        loaded.processing.process_images(inner)
        assert inner.sd_model is p.sd_model

    loaded.generate(during=second_pass)
    assert is_on(loaded)
    loaded.generate()
    assert not is_on(loaded)


def test_the_upscale_button_keeps_the_model_that_it_continues_with(loaded):
    loaded.generate()
    loaded.shared.opts.set("qswap_enabled", False)
    loaded.generate(txt2img_upscale=True)
    assert is_on(loaded)
    assert loaded.sd_models.loads == 1


def test_another_arithmetic_forgets_the_kept_prompts_and_keeps_the_model(loaded):
    assert loaded.generate().prompt_caches_cleared == 0
    assert loaded.generate().prompt_caches_cleared == 0
    loaded.shared.opts.set("qswap_arithmetic", "like Forge")
    assert loaded.generate().prompt_caches_cleared == 1
    assert loaded.generate(override_settings={"qswap_arithmetic": "exact"}).prompt_caches_cleared == 1
    assert loaded.sd_models.loads == 1


def test_another_arithmetic_within_a_job_forgets_them_too(loaded):
    """A cell of a grid."""
    cleared = []

    def second_cell(p):
        override = {"qswap_arithmetic": "like Forge", "qswap_compute_dtype": "bf16"}
        inner = loaded.processing.StableDiffusionProcessing(override_settings=override)
        loaded.processing.process_images(inner)
        cleared.append(inner.prompt_caches_cleared)

    loaded.generate(during=second_cell)
    assert cleared == [1]
    assert loaded.sd_models.loads == 1  # The dtype waits for the next job.


def test_another_compute_dtype_loads_the_model_again(loaded):
    loaded.generate()
    loaded.shared.opts.set("qswap_compute_dtype", "bf16")
    loaded.generate()
    assert loaded.sd_models.loads == 2


def test_another_location_keeps_the_model(loaded):
    loaded.generate()
    loaded.shared.opts.set("qswap_location", "Disk")
    assert loaded.generate().prompt_caches_cleared == 0
    assert loaded.sd_models.loads == 1


def test_reload_ui_replaces_once_and_keeps_the_model(loaded):
    loaded.generate()
    original = loaded.qswap("extension")._table.patches[0].original
    loaded.reload_ui()
    loaded.memory_management.load_models_gpu([], 5)
    assert loaded.gpu_loads == [(5,)]
    loaded.generate()
    assert loaded.sd_models.loads == 1
    loaded.script_callbacks.run("script_unloaded")
    assert loaded.memory_management.load_models_gpu is original


def test_a_model_loaded_before_the_extension_went_away_is_loaded_again(loaded):
    loaded.generate()
    loaded.script_callbacks.run("script_unloaded")
    loaded.scripts.load_scripts([])
    loaded.generate()
    assert not is_on(loaded)
    assert loaded.sd_models.loads == 2


def test_unloading_during_a_generation_waits_for_its_end_without_holding_up_the_reload(loaded):
    started, end = threading.Event(), threading.Event()

    def during(_p):
        started.set()
        assert end.wait(10)

    generation = threading.Thread(target=loaded.generate, kwargs={"during": during})
    generation.start()
    assert started.wait(10)
    loaded.script_callbacks.run("script_unloaded")
    assert is_on(loaded)
    end.set()
    generation.join()
    deadline = time.monotonic() + 10
    while is_on(loaded) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_on(loaded)


def test_the_loaded_engine_is_handed_on_while_qswap_is_on(loaded):
    loaded.generate()
    managed = loaded.qswap("managed")
    assert [engine.forge_objects.unet for engine in managed.attached] == [None]
    loaded.shared.opts.set("qswap_enabled", False)
    loaded.generate()
    assert len(managed.attached) == 1


def test_an_error_in_a_callback_is_one_line_and_the_generation_goes_on(loaded, capsys):
    loaded.qswap("managed").attach_engine = lambda engine: 1 / 0
    assert loaded.generate().sd_model is not None
    assert "[QSwap] attach_engine: ZeroDivisionError: division by zero" in capsys.readouterr().out


def patcher(*weights):
    model = torch.nn.Module()
    for index, weight in enumerate(weights):
        model.register_parameter(f"w{index}", torch.nn.Parameter(weight, requires_grad=False))
    return SimpleNamespace(model=model)


def packed(name):
    layout = FORMATS[name]
    return PackedTensor(
        torch.zeros(1, layout.block_bytes, dtype=torch.uint8), layout, (1, layout.block_elements)
    )


@pytest.mark.parametrize(
    ("weight", "options", "written"),
    [
        ("Q4_0", {}, {"QSwap arithmetic": "exact"}),
        ("Q4_0", {"qswap_arithmetic": "like Forge"}, {}),
        (
            "Q4_0",
            {"qswap_compute_dtype": "bf16"},
            {"QSwap arithmetic": "exact", "QSwap compute dtype": "bf16"},
        ),
        (
            "Q4_0",
            {"qswap_unpack_kernel": "Torch"},
            {"QSwap arithmetic": "exact", "QSwap unpacking": "Torch"},
        ),
        ("F16", {}, {}),
        (None, {}, {}),
        ("Q4_0", {"qswap_enabled": False}, {}),
    ],
)
def test_the_infotext_names_what_can_change_the_image(loaded, weight, options, written):
    loaded.sd_models.make_unet = lambda: patcher(torch.zeros(2) if weight is None else packed(weight))
    p = loaded.generate(override_settings=options)
    assert p.extra_generation_params == written


def test_what_another_cell_of_a_grid_wrote_is_not_kept(loaded):
    """They are copies of one another, with one dictionary."""
    loaded.sd_models.make_unet = lambda: patcher(packed("Q4_0"))
    first = loaded.generate()
    assert first.extra_generation_params == {"QSwap arithmetic": "exact"}

    def share(p):
        p.extra_generation_params = first.extra_generation_params

    second = loaded.generate(override_settings={"qswap_arithmetic": "like Forge"}, during=share)
    assert second.extra_generation_params == {}


def test_prompts_of_the_hires_pass_are_forgotten_as_well(loaded):
    kind = loaded.processing.StableDiffusionProcessingTxt2Img
    loaded.generate()
    kind.cached_hr_c = kind.cached_hr_uc = ["a prompt", None, None]
    loaded.generate()
    assert kind.cached_hr_c[0] == "a prompt"
    loaded.generate(override_settings={"qswap_arithmetic": "like Forge"})
    assert kind.cached_hr_c == kind.cached_hr_uc == [None, None, None]


def test_what_a_generation_was_computing_when_it_failed_is_let_go_of_with_the_next(loaded):
    kept = []

    def fail():
        tensor = torch.ones(1)
        kept.append(weakref.ref(tensor))
        raise RuntimeError("out of memory")

    try:
        fail()
    except RuntimeError as error:
        loaded.main_thread.last_exception = error
    assert kept[0]() is not None
    loaded.generate()
    assert kept[0]() is None


def test_weights_that_are_packed_while_the_model_is_loaded_are_named_too(loaded):
    unet = patcher(torch.zeros(2))
    loaded.sd_models.make_unet = lambda: unet

    def pack(_p):
        unet.model.register_parameter("w0", torch.nn.Parameter(packed("BNB_NF4"), requires_grad=False))

    assert loaded.generate(during=pack).extra_generation_params == {"QSwap arithmetic": "exact"}


def test_pasted_infotext_never_names_a_memory_setting(loaded):
    named = {key for key, info in loaded.shared.opts.data_labels.items() if info.infotext}
    assert named == {"qswap_arithmetic", "qswap_compute_dtype", "qswap_unpack_kernel"}


def test_the_accordion_mounts_the_panel_once_per_tab_and_adds_no_arguments(loaded):
    mounted = []
    for is_img2img in (False, True):
        script = loaded.scripts.ScriptRunner(is_img2img).scripts[0]
        assert script.show(is_img2img) is loaded.scripts.AlwaysVisible
        with gr.Blocks() as page:
            assert script.ui(is_img2img) == []
        mounted += [block.value for block in page.blocks.values() if isinstance(block, gr.HTML)]
    assert [html.count('class="qswap-panel"') for html in mounted] == [1, 1]
    assert ["txt2img" in html for html in mounted] == [True, False]


def test_the_panel_finds_its_routes_below_a_subpath(loaded):
    loaded.shared.cmd_opts.subpath = "sd"
    script = loaded.scripts.ScriptRunner().scripts[0]
    with gr.Blocks() as page:
        script.ui(False)
    assert any('data-base="/sd"' in getattr(block, "value", "") for block in page.blocks.values())


def test_the_plot_script_gets_its_axes_once(loaded):
    class AxisOption:
        def __init__(self, label, type, apply, choices=None):
            self.label, self.type, self.apply, self.choices = label, type, apply, choices

    module = SimpleNamespace(AxisOption=AxisOption, axis_options=[])
    script_class = type("Script", (), {"__module__": "xyz_grid.py"})
    loaded.scripts.scripts_data.append(SimpleNamespace(script_class=script_class, module=module))
    for _ in range(2):
        loaded.script_callbacks.run("before_ui")
    assert [axis.label for axis in module.axis_options] == ["[QSwap] Swap location", "[QSwap] Arithmetic"]
    assert module.axis_options[0].choices() == ["Auto", "GPU", "Shared", "CPU", "Disk"]
    p = loaded.processing.StableDiffusionProcessing()
    module.axis_options[1].apply(p, "like Forge", ["exact", "like Forge"])
    assert p.override_settings == {"qswap_arithmetic": "like Forge"}


def client(forge, app=None):
    app = FastAPI() if app is None else app
    forge.script_callbacks.run("app_started", None, app)
    return TestClient(app)


def test_without_a_page_the_api_knows_the_options_too(forge):
    forge.load_scripts()  # and nobody asks for what belongs on the Settings tab
    assert client(forge).post("/qswap/v1/settings", json={"qswap_location": "Disk"}).status_code == 200
    assert forge.shared.opts.data["qswap_location"] == "Disk"
    assert "qswap_location" in forge.shared.opts.data_labels


def test_residency_tells_the_family_the_switch_and_the_settings(loaded):
    found = client(loaded).get(RESIDENCY).json()
    assert found["enabled"] is True
    assert (found["host"]["family"], found["host"]["supported"]) == ("F1", True)
    assert found["settings"]["qswap_location"] == "Auto"
    loaded.generate(override_settings={"qswap_enabled": False})
    assert client(loaded).get(RESIDENCY).json()["enabled"] is False


def test_settings_through_the_api_are_checked_and_set(loaded):
    api = client(loaded)
    answer = api.post("/qswap/v1/settings", json={"qswap_location": "Disk"})
    assert (answer.status_code, answer.json()["applied"]) == (200, {"qswap_location": "Disk"})
    assert loaded.shared.opts.qswap_location == "Disk"
    answer = api.post("/qswap/v1/settings", json={"qswap_location": "Tape"})
    assert answer.status_code == 400
    assert "qswap_location must be one of" in answer.json()["detail"]


def test_a_plan_without_a_model_is_refused_with_a_sentence(loaded):
    answer = client(loaded).post("/qswap/v1/plan", json={"budget_bytes": 1 << 30})
    assert (answer.status_code, answer.json()["detail"]) == (
        400,
        "no model is loaded through QSwap; generate an image first",
    )


def page_app(auth):
    """What Gradio's application shows of its login."""
    app = FastAPI()
    app.auth, app.auth_dependency, app.cookie_id, app.tokens = auth, None, "cookie", {}
    return app


def basic(user, password):
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


REQUESTS = [
    ("GET", RESIDENCY),
    ("GET", "/qswap/v1/trace"),
    ("POST", "/qswap/v1/settings"),
    ("POST", "/qswap/v1/plan"),
]


@pytest.mark.parametrize(("method", "path"), REQUESTS)
def test_a_page_with_a_login_answers_nobody_who_is_not_logged_in(loaded, method, path):
    api = client(loaded, page_app({"ann": "secret"}))
    answer = api.request(method, path, json={})
    assert answer.status_code == 401
    assert "www-authenticate" not in answer.headers
    assert api.request(method, path, json={}, headers=basic("ann", "secret")).status_code == 401


@pytest.mark.parametrize("cookie", ["access-token-cookie", "access-token-unsecure-cookie"])
def test_the_pages_session_cookie_opens_the_routes(loaded, cookie):
    app = page_app({"ann": "secret"})
    app.tokens["token"] = "ann"
    api = client(loaded, app)
    api.cookies.set(cookie, "token")
    assert api.get(RESIDENCY).status_code == 200
    api.cookies.set(cookie, "stolen")
    assert api.get(RESIDENCY).status_code == 401


def test_api_credentials_are_taken_beside_the_login(loaded):
    loaded.shared.cmd_opts.api_auth = "bob:p:w,eve:x"
    api = client(loaded, page_app({"ann": "secret"}))
    assert api.get(RESIDENCY, headers=basic("bob", "p:w")).status_code == 200
    assert api.get(RESIDENCY, headers=basic("bob", "x")).status_code == 401
    assert api.get(RESIDENCY, headers=basic("ann", "secret")).status_code == 401


def test_without_a_page_the_api_credentials_are_needed(loaded):
    loaded.shared.cmd_opts.api_auth = "bob:pw"
    api = client(loaded)
    answer = api.get(RESIDENCY)
    assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Basic")
    assert api.get(RESIDENCY, headers=basic("bob", "pw")).status_code == 200


def test_an_open_page_has_open_routes(loaded):
    loaded.shared.cmd_opts.api_auth = "bob:pw"
    assert client(loaded, page_app(None)).get(RESIDENCY).status_code == 200
