"""QSwap beside Forge's own methods, in one running Forge on the simulated accelerator, by its web API.

    SIMGPU_TOTAL_MB=8192 FORGE=WEBUI python tests/simgpu/launch_forge.py --api --nowebui --port 7970 &
    FORGE=WEBUI python benchmarks/forge_side_by_side.py MODEL [--total-mb 1230] [--link-mb-s 100] [--json
    FILE]

QSwap is this checkout, linked into WEBUI/extensions. Every way generates the same two images, of two prompts,
on a device of the same size: once where the model fits whole, and once on one of `--total-mb`, with a link of
`--link-mb-s` (half of it from pageable memory). Swapped, QSwap's arithmetic is "like Forge".
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import urllib.request
from pathlib import Path
from typing import Any

WHOLE_BYTES = 8 << 30
INFERENCE_MB = 1024
FLUX_MODULES = ("VAE/flux_ae_rand", "text_encoder/clip_l_rand", "text_encoder/t5xxl_rand")
PROMPTS = ("a cat", "two dogs, running")
ARITHMETICS = ("exact", "like Forge")
QSWAP_LOCATIONS = ("Shared", "CPU", "Disk")
FORGE_METHODS = (("CPU", "Queue"), ("Shared", "Queue"), ("Shared", "Async"))


class Server:
    """The web API of a Forge that launch_forge.py started."""

    def __init__(self, port: int, model: str, steps: int) -> None:
        self.port, self.model, self.steps = port, model, steps

    def call(self, path: str, data: dict | None = None) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            data=None if data is None else json.dumps(data).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=900) as answer:
            return json.loads(answer.read() or b"null")

    def use(
        self,
        *,
        total_bytes: float,
        link: float,
        qswap: str | None,
        arithmetic: str = "like Forge",
        pin: str = "CPU",
        method: str = "Queue",
    ) -> None:
        """The way of moving weights from the next image on; every model is loaded anew for it."""
        # What the way before has left on the device goes first, at no cost.
        self.call("/simgpu/method", {"h2d": 0, "d2h": 0, "pageable": 0})
        self.call("/sdapi/v1/unload-checkpoint", {})
        self.call("/sdapi/v1/options", {"qswap_enabled": qswap is not None, "qswap_arithmetic": arithmetic})
        if qswap is not None:
            self.call("/sdapi/v1/options", {"qswap_location": qswap})
        device = {"total": total_bytes, "h2d": link, "d2h": link, "pageable": link / 2}
        self.call("/simgpu/method", {"pin": pin, "async": method, "inference": INFERENCE_MB, **device})

    def measure(self, name: str) -> dict[str, Any]:
        """Loads the model afresh and makes two images, the first one cold, the second of another prompt."""
        self.call("/simgpu/reset", {})
        images, seconds = [], []
        for prompt in PROMPTS:
            begun = time.perf_counter()
            images.append(self._image(prompt))
            seconds.append(time.perf_counter() - begun)
        report = self.call("/simgpu")
        stats = report["stats"]
        result = {
            "way": name,
            "step_s": statistics.median(report["steps"][1 : self.steps] + report["steps"][self.steps + 1 :]),
            "first_image_s": seconds[0],
            "second_image_s": seconds[1],
            "device_peak_bytes": stats["peak_device_bytes"],
            "d2h_bytes": stats.get("d2h_pageable_bytes", 0) + stats.get("d2h_pinned_bytes", 0),
            "page_locked_bytes": stats["pinned_bytes"] + stats["registered_bytes"],
            "hazards": sum(report["hazards"].values()),
            "images": [hash(image) for image in images],
        }
        print({key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()})
        return result

    def _image(self, prompt: str) -> str:
        models = Path(os.environ["FORGE"]) / "models"
        modules = [str(models / f"{name}.safetensors") for name in FLUX_MODULES]
        answer = self.call(
            "/sdapi/v1/txt2img",
            {
                "prompt": prompt,
                "steps": self.steps,
                "width": 64,
                "height": 64,
                "cfg_scale": 1,
                "seed": 1,
                "sampler_name": "Euler",
                "scheduler": "Simple",
                "override_settings": {"sd_model_checkpoint": self.model, "forge_additional_modules": modules},
                "override_settings_restore_afterwards": False,
            },
        )
        return answer["images"][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--port", type=int, default=7970)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--total-mb", type=int, default=1230)
    parser.add_argument("--link-mb-s", type=float, default=100)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    server = Server(arguments.port, arguments.model, arguments.steps)
    small, link = arguments.total_mb << 20, arguments.link_mb_s * 1e6
    results: dict[str, Any] = {"whole": [], "swapped": []}
    for _ in range(2):  # The first round also warms up.
        results["whole"] = []
        for arithmetic in ARITHMETICS:
            server.use(total_bytes=WHOLE_BYTES, link=0, qswap="Auto", arithmetic=arithmetic)
            results["whole"].append(server.measure(f"QSwap, {arithmetic}"))
        server.use(total_bytes=WHOLE_BYTES, link=0, qswap=None)
        results["whole"].append(server.measure("Forge"))
    server.use(total_bytes=small, link=link, qswap=QSWAP_LOCATIONS[0])
    server.measure("warming up for the small device")
    for location in QSWAP_LOCATIONS:
        server.use(total_bytes=small, link=link, qswap=location)
        results["swapped"].append(server.measure(f"QSwap, {location}"))
    for pin, method in FORGE_METHODS:
        server.use(total_bytes=small, link=link, qswap=None, pin=pin, method=method)
        results["swapped"].append(server.measure(f"Forge, {pin}, {method}"))
    rows = results["whole"] + results["swapped"]
    alike = [row for row in rows if row["way"] != "QSwap, exact"]  # more precise than Forge: other pixels
    results["same_images"] = len({tuple(row["images"]) for row in alike}) == 1
    print("all images are the same" if results["same_images"] else "the images differ")
    for row in rows:
        del row["images"]  # Hashes of this process only.
    results["conditions"] = [vars(arguments) | {"json": None}]
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
