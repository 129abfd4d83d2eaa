"""Runs Forge's own three ways of moving weights, through the web API of a Forge started by launch_forge.py:

    FORGE=WEBUI_FOLDER python bench_forge.py MODEL [STEPS] [inference=2200 h2d=2e9 ...]

Settings are those of POST /simgpu/method; PORT is the server's (default 7970). One line for each way and
load.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
import urllib.request

MIB = 1 << 20
FLUX_MODULES = ("VAE/flux_ae_rand", "text_encoder/clip_l_rand", "text_encoder/t5xxl_rand")
METHODS = (("CPU", "Queue"), ("Shared", "Queue"), ("Shared", "Async"))


def call(path: str, data: dict | None = None):
    """A request to the server (POST where there is data); its JSON answer."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{os.environ.get('PORT', '7970')}{path}",
        data=None if data is None else json.dumps(data).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=580) as answer:
        return json.loads(answer.read() or b"null")


def generate(model: str, steps: int) -> str:
    """One 64 x 64 image, base64."""
    models = os.path.join(os.environ["FORGE"], "models")
    modules = [f"{models}/{name}.safetensors" for name in FLUX_MODULES] if model.startswith("flux") else []
    request = {
        "prompt": "a cat",
        "steps": steps,
        "width": 64,
        "height": 64,
        "cfg_scale": 1,
        "distilled_cfg_scale": 3.5,
        "seed": 1,
        "sampler_name": "Euler",
        "scheduler": "Simple",
        "override_settings": {"sd_model_checkpoint": model, "forge_additional_modules": modules},
        "override_settings_restore_afterwards": False,
    }
    return call("/sdapi/v1/txt2img", request)["images"][0]


def summary(report: dict, image: str) -> str:
    """One line from GET /simgpu's answer; counters are per step."""
    steps, stats = report["steps"], report["stats"]
    each = {key: value / max(len(steps), 1) for key, value in report["counts"].items()}
    pinned, pageable = (
        f"{each[f'h2d_{kind}_n']:.0f}x {each[f'h2d_{kind}_bytes'] / MIB:.1f} MB"
        for kind in ("pinned", "pageable")
    )
    hazards = {name: count for name, count in report["hazards"].items() if count}
    parts = (
        f"steps {steps} s",
        f"image {hashlib.md5(image.encode()).hexdigest()[:8]}",
        f"peak device {report['peak'] / MIB:.0f} MB",
        f"pinned {stats['pinned_bytes'] / MIB:.0f} MB",
        f"per step: h2d pinned {pinned}, pageable {pageable}",
        f"engine busy {each['h2d_engine_busy_s']:.2f} s",
        f"blocked in copies {each['host_blocked_copy_s']:.2f} s",
        f"waits {each['host_wait_s']:.2f} s",
        f"compute {each['compute_s']:.2f} s",
        f"ops {each['ops']:.0f} ({each['ops_deferred']:.0f} queued, {each['ops_drained']:.0f} drained)",
        f"out of memory {stats['ooms']}",
        f"hazards {hazards}",
    )
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("steps", type=int, nargs="?", default=3)
    parser.add_argument("settings", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    settings = {key: float(value) for key, value in (pair.split("=") for pair in arguments.settings)}
    for pin, loading in METHODS:
        for load in ("first", "second"):  # Forge pins differently when it loads a second time
            call("/simgpu/method", {"pin": pin, "async": loading, **settings})
            call("/simgpu/reset", {})
            started = time.perf_counter()
            image = generate(arguments.model, arguments.steps)
            seconds = time.perf_counter() - started
            report = call("/simgpu")
            print(f"{pin}/{loading} {load} load: {seconds:.1f} s, {summary(report, image)}", flush=True)
            if report["log"]:
                print("    ", report["log"][-1])


if __name__ == "__main__":
    main()
