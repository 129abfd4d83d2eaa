"""Fixtures for the simulated accelerator (simgpu/README.md), compiled when the first test asks for it."""

from __future__ import annotations

import gc
import os
import shutil
import sys
from pathlib import Path

import pytest

TESTS = str(Path(__file__).resolve().parent)
if TESTS not in sys.path:  # so that `import simgpu` finds tests/simgpu with any import mode of pytest
    sys.path.insert(0, TESTS)

MB = 1 << 20

# Bandwidths well below what memcpy reaches: the machine's own speed does not show in what a test measures.
SIM_SETTINGS = {
    "total": 2048 * MB,
    "h2d": 2e9,
    "d2h": 2e9,
    "pageable": 1e9,
    "latency": 0,
    "pin_limit": -1,
    "pin_pow2": False,
    "op_seconds": 0,
    "op_factor": 1,
    "poison": 0xC5,
    "async_compute": False,
    "cache_counts": False,
    "strict": True,
    "virtual_time": False,
}


def _reason_to_skip_simgpu() -> str | None:
    if sys.platform != "linux":
        return "the simulated accelerator needs Linux"
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return "the simulated accelerator needs a C++ compiler: install g++"
    return None


@pytest.fixture(scope="session")
def simgpu():
    """The simgpu package, compiled where it was not yet.

    Skips where it cannot be compiled, except in CI, where that is a failure. With a PyTorch older than the
    one whose interfaces for device types it is written for, it always skips.
    """
    import torch

    if torch.torch_version.TorchVersion(torch.__version__) < (2, 13):
        pytest.skip(f"the simulated accelerator needs PyTorch 2.13; this is {torch.__version__}")
    reason = _reason_to_skip_simgpu()
    if reason and not os.environ.get("CI"):
        pytest.skip(reason)
    import simgpu

    return simgpu


@pytest.fixture
def sim(simgpu):
    """The simgpu package, its device reset: 2 GB, 2 GB/s (1 GB/s pageable), synchronous compute.

    The test fails if work on the device was ordered wrongly anywhere: hazards() must be all zero at its end.
    """
    import torch

    for name, module in sys.modules.copy().items():
        if name.startswith("lib_qswap.quant.unpack"):  # Their tables stay on the device.
            for value in vars(module).values():
                getattr(value, "cache_clear", int)()
    gc.collect()
    torch.simgpu.set_stream(torch.simgpu.default_stream())
    simgpu.reset()
    torch.simgpu.empty_cache()
    with simgpu.settings(**SIM_SETTINGS):
        yield simgpu
        gc.collect()
        torch.simgpu.synchronize()
        torch.simgpu.set_stream(torch.simgpu.default_stream())
        found = {name: count for name, count in simgpu.hazards().items() if count}
        if simgpu.config()[
            "async_compute"
        ]:  # legal there, as on CUDA: the stream's own order keeps the copy first
            found.pop("freed_in_flight_same_stream", None)
        log = simgpu.hazard_log()[-5:]
        simgpu.reset()
    assert not found, f"hazards on the simulated device: {found}\n" + "\n".join(log)


@pytest.fixture(params=["sync", "queued"])
def compute_mode(request, sim):
    """Runs the test twice. "sync": the caller does the default stream's work at once; "queued": it runs later
    on a thread of its own, as on a real GPU."""
    sim.set_async_compute(request.param == "queued")
    yield request.param
    sim.synchronize()
    sim.set_async_compute(False)


@pytest.fixture
def virtual_time(sim):
    """The device's times are computed, not waited for: the same on any machine, however busy it is."""
    sim.set_virtual_time(True)
    yield
    sim.synchronize()


@pytest.fixture
def engine(sim):
    """For tests of swapping: one thread of compute, and an engine that has no models before and after."""
    import swap_models
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with swap_models.clean_engine():
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def forge():
    """The stand-in for Forge with QSwap loaded and its settings made. Files that need it otherwise have a
    `forge` of their own."""
    import forge_standin

    with forge_standin.running() as webui:
        webui.load_scripts()
        webui.script_callbacks.run("ui_settings")
        yield webui
