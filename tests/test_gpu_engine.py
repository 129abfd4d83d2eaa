"""The swap engine on a real GPU: what only its own driver can show."""

from __future__ import annotations

import copy

import pytest
import swap_models
import torch
from swap_models import clean_engine, packed_weight

from lib_qswap.swap import streamer
from lib_qswap.swap.device import device_of
from lib_qswap.swap.device_state import state_of
from lib_qswap.swap.manager import attached

DEVICE = "cuda"
WIDTH = 2048
LAYERS = 24
STEPS = 6

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU here"),
]


@pytest.fixture(autouse=True)
def engine():
    with clean_engine():
        yield


def make_model() -> torch.nn.Sequential:
    """Packed layers of a few MB each."""
    layers = []
    for nth in range(LAYERS):
        with torch.device("meta"):
            layer = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        kind = ("Q4_K", "Q8_0", "Q6_K")[nth % 3]
        layer.weight = torch.nn.Parameter(packed_weight(kind, (WIDTH, WIDTH), nth), requires_grad=False)
        layers += [layer, torch.nn.LayerNorm(WIDTH, elementwise_affine=False)]
    return torch.nn.Sequential(*layers)


def inputs() -> torch.Tensor:
    return torch.randn((64, WIDTH), generator=torch.Generator().manual_seed(0)).half().to(DEVICE)


@torch.no_grad()
def outputs(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Of steps that the host issues without waiting for any."""
    return [one.cpu() for one in [model(x * (1 + step)) for step in range(STEPS)]]


def options(location: str, share: float) -> dict:
    packed_bytes = sum(layer.weight.packed_nbytes for layer in make_model()[::2])
    scratch_bytes = WIDTH * WIDTH * 2
    return {
        "device": DEVICE,
        "location": location,
        "budget_bytes": int(share * packed_bytes) + scratch_bytes + (16 << 20),
        "compute_dtype": torch.float16,
    }


@pytest.fixture(scope="module")
def expected():
    with clean_engine():
        model = make_model()
        with attached(model, **options("gpu", 1.0)) as attachment:
            assert attachment.resident_bytes == attachment.payload_bytes
            return outputs(model, inputs())


@pytest.mark.parametrize("share", [0.0, 0.25, 0.75])
@pytest.mark.parametrize("location", swap_models.LOCATIONS)
def test_outputs_are_those_of_the_resident_model(location, share, expected, tmp_path):
    model = make_model()
    x = inputs()
    with attached(model, **options(location, share)) as attachment:
        for _ in range(3):  # The plan changes after the first steps.
            for value, wanted in zip(outputs(model, x), expected, strict=True):
                assert torch.equal(value, wanted)
        assert attachment.resident_bytes < attachment.payload_bytes
        attachment.unload()
        for value, wanted in zip(outputs(model, x), expected, strict=True):
            assert torch.equal(value, wanted)


@torch.no_grad()
def test_small_layers_that_come_together_are_those_of_the_resident_model(monkeypatch):
    width, count, ring_layers = 256, 60, 24
    results, copies = [], []
    whole = streamer.Streamer._fetch_together

    def counted(self, layers):
        copies.append(len(layers))
        return whole(self, layers)

    monkeypatch.setattr(streamer.Streamer, "_fetch_together", counted)
    layers = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(count))
    for nth, layer in enumerate(layers):
        weight = packed_weight("Q8_0", (width, width), nth)
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    x = inputs()[:, :width]
    for location, ring_bytes in (("gpu", None), ("shared", ring_layers * layers[0].weight.packed_nbytes)):
        norm = torch.nn.LayerNorm(width, elementwise_affine=False)
        model = torch.nn.Sequential(*(one for layer in copy.deepcopy(layers) for one in (layer, norm)))
        with attached(
            model,
            device=DEVICE,
            location=location,
            budget_bytes=(ring_bytes or 1 << 30) + width * width * 2 + (1 << 12),
            compute_dtype=torch.float16,
            ring_bytes=ring_bytes,
        ):
            results.append([one for _ in range(3) for one in outputs(model, x)])
    assert max(copies) > 1
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_masters_in_shared_memory_are_page_locked_until_the_model_is_let_go():
    model = make_model()
    pins = state_of(device_of(DEVICE)).pin_budget
    with attached(model, **options("shared", 0.0)) as attachment:
        torch.cuda.synchronize()
        masters = [layer.weight.packed for layer in model[::2]]
        assert all(master.is_pinned() for master in masters)
        assert pins.used_bytes >= attachment.payload_bytes
    assert pins.used_bytes == 0
    assert not any(layer.weight.packed.is_pinned() for layer in model[::2])


@torch.no_grad()
def test_steps_do_not_make_the_host_wait(expected):
    model = make_model()
    x = inputs()
    with attached(model, **options("shared", 0.25)):
        outputs(model, x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = [model(x * (1 + step)) for step in range(STEPS)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a.cpu(), b) for a, b in zip(result, expected, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("location", ["shared", "cpu"])
def test_steps_on_changing_streams_give_the_same_and_leave_the_current_one_as_it_was(expected, location):
    model = make_model()
    x = inputs()
    streams = [torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()]
    results = []
    with attached(model, **options(location, 0.25)):
        for step in range(STEPS):
            stream = streams[step % 3]
            stream.wait_stream(streams[(step - 1) % 3])
            with torch.cuda.stream(stream):
                results.append(model(x * (1 + step)))
                assert torch.cuda.current_stream() == stream
        assert torch.cuda.current_stream() == streams[0]
        torch.cuda.synchronize()
        assert all(torch.equal(a.cpu(), b) for a, b in zip(results, expected, strict=True))


@pytest.mark.skipif(torch.version.cuda is None, reason="needs CUDA's runtime")
def test_page_locked_memory_is_copied_without_torch():
    copier = state_of(device_of(DEVICE)).copier
    source = torch.arange(1 << 20, dtype=torch.int32).pin_memory()
    target = torch.zeros(1 << 20, dtype=torch.int32, device=DEVICE)
    torch.cuda.synchronize()
    assert copier.direct is not None
    assert copier.direct(target[1:], source[1:], 400)
    copier.stream.synchronize()
    assert torch.equal(target[:101].cpu(), source[:101])
    assert not target[101:].any()


def test_work_goes_on_after_page_locking_was_refused():
    device = device_of(DEVICE)
    buffer = torch.zeros(8 << 20, dtype=torch.uint8)
    assert device.register(buffer) is None
    try:
        assert "refused" in device.register(buffer)
        torch.cuda.synchronize()
        assert torch.ones(8, device=DEVICE).sum().item() == 8
    finally:
        device.unregister(buffer.data_ptr())


def test_a_budget_that_the_memory_does_not_hold_is_made_smaller(expected):
    model = make_model()
    x = inputs()
    torch.cuda.empty_cache()
    most_bytes = torch.cuda.memory_reserved() + (72 << 20)
    torch.cuda.set_per_process_memory_fraction(most_bytes / torch.cuda.mem_get_info()[1])
    try:
        with attached(model, **options("shared", 1.0)) as attachment:
            for value, wanted in zip(outputs(model, x), expected, strict=True):
                assert torch.equal(value, wanted)
            assert attachment.resident_bytes < attachment.payload_bytes
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
