"""Starts a Forge folder on the simulated accelerator:

    FORGE=WEBUI_FOLDER python launch_forge.py [Forge's arguments]

The SIMGPU_* environment sets the device (README.md). FORGE_DTYPE=bf16 (default) or fp32 is what the device
is said to compute with; FORGE_STREAMS=0 leaves Forge's Async method without a side stream.

Forge's web server then has GET /simgpu (counters, hazards, seconds of each sampling step), POST
/simgpu/reset, and POST /simgpu/method, which takes Forge's memory settings and any setting of the simulation:
{"async": "Async", "pin": "Shared", "inference": 2200, "h2d": 2e9, "pageable": 1e9}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
STEP_COUNTERS = (
    "h2d_pinned_n",
    "h2d_pinned_bytes",
    "h2d_pageable_n",
    "h2d_pageable_bytes",
    "h2d_engine_busy_s",
    "host_blocked_copy_s",
    "host_wait_s",
    "ops",
    "ops_deferred",
    "ops_drained",
    "compute_s",
)


def enter_webui(folder: Path) -> None:
    """Makes Forge's modules importable, and its command line one that does not look for CUDA while it is
    imported."""
    os.chdir(folder)
    sys.path[0:1] = [str(folder), str(folder / "packages_3rdparty"), str(HERE.parent)]
    sys.argv = ["launch.py", "--always-cpu", *sys.argv[1:]]


def use_simgpu(compute_dtype: str, side_stream: bool) -> None:
    """Points Forge's memory management at the simulated device."""
    import torch
    from backend import memory_management as memory
    from backend import stream

    import simgpu

    device = torch.device("simgpu", 0)
    forge_free, forge_total = memory.get_free_memory, memory.get_total_memory

    def get_free_memory(dev=None, torch_free_too=False):
        if dev is not None and dev.type == "cpu":
            return forge_free(dev, torch_free_too)
        kept_for_reuse = torch.simgpu.memory_reserved() - simgpu.memory_allocated()
        free = simgpu.mem_get_info()[0] + kept_for_reuse
        return (free, 0) if torch_free_too else free

    def get_total_memory(dev=None, torch_total_too=False):
        if dev is not None and dev.type == "cpu":
            return forge_total(dev, torch_total_too)
        total = simgpu.mem_get_info()[1]
        return (total, total) if torch_total_too else total

    def half_on_device(device=None, model_params=0, prioritize_performance=True, manual_cast=False):
        return compute_dtype == "bf16" and (device is None or device.type != "cpu")

    memory.cpu_state, memory.vram_state = memory.CPUState.GPU, memory.VRAMState.NORMAL_VRAM
    memory.get_torch_device = lambda: device
    memory.get_free_memory, memory.get_total_memory = get_free_memory, get_total_memory
    memory.total_vram = get_total_memory() / 2**20
    memory.soft_empty_cache = lambda force=False: torch.simgpu.empty_cache()
    memory.should_use_fp16 = memory.should_use_bf16 = half_on_device
    memory.torch_device_name = "simgpu"
    if side_stream:
        stream.current_stream, stream.mover_stream = torch.simgpu.current_stream(), torch.simgpu.Stream()
        stream.stream_context = lambda: torch.simgpu.stream
    print(f"[simgpu] {device}, {memory.total_vram:.0f} MB, {memory.vram_state}, {simgpu.config()}")


class StepRecorder:
    """What the sampling steps alone cost: seconds of each, sums of the transfer counters, peak device
    bytes."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.step_seconds: list[float] = []
        self.counts = dict.fromkeys(STEP_COUNTERS, 0)
        self.peak_device_bytes = 0

    def install(self) -> None:
        """Measures every forward of the diffusion model."""
        import torch
        from backend.modules.k_model import KModel

        import simgpu

        forge_apply = KModel.apply_model

        def apply_model(model, *args, **kwargs):
            torch.simgpu.synchronize()
            simgpu.reset_peak_memory_stats()
            before, started = simgpu.stats(), time.perf_counter()
            result = forge_apply(model, *args, **kwargs)
            torch.simgpu.synchronize()
            self.step_seconds.append(round(time.perf_counter() - started, 4))
            after = simgpu.stats()
            self.peak_device_bytes = max(self.peak_device_bytes, after["peak_device_bytes"])
            for key in STEP_COUNTERS:
                self.counts[key] += after[key] - before[key]
            return result

        KModel.apply_model = apply_model

    def report(self) -> dict:
        import simgpu

        return {
            "steps": self.step_seconds,
            "counts": self.counts,
            "peak": self.peak_device_bytes,
            "stats": simgpu.stats(),
            "hazards": simgpu.hazards(),
            "log": simgpu.hazard_log()[-5:],
            "not_deferred": simgpu.not_deferred(),
            "config": simgpu.config(),
        }


def add_routes(app, recorder: StepRecorder) -> None:
    """The /simgpu routes of Forge's web server."""
    import simgpu

    @app.get("/simgpu")
    def report():
        return json.loads(json.dumps(recorder.report()))  # Gradio's encoder accepts string keys only

    @app.post("/simgpu/method")
    def method(wanted: dict):
        from modules import processing
        from modules_forge import main_entry

        main_entry.refresh_memory_management_settings(
            async_loading=wanted.get("async", "Queue"),
            pin_shared_memory=wanted.get("pin", "CPU"),
            inference_memory=wanted.get("inference", 2200),
        )
        processing.need_global_unload = True
        return simgpu.config(**{key: value for key, value in wanted.items() if key in simgpu.config()})

    @app.post("/simgpu/reset")
    def reset():
        recorder.clear()
        simgpu.reset()
        return {}


def add_routes_when_started(recorder: StepRecorder) -> None:
    """Forge clears the callbacks registered this early, so the function that calls them is wrapped
    instead."""
    from modules import script_callbacks

    forge_started = script_callbacks.app_started_callback

    def app_started_callback(demo, app):
        forge_started(demo, app)
        add_routes(app, recorder)

    script_callbacks.app_started_callback = app_started_callback


def main() -> None:
    if "FORGE" not in os.environ:
        sys.exit("launch_forge.py: set FORGE to the folder of the web UI (the one with launch.py)")
    enter_webui(Path(os.environ["FORGE"]).resolve())
    use_simgpu(os.environ.get("FORGE_DTYPE", "bf16"), os.environ.get("FORGE_STREAMS", "1") == "1")
    recorder = StepRecorder()
    recorder.install()
    add_routes_when_started(recorder)
    import launch

    launch.main()


if __name__ == "__main__":
    main()
