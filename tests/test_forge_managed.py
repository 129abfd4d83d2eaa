"""Models that QSwap serves inside Forge, on the stand-in."""

from __future__ import annotations

import gc
import itertools
import os
import threading
import weakref
from types import SimpleNamespace

import forge_standin
import pytest
import swap_models as sm
import torch
from gguf_writer import Tensor, gguf_bytes

from lib_qswap.quant import kernels
from lib_qswap.quant.gguf_file import GGUFError
from lib_qswap.swap import adaptation, inventory, ledger
from lib_qswap.swap.device import device_of
from lib_qswap.swap.profile import Work

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("engine")]

GPU = "simgpu"


class Wrapper(torch.nn.Module):
    """As Forge's CLIPEmbeddingForTextualInversion."""

    def __init__(self, wrapped):
        super().__init__()
        self.wrapped = wrapped
        self.weight = self.wrapped.weight

    def forward(self, indices):
        return self.wrapped(indices) * 2


class Encoder(torch.nn.Module):
    def __init__(self, embedding):
        super().__init__()
        self.embed = Wrapper(embedding)
        self.up = torch.nn.Linear(512, 512, bias=False, device="meta")
        self.up.weight = torch.nn.Parameter(sm.packed_weight("Q8_0", (512, 512)), requires_grad=False)


def test_clips_embedding_stays_on_the_host_inside_its_wrapper_too(sim, forge, monkeypatch):
    monkeypatch.setattr(inventory, "GATHERED_FROM_BYTES", 100_000)
    managed = forge.qswap("managed")
    embedding = forge.operations.ForgeOperations.Embedding(1000, 512, dtype=torch.float16)
    model = Encoder(embedding.requires_grad_(False))
    weight = embedding.weight
    attachment = managed.attachment_for(SimpleNamespace(model=model, load_device=torch.device(GPU)))
    indices = torch.tensor([[3, 999], [0, 7]])
    expected = weight.float()[indices] * 2
    with torch.inference_mode():
        attachment.rebalance(4 << 20)
        held = sim.memory_allocated()
        for _ in range(2):  # as Forge, for every prompt
            model.embed = model.embed.to(GPU).to(dtype=torch.float32)
        assert model.embed.weight is model.embed.wrapped.weight
        assert model.embed.weight.device.type == "cpu"
        assert model.embed.weight.dtype == torch.float16
        rows = model.embed(indices.to(GPU))
        assert rows.dtype == torch.float32
        assert torch.equal(rows.cpu(), expected)
    assert sim.memory_allocated() - held < 100_000
    managed.release(attachment, model)
    model.embed.to(dtype=torch.float32)
    assert model.embed.weight.dtype == torch.float32
    assert torch.equal(model.embed(indices), expected)


MB = 1 << 20


class Network(torch.nn.Module):
    """Layers of Forge's own, and a temporary as large as the image asks for."""

    def __init__(self, operations):
        super().__init__()
        weights = [sm.packed_weight("Q8_0", (1024, 1024), i % 4) for i in range(64)]
        self.layers = torch.nn.ModuleList(
            operations.ForgeOperations.Linear(torch.nn.Parameter(weight, requires_grad=False))
            for weight in weights
        )

    def forward(self, x, image):
        torch.empty(image.shape[0] * MB, dtype=torch.uint8, device=x.device)
        for layer in self.layers:
            x = layer(x) / 1000
        return x


@pytest.fixture
def small_gpu(sim, virtual_time):
    """Forge on a device of 512 MB, of which it keeps at least 16 free for the image; the link is what limits
    it."""
    sim.set_total(512 * MB)
    sim.set_bandwidth(h2d=20e6)
    gpu = torch.device(GPU, 0)

    def free_bytes(dev=None, torch_free_too=False):
        free, _ = device_of(gpu).memory_bytes()
        return (free, 0) if torch_free_too else free

    with forge_standin.running() as webui:
        memory = webui.memory_management
        memory.get_free_memory, memory.get_torch_device = free_bytes, lambda: gpu
        memory.current_inference_memory = 16 * MB
        webui.load_scripts()
        webui.script_callbacks.run("ui_settings")
        yield webui


def patcher_of(forge):
    return forge.patcher_of(Network(forge.operations), torch.float32, torch.device(GPU, 0))


def sample(forge, patcher, image_mb, reserve_mb, steps=4):
    """One pass of sampling as Forge makes it; returns what it would see as free in the last step."""
    forge.memory_management.load_models_gpu([patcher], memory_required=reserve_mb * MB)
    x = torch.ones(1, 1024, device=GPU)
    with torch.inference_mode():
        for _ in range(steps):
            patcher.model.diffusion_model(x, torch.empty(image_mb, 0))
    return forge.memory_management.get_free_memory(torch.device(GPU, 0))


def test_what_forge_reserves_and_does_not_need_is_lent_to_residents(small_gpu):
    patcher = patcher_of(small_gpu)
    managed = small_gpu.qswap("managed")
    seen = sample(small_gpu, patcher, image_mb=10, reserve_mb=390)
    attachment = managed.attachment_of(patcher.model)
    asked = attachment.asked_bytes
    assert 0 < asked < attachment.whole_bytes
    assert attachment.grown_bytes > 10 * MB
    # Forge goes on seeing what it reserved.
    free, _ = attachment.device.memory_bytes()
    assert seen == pytest.approx(free + attachment.grown_bytes, abs=MB)
    assert seen >= 390 * MB

    grown = attachment.grown_bytes
    sample(small_gpu, patcher, image_mb=10, reserve_mb=390)
    assert attachment.grown_bytes == grown  # and nothing is moved for the next image
    assert attachment.asked_bytes == asked

    small_gpu.memory_management.load_models_gpu([patcher], memory_required=440 * MB)
    assert attachment.grown_bytes == 0
    assert attachment.device.memory_bytes()[0] >= 440 * MB


@pytest.mark.parametrize(
    ("image_mb", "reserve_mb", "margin_mb"),
    # With the last one the budget of the next image differs by more than what residents do not move for.
    [(10, 390, 64), (10, 440, 64), (380, 390, 64), (10, 440, 4)],
)
def test_what_residents_gave_back_for_the_allocator_is_not_taken_for_the_next_image(
    small_gpu, monkeypatch, image_mb, reserve_mb, margin_mb
):
    monkeypatch.setattr(adaptation, "CROWDED_BYTES", 8 * MB)
    monkeypatch.setattr(small_gpu.qswap("memory"), "MARGIN_BYTES", margin_mb * MB)
    patcher = patcher_of(small_gpu)
    sample(small_gpu, patcher, image_mb=image_mb, reserve_mb=reserve_mb)
    attachment = small_gpu.qswap("managed").attachment_of(patcher.model)
    assert (attachment.grown_bytes == 0) == (image_mb > 10), "it was lent, or asked for"
    had = min(attachment.budget_bytes, attachment.whole_bytes)
    # Read before and after each forward: there are retries in the first two.
    counts = itertools.chain([0, 1, 1, 2], itertools.repeat(2))
    monkeypatch.setattr(attachment.device, "allocation_retries", lambda: next(counts))
    sample(small_gpu, patcher, image_mb=image_mb, reserve_mb=reserve_mb)
    given = attachment.crowded_bytes
    assert given >= 8 * MB
    for _ in range(2):
        assert attachment.budget_bytes <= had - given
        assert attachment.resident_bytes > 0
        sample(small_gpu, patcher, image_mb=image_mb, reserve_mb=reserve_mb)
    assert attachment.crowded_bytes == given


@pytest.fixture
def seldom_collecting():
    """As in a process of very many objects, Python does not look for cycles by itself."""
    gc.disable()
    yield
    gc.enable()


def leave_behind(megabytes):
    """A cycle that nobody can reach, with device memory in it."""
    cycle = {"tensor": torch.empty(megabytes * MB, dtype=torch.uint8, device=GPU)}
    cycle["itself"] = cycle


@pytest.mark.usefixtures("seldom_collecting")
def test_what_earlier_generations_left_on_the_device_is_not_missing_from_the_budget(sim, small_gpu):
    patcher = patcher_of(small_gpu)
    reserve = 440 * MB
    small_gpu.memory_management.load_models_gpu([patcher], memory_required=reserve)
    attachment = small_gpu.qswap("managed").attachment_of(patcher.model)
    asked = attachment.asked_bytes
    for _ in range(12):  # images of 8 MB each
        leave_behind(8)
        small_gpu.memory_management.load_models_gpu([patcher], memory_required=reserve)
    assert attachment.asked_bytes > asked - 65 * MB
    assert sim.memory_allocated() < attachment.budget_bytes + 65 * MB


@pytest.mark.usefixtures("seldom_collecting")
def test_memory_that_somebody_uses_is_looked_at_once(small_gpu, monkeypatch):
    patcher = patcher_of(small_gpu)
    for _ in range(2):
        small_gpu.memory_management.load_models_gpu([patcher])
    looked = []
    monkeypatch.setattr(gc, "collect", lambda: looked.append(1))
    used = torch.empty(100 * MB, dtype=torch.uint8, device=GPU)
    for _ in range(3):
        small_gpu.memory_management.load_models_gpu([patcher])
    assert len(looked) == 1
    del used


def test_a_limit_that_the_user_set_is_not_passed_by_lending(small_gpu):
    small_gpu.shared.opts.data["qswap_gpu_budget_mb"] = 40
    patcher = patcher_of(small_gpu)
    sample(small_gpu, patcher, image_mb=10, reserve_mb=100)
    attachment = small_gpu.qswap("managed").attachment_of(patcher.model)
    assert attachment.budget_bytes == 40 * MB
    assert attachment.grown_bytes == 0


class Plain(torch.nn.Module):
    """64 MB of weights that nobody has packed."""

    def __init__(self, operations):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(
            operations.ForgeOperations.Linear(torch.nn.Parameter(torch.randn(1024, 1024) / 32), None)
            for _ in range(16)
        ).requires_grad_(False)

    def forward(self, x, image):
        torch.empty(image.shape[0] * MB, dtype=torch.uint8, device=x.device)
        for layer in self.layers:
            x = layer(x)
        return x


def plain_patcher(forge, network=None):
    """As Forge's, of a model that Forge loads whole; of the same `network` it is a clone."""
    gpu = torch.device(GPU, 0)
    network = Plain(forge.operations) if network is None else network
    patcher = forge.patcher_of(network, torch.float32, gpu)
    patcher.is_clone = lambda other: other.model.diffusion_model is network
    patcher.forge_unpatch_model = lambda target=None: None if target is None else patcher.model.to(target)
    return patcher


@pytest.fixture
def forge_that_loads(small_gpu, monkeypatch):
    kind = small_gpu.memory_management.LoadedModel
    monkeypatch.setattr(kind, "model_load", lambda self, budget=-1: self.model.model.to(self.device))
    return small_gpu


def test_a_clone_of_a_model_that_forge_has_whole_on_the_device_is_taken_over(forge_that_loads):
    forge, managed = forge_that_loads, forge_that_loads.qswap("managed")
    patcher = plain_patcher(forge)
    expected = patcher.model.diffusion_model(torch.ones(1, 1024), torch.empty(1, 0))
    sample(forge, patcher, image_mb=10, reserve_mb=100)
    assert managed.attachment_of(patcher.model) is None
    assert next(patcher.model.parameters()).device.type == GPU
    # A changed LoRA makes another patcher, and a larger batch needs the room.
    clone = plain_patcher(forge)
    clone.model = patcher.model
    clone.is_clone = lambda other: other.model is clone.model
    forge.memory_management.load_models_gpu([clone], memory_required=470 * MB)
    attachment = managed.attachment_of(clone.model)
    assert attachment.budget_bytes < attachment.payload_bytes
    with torch.inference_mode():
        found = clone.model.diffusion_model(torch.ones(1, 1024, device=GPU), torch.empty(1, 0))
    torch.testing.assert_close(found.cpu(), expected)
    assert attachment.device.memory_bytes()[0] >= 470 * MB


def during_a_step(network, do, layer=30):
    """Lets another thread `do` something in the next step of `network`, which it has to wait for the end of;
    returns that thread, in a list, and the event of its end."""
    threads, done = [], threading.Event()

    def begin(_module, _inputs):
        if not threads:
            threads.append(threading.Thread(target=lambda: (do(), done.set()), daemon=True))
            threads[0].start()
            assert not done.wait(0.3)

    network.layers[layer].register_forward_pre_hook(begin)
    return threads, done


@pytest.mark.parametrize("job", ["the generation's", "its own"])
def test_a_preprocessors_preview_meanwhile_takes_residents_between_two_steps(forge_that_loads, job):
    """The page loads its model from another thread, whatever runs; to interrogate, with a job of its own."""
    forge, managed = forge_that_loads, forge_that_loads.qswap("managed")
    memory, state = forge.memory_management, forge.shared.state
    patcher, preprocessor = patcher_of(forge), plain_patcher(forge)
    state.begin("task")
    forge.qswap("settings").begin_generation({})
    expected = one_step(forge, patcher)
    for _ in range(2):  # What a step needs is known then.
        assert torch.equal(one_step(forge, patcher), expected)
    attachment = managed.attachment_of(patcher.model)
    had = attachment.resident_bytes
    assert had == attachment.payload_bytes
    used = torch.empty(attachment.device.memory_bytes()[0] - 100 * MB, dtype=torch.uint8, device=GPU)

    def preview():
        if job == "its own":
            state.begin("interrogate")
        memory.load_models_gpu([preprocessor])
        if job == "its own":
            state.end()

    threads, done = during_a_step(patcher.model.diffusion_model, preview)
    x = torch.ones(1, 1024, device=GPU)
    with torch.inference_mode():
        for step in range(1, 4):
            attachment.run.progress(step, 3)
            assert torch.equal(patcher.model.diffusion_model(x, torch.empty(1, 0)).cpu(), expected)
            threads[0].join(20)
    assert done.is_set()
    assert next(preprocessor.model.parameters()).device.type == GPU
    assert attachment.is_running
    assert 0 < attachment.resident_bytes < had - 40 * MB
    assert attachment.state.streamer.overflows == 0
    # Afterwards it takes turns like any other.
    state.end()
    memory.load_models_gpu([preprocessor])
    assert not attachment.is_running
    del used


def test_what_another_thread_loads_is_no_part_of_what_a_step_needs(forge_that_loads):
    forge = forge_that_loads
    patcher, preprocessor = patcher_of(forge), plain_patcher(forge)
    forge.shared.state.begin("task")
    forge.qswap("settings").begin_generation({})
    forge.memory_management.load_models_gpu([patcher])
    network = patcher.model.diffusion_model
    threads, _done = during_a_step(network, lambda: forge.memory_management.load_models_gpu([preprocessor]))
    x, image = torch.ones(1, 1024, device=GPU), torch.empty(1, 0)
    with torch.inference_mode():
        for _ in range(3):
            network(x, image)
            threads[0].join(20)
    attachment = forge.qswap("managed").attachment_of(patcher.model)
    need = attachment.adaptation.profile.need(Work(id(network), (x.shape, image.shape)))
    assert need is not None
    assert need.nbytes < 10 * MB


def test_a_preview_frees_no_memory_of_the_model_that_runs(forge_that_loads, monkeypatch):
    forge = forge_that_loads
    memory, patcher = forge.memory_management, patcher_of(forge)
    monkeypatch.setattr(memory, "ALWAYS_VRAM_OFFLOAD", True)
    forge.shared.state.begin("task")
    forge.qswap("settings").begin_generation({})
    expected = one_step(forge, patcher)
    threads, done = during_a_step(
        patcher.model.diffusion_model, lambda: memory.free_memory(64 * MB, torch.device(GPU, 0))
    )
    x = torch.ones(1, 1024, device=GPU)
    with torch.inference_mode():
        for _ in range(2):
            assert torch.equal(patcher.model.diffusion_model(x, torch.empty(1, 0)).cpu(), expected)
            threads[0].join(20)
    assert done.is_set()
    assert forge.qswap("managed").attachment_of(patcher.model).is_running


@pytest.mark.parametrize("wish", ["--always-offload-from-vram", "Never OOM", None])
def test_only_what_runs_is_on_the_device_where_the_user_wants_that(forge_that_loads, monkeypatch, wish):
    forge, managed = forge_that_loads, forge_that_loads.qswap("managed")
    memory = forge.memory_management
    monkeypatch.setattr(memory, "ALWAYS_VRAM_OFFLOAD", wish == "--always-offload-from-vram")
    if wish == "Never OOM":
        monkeypatch.setattr(memory, "vram_state", memory.VRAMState.NO_VRAM)
    first, second = patcher_of(forge), patcher_of(forge)
    for patcher in (first, second, second):
        memory.load_models_gpu([patcher])
    assert bool(managed.attachment_of(first.model).device_bytes()) == (wish is None)
    assert managed.attachment_of(second.model).active


def test_residents_stay_when_the_patcher_of_an_image_is_gone(forge_that_loads):
    """Every image with a LoRA has a clone of the checkpoint's patcher, and the next prompt loads encoders."""
    forge, managed = forge_that_loads, forge_that_loads.qswap("managed")
    memory, patcher, encoder = forge.memory_management, patcher_of(forge), plain_patcher(forge)
    clone = forge.patcher_of(patcher.model.diffusion_model, torch.float32, torch.device(GPU, 0))
    clone.model = patcher.model
    memory.load_models_gpu([clone])
    attachment = managed.attachment_of(patcher.model)
    had = attachment.resident_bytes
    assert had > 0
    del clone
    for _ in range(2):
        memory.load_models_gpu([encoder])
        assert attachment.resident_bytes == had
        assert len(memory.current_loaded_models) == 2
    # It makes room like any other,
    memory.free_memory(480 * MB, torch.device(GPU, 0))
    assert attachment.resident_bytes < had
    memory.load_models_gpu([encoder])
    # and goes with the checkpoint.
    gone = weakref.ref(patcher.model)
    del patcher
    memory.load_models_gpu([encoder])
    gc.collect()
    assert gone() is None
    assert not attachment.resident_bytes


def one_step(forge, patcher):
    forge.memory_management.load_models_gpu([patcher])
    with torch.inference_mode():
        return patcher.model.diffusion_model(torch.ones(1, 1024, device=GPU), torch.empty(1, 0)).cpu()


@pytest.mark.parametrize("limit", ["the user's", "Never OOM"])
def test_a_limit_holds_for_models_that_would_fit_whole(forge_that_loads, limit):
    forge = forge_that_loads
    memory = forge.memory_management
    if limit == "Never OOM":
        memory.vram_state = memory.VRAMState.NO_VRAM
    else:
        forge.shared.opts.data["qswap_gpu_budget_mb"] = 20
    patcher = plain_patcher(forge)
    sample(forge, patcher, image_mb=10, reserve_mb=100)
    attachment = forge.qswap("managed").attachment_of(patcher.model)
    assert attachment.budget_bytes == (attachment.floor_bytes if limit == "Never OOM" else 20 * MB)


def test_a_limit_holds_for_all_models_together(small_gpu):
    small_gpu.shared.opts.data["qswap_gpu_budget_mb"] = 80
    managed, memory = small_gpu.qswap("managed"), small_gpu.memory_management
    first, second = patcher_of(small_gpu), patcher_of(small_gpu)
    attachments = []
    for patcher in (first, second, first):
        memory.load_models_gpu([patcher])
        attachments.append(managed.attachment_of(patcher.model))
        held = sum(one.device_bytes() for one in set(attachments)) + attachments[0].state.shared_bytes
        assert held <= 80 * MB
        # What runs has all that it can use.
        assert attachments[-1].resident_bytes == attachments[-1].payload_bytes
    small_gpu.shared.opts.data["qswap_gpu_budget_mb"] = 40
    memory.load_models_gpu([first, second])
    assert sum(one.device_bytes() for one in set(attachments)) <= 40 * MB


def test_a_text_encoder_takes_what_others_leave_of_a_limit(small_gpu):
    """It runs once a prompt: what they gave up for it would travel twice."""
    small_gpu.shared.opts.data["qswap_gpu_budget_mb"] = 80
    managed, memory = small_gpu.qswap("managed"), small_gpu.memory_management
    patcher, encoder = patcher_of(small_gpu), patcher_of(small_gpu)
    encoder.model.clip = encoder.model._modules.pop("diffusion_model")
    memory.load_models_gpu([patcher])
    attachment = managed.attachment_of(patcher.model)
    memory.load_models_gpu([encoder])
    own = managed.attachment_of(encoder.model)
    assert attachment.resident_bytes > 0.9 * attachment.payload_bytes
    assert own.active
    assert attachment.device_bytes() + own.device_bytes() + own.state.shared_bytes <= 80 * MB
    memory.load_models_gpu([patcher])
    assert attachment.resident_bytes == attachment.payload_bytes


def test_an_error_that_forge_makes_as_well_is_not_taken_for_qswaps(forge_that_loads, monkeypatch):
    forge, managed = forge_that_loads, forge_that_loads.qswap("managed")
    patcher = patcher_of(forge)

    def refresh_loras():
        raise ValueError("the shapes of a LoRA do not match")

    monkeypatch.setattr(patcher, "refresh_loras", refresh_loras)
    monkeypatch.setattr(
        forge.memory_management.LoadedModel, "model_load", lambda self, budget=-1: refresh_loras()
    )
    with pytest.raises(ValueError, match="do not match"):
        forge.memory_management.load_models_gpu([patcher])
    monkeypatch.undo()
    assert managed.refusal(patcher.model) is None
    forge.memory_management.load_models_gpu([patcher])
    assert managed.attachment_of(patcher.model).active


def test_a_model_that_was_refused_stays_with_forge(forge_that_loads):
    forge, managed = forge_that_loads, forge_that_loads.qswap("managed")
    patcher = plain_patcher(forge)
    managed.refuse(patcher.model)
    for reserve_mb in (100, 470, 470):
        forge.memory_management.load_models_gpu([patcher], memory_required=reserve_mb * MB)
        assert managed.attachment_of(patcher.model) is None
        assert len(forge.memory_management.current_loaded_models) == 1


def test_what_forge_adds_to_a_weight_is_part_of_what_is_asked_for(small_gpu):
    module, added = torch.nn.Linear(2, 2), small_gpu.qswap("managed")._online_loras
    assert not added(module)
    lora = [[1.0, object(), 1.0, None, None]]
    module.forge_online_loras = {"weight": lora}
    first = added(module)
    assert first == added(module)
    lora[0][1] = (object(),)  # as Forge does after each run, when it moves the matrices
    assert added(module) == first
    lora[0][0] = 0.5  # as extensions do between two forwards
    assert added(module) != first
    hash(first)


@pytest.mark.parametrize("device", ["vulkan", "cpu"])  # torch has no module for the first, as for DirectML's
def test_a_model_on_a_device_that_qswap_cannot_serve_is_loaded_by_forge(small_gpu, device):
    memory, managed = small_gpu.qswap("memory"), small_gpu.qswap("managed")
    loaded, freed = [], []
    patcher = small_gpu.patcher_of(Network(small_gpu.operations), torch.float32, torch.device(device))
    memory._load_models_gpu(lambda models, *rest: loaded.append(models), [patcher], 16 * MB)
    memory._free_memory(lambda *arguments: freed.append(arguments), 16 * MB, torch.device(device))
    managed.attach_engine(SimpleNamespace(forge_objects=SimpleNamespace(unet=patcher)))
    assert loaded == [[patcher]]
    assert len(freed) == 1
    assert not managed.wants_care(patcher)
    assert managed.attachment_of(patcher.model) is None
    (reason,) = [entry["reason"] for entry in ledger.snapshot()["models"] if "reason" in entry]
    expected = (
        "computed on the CPU" if device == "cpu" else "PyTorch gives no control over the memory of vulkan"
    )
    assert reason.startswith(expected)
    memory._model_unload(lambda *arguments: None, SimpleNamespace(model=patcher), False)
    assert not any("reason" in entry for entry in ledger.snapshot()["models"]), (
        "it is said of none that is gone"
    )


def test_why_a_gpu_unpacks_slowly_is_said_once(small_gpu, monkeypatch):
    monkeypatch.setattr(kernels, "could_be_faster", lambda device_type: f"slowly on {device_type}")
    engine = SimpleNamespace(forge_objects=SimpleNamespace(unet=patcher_of(small_gpu)))
    small_gpu.qswap("managed").attach_engine(engine)
    ledger.message("something else")
    small_gpu.qswap("managed").attach_engine(engine)
    # Said again, it would be the newest.
    assert sm.messages()[-2:] == ["slowly on simgpu", "something else"]


def test_a_file_that_shrinks_while_its_model_is_placed_ends_the_generation_alone(
    small_gpu, tmp_path, monkeypatch
):
    small_gpu.shared.opts.data["qswap_location"] = "CPU"
    path = tmp_path / "model.gguf"
    blocks = sm.packed_bytes("Q8_0", (1024, 1024), 0)
    tensors = [Tensor(f"layers.{i}.weight", (1024, 1024), "Q8_0", blocks) for i in range(64)]
    path.write_bytes(gguf_bytes(tensors))
    weights = small_gpu.utils.load_torch_file(str(path))
    patcher = patcher_of(small_gpu)
    for i, layer in enumerate(patcher.model.diffusion_model.layers):
        layer.weight = weights[f"layers.{i}.weight"]
    small_gpu.sd_models.model_data.forge_hash = "loaded"
    check = small_gpu.qswap("managed").check_files

    def shrink_after(model):
        check(model)
        os.truncate(path, 4096)

    monkeypatch.setattr(small_gpu.qswap("managed"), "check_files", shrink_after)
    with pytest.raises((GGUFError, OSError), match=r"model\.gguf"):
        small_gpu.memory_management.load_models_gpu([patcher], memory_required=390 * MB)
    attachment = small_gpu.qswap("managed").attachment_of(patcher.model)
    assert attachment.resident_bytes == 0
    assert small_gpu.sd_models.model_data.forge_hash == ""
    assert any(str(path) in text for text in sm.messages())


class Modulation(torch.nn.Module):
    def __init__(self, lin):
        super().__init__()
        self.lin = lin


class IntegratedFluxTransformer2DModel(torch.nn.Module):
    """Layers as large as the others' and named as Forge's Flux names them, half of them modulation."""

    def __init__(self, operations):
        super().__init__()

        def linear(seed):
            weight = torch.nn.Parameter(sm.packed_weight("Q8_0", (1024, 1024), seed), requires_grad=False)
            return operations.ForgeOperations.Linear(weight)

        self.img_in = linear(0)
        self.single_blocks = torch.nn.ModuleList()
        for seed in range(3):
            block = torch.nn.Module()
            block.modulation, block.linear1 = Modulation(linear(seed)), linear(seed + 1)
            self.single_blocks.append(block)

    def forward(self, x, timestep, context, y, guidance=None, **kwargs):
        x = x + self.img_in(x) / 1000
        for block in self.single_blocks:
            x = x + block.linear1(x) / 1000 + block.modulation.lin(timestep * y) / 1000
        return x


def flux_images(forge, patcher, seeds):
    """Three steps for each seed, of one prompt: the results, and which layers were used for each."""
    attachment = forge.qswap("managed").attachment_for(patcher)
    y, guidance = torch.ones(1, 1024, device=GPU), torch.full((1,), 3.5, device=GPU)
    results, used = [], []
    for seed in seeds:
        forge.memory_management.load_models_gpu([patcher], memory_required=16 * MB)
        before = {layer.name: layer.times.uses for layer in attachment.layers}
        with torch.inference_mode():
            x = torch.full((1, 1024), float(seed), device=GPU)
            for t in (1.0, 0.6, 0.3):
                now = torch.full((1,), t, device=GPU)
                x = patcher.model.diffusion_model(
                    x, now, context=None, y=y, guidance=guidance, control=None, transformer_options={}
                )
            results.append(x.cpu())
        used.append({layer.name for layer in attachment.layers if layer.times.uses > before[layer.name]})
    return results, used


def test_another_image_of_the_same_prompt_does_without_the_modulation_layers_of_flux(small_gpu):
    managed = small_gpu.qswap("managed")
    small_gpu.shared.opts.data["qswap_gpu_budget_mb"] = 1
    network = IntegratedFluxTransformer2DModel(small_gpu.operations)
    patcher = small_gpu.patcher_of(network, torch.float32, torch.device(GPU, 0))
    results, used = flux_images(small_gpu, patcher, (1, 2, 1, 2))
    names = {layer.name for layer in managed.attachment_of(patcher.model).layers}
    modulation = {name for name in names if "modulation" in name}
    assert len(modulation) == 3
    # The second image is known to be of the same prompt from its second step on.
    assert used == [names, names, names - modulation, names - modulation]

    small_gpu.shared.opts.data["qswap_keep_outputs"] = False
    fresh, used = flux_images(small_gpu, patcher, (1, 2, 1, 2))
    assert used == [names] * 4
    assert all(map(torch.equal, fresh, results))
    assert torch.equal(results[0], results[2])
    assert not torch.equal(results[0], results[1])

    # Another extension may have wrapped a layer since: its wrapper stays, and ours only passes on.
    wrapped = network.single_blocks[0].modulation.lin
    ours = wrapped.forward
    wrapped.forward = lambda x: ours(x)
    theirs = wrapped.forward
    managed.release_all()
    assert [module for module in network.modules() if "forward" in module.__dict__] == [wrapped]
    assert wrapped.forward is theirs
    x = torch.ones(1, 1024)
    assert torch.equal(wrapped(x), type(wrapped).forward(wrapped, x))


def test_of_a_network_with_another_forward_nothing_is_kept(small_gpu):
    class IntegratedFluxTransformer2DModel(Network):
        def forward(self, x, timestep, context, y, guidance, mask):
            return x

    network = IntegratedFluxTransformer2DModel(small_gpu.operations)
    patcher = small_gpu.patcher_of(network, torch.float32, torch.device(GPU, 0))
    assert small_gpu.qswap("managed").attachment_for(patcher).idle.conditioning is None


# ---------------------------------------------------------------------------------------------- given back
def made_as_forge_makes_it(forge):
    """A model of safetensors: its parameters are plain, trainable, and of inference mode."""
    with torch.inference_mode():
        network = Network(forge.operations)
        for layer in network.layers:
            layer.weight = torch.nn.Parameter(torch.randn(512, 1024))
        network.layers = torch.nn.ModuleList(list(network.layers)[:1])
    return forge.patcher_of(network, torch.float32, torch.device(GPU, 0))


def test_switched_off_qswap_lets_go_of_plain_models_as_forge_makes_them(small_gpu, sim):
    forge, managed = small_gpu, small_gpu.qswap("managed")
    patcher, packed = made_as_forge_makes_it(forge), patcher_of(forge)
    (weight,) = patcher.model.parameters()
    assert weight.is_inference()
    assert weight.requires_grad
    attachments = [managed.attachment_for(one) for one in (patcher, packed)]
    for attachment in attachments:
        attachment.rebalance(4 * MB)
    forge.shared.opts.set("qswap_enabled", False)
    forge.generate()
    assert not forge.qswap("extension").applied()
    assert not any(message["level"] == "error" for message in ledger.snapshot()["messages"])
    assert not any(attachment.active for attachment in attachments)
    assert managed.attachment_of(patcher.model) is None
    (after,) = patcher.model.parameters()
    assert after.requires_grad
    assert after.device.type == "cpu"


def test_a_model_that_cannot_be_given_back_does_not_keep_the_others(small_gpu, monkeypatch):
    forge, managed = small_gpu, small_gpu.qswap("managed")
    patchers = [patcher_of(forge) for _ in range(3)]
    for patcher in patchers:
        managed.attachment_for(patcher).rebalance(4 * MB)
    broken = managed.attachment_of(patchers[1].model)

    def detach():
        raise RuntimeError("it holds on")

    monkeypatch.setattr(broken, "detach", detach)
    forge.shared.opts.set("qswap_enabled", False)
    for _ in range(2):
        forge.generate()
        assert not forge.qswap("extension").applied()
    assert all(managed.attachment_of(patcher.model) is None for patcher in patchers)
    (error,) = (one for one in ledger.snapshot()["messages"] if one["level"] == "error")
    assert "could not be given back: RuntimeError: it holds on" in error["text"]


def test_what_fails_before_a_model_is_given_back_leaves_nothing_on_the_device(small_gpu, monkeypatch):
    managed, patcher = small_gpu.qswap("managed"), patcher_of(small_gpu)
    attachment = managed.attachment_for(patcher)
    attachment.rebalance(4 * MB)

    def restore(_attachment):
        raise RuntimeError("not as it was")

    monkeypatch.setattr(managed.positions, "restore", restore)
    with pytest.raises(RuntimeError, match="not as it was"):
        managed.refuse(patcher.model)
    assert not attachment.active
    assert managed.attachment_of(patcher.model) is None
    assert not managed.wants_care(patcher)


# --------------------------------------------------------------------------------------------------- LoRAs
class Added:
    """What the stand-in's LoRAs add, and where."""

    def __init__(self, fails_on=None):
        self.devices, self.fails_on = [], fails_on

    def __rmul__(self, strength):
        self.strength = strength
        return self

    def __radd__(self, weight):
        self.devices.append(weight.device.type)
        if self.devices[-1] == self.fails_on:
            raise RuntimeError("not implemented for this device")
        return weight.add(self.strength)


@pytest.mark.parametrize(
    ("refused", "fails_on", "tried"),
    [(None, None, [GPU]), (1, None, ["cpu"]), (2, None, [GPU, "cpu"]), (None, GPU, [GPU, "cpu"])],
    ids=["room", "none", "too little", "cannot"],
)
def test_a_lora_is_merged_on_the_device_and_on_the_cpu_where_that_cannot(
    small_gpu, sim, refused, fails_on, tried
):
    model, added = Network(small_gpu.operations), Added(fails_on)
    plain = small_gpu.operations.ForgeOperations.Linear(torch.nn.Parameter(torch.ones(1024, 1024)))
    model.layers.append(plain.requires_grad_(False))
    patcher = small_gpu.patcher_of(model, torch.float32, torch.device(GPU, 0))
    patcher.lora_patches = {("style", 2.0, 1.0, False): {"diffusion_model.layers.64.weight": [(2.0, added)]}}
    if refused is not None:
        sim.fail_next_device(refused)
    small_gpu.memory_management.load_models_gpu([patcher])
    assert added.devices == tried
    assert plain.weight.device.type == "cpu"
    assert torch.equal(plain.weight, torch.full((1024, 1024), 3.0))
    attachment = small_gpu.qswap("managed").attachment_of(patcher.model)
    assert attachment.active
    patcher.lora_patches = {}
    small_gpu.memory_management.load_models_gpu([patcher])
    patcher.refresh_loras()
    assert torch.equal(plain.weight, torch.ones(1024, 1024))
