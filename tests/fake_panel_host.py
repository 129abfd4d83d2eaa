"""A host that plays a generation for the panel, without a model: one moment, one picture.

`python tests/fake_panel_host.py [--port P]` serves it on a page of its own.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

MB = 1024**2
STEPS = 20
STEP_S = 1.92
RING_LAYERS = 4

# (name, packed bytes) of one block of Flux dev at Q4_K, hidden size 3072: elements * 144 / 256.
_DOUBLE = [
    (f"{stream}_{part}", rows * 3072 * 144 // 256)
    for stream in ("img", "txt")
    for part, rows in (
        ("mod.lin", 18432),
        ("attn.qkv", 9216),
        ("attn.proj", 3072),
        ("mlp.0", 12288),
        ("mlp.2", 12288),
    )
]
_SINGLE = [
    ("modulation.lin", 9216 * 3072 * 144 // 256),
    ("linear1", 21504 * 3072 * 144 // 256),
    ("linear2", 15360 * 3072 * 144 // 256),
]


def flux_layers() -> list[dict[str, Any]]:
    """The 304 layers of Flux's 19 double and 38 single blocks, in execution order."""
    sizes = [(f"double_blocks.{block}.{part}", size) for block in range(19) for part, size in _DOUBLE]
    sizes += [(f"single_blocks.{block}.{part}", size) for block in range(38) for part, size in _SINGLE]
    return [
        _layer(i, name, "Linear", "Q4_K", size, size * 256 // 144) for i, (name, size) in enumerate(sizes)
    ]


def t5_layers() -> list[dict[str, Any]]:
    sizes = []
    for block in range(24):
        sizes += [
            (f"t5xxl.transformer.encoder.block.{block}.layer.0.SelfAttention.{part}", 4096 * 4096)
            for part in "qkvo"
        ]
        sizes += [
            (f"t5xxl.transformer.encoder.block.{block}.layer.1.DenseReluDense.{part}", 4096 * 10240)
            for part in ("wi_0", "wi_1", "wo")
        ]
    return [_layer(i, name, "Linear", "Q8_0", size * 34 // 32, size) for i, (name, size) in enumerate(sizes)]


def _layer(i: int, name: str, kind: str, quant: str, size: int, params: int) -> dict[str, Any]:
    return {"i": i, "name": name, "kind": kind, "quant": quant, "bytes": size, "params": params}


class FakeHost:
    """Plays 20 steps of a Flux-sized model over and over, a text encoder unloaded, a VAE left to Forge.

    layers: the static fields of the main model's layers. clock: the moment in seconds; a test sets it.
    """

    def __init__(
        self,
        layers: list[dict[str, Any]] | None = None,
        clock: Callable[[], float] = time.monotonic,
        resident_share: float = 0.62,
    ) -> None:
        self.layers = flux_layers() if layers is None else layers
        self.encoder = t5_layers()
        self.clock = clock
        self.enabled = True
        self.snapshots = 0
        self.applied: dict[str, Any] = {}
        self.messages: list[dict[str, Any]] = [
            {"t": 1_780_000_000, "level": "info", "text": "KModel: 184 of 304 layers stay on the GPU."},
            {
                "t": 1_780_000_004,
                "level": "warning",
                "text": "Page-locked memory is full (4.0 GB): 14 layers live in pageable RAM instead. "
                "Raise the pin budget to make their transfers faster.",
            },
        ]
        error = 0.0
        self._resident = []
        for _ in self.layers:
            error += resident_share
            self._resident.append(error >= 1 - 1e-9)
            error -= self._resident[-1]
        swapped = [i for i, resident in enumerate(self._resident) if not resident]
        self._home = ["shared"] * len(self.layers)
        for nth, i in enumerate(swapped):
            if nth % 8 == 5:
                self._home[i] = "cpu"
            elif nth % 29 == 12:
                self._home[i] = "disk"

    def snapshot(self) -> dict[str, Any]:
        self.snapshots += 1
        main = self._main_model(self.clock())
        fixed, scratch = 78 * MB, 64 * MB
        weights = main["bytes"]["resident"] + main["bytes"]["ring"] + fixed + scratch
        total, other = 12 * 1024 * MB, 3480 * MB
        return {
            "schema": 1,
            "enabled": self.enabled,
            "device": "cuda:0",
            "location": "auto",
            "unpack_kernel": "Triton",
            "models": [self._encoder_model(), main, self._vae()] if self.enabled else [],
            "device_memory": {
                "total": total,
                "weights": weights,
                "other": other,
                "free": max(total - weights - other, 0),
            },
            "messages": self.messages,
        }

    def plan(self, what_if: dict[str, Any]) -> dict[str, Any]:
        budget = what_if.get("budget_bytes")
        if not isinstance(budget, int) or budget < 0:
            raise ValueError(f"budget_bytes must be a number of bytes, not {budget!r}")
        return {"resident": [], "ring_bytes": 0, "step_s": STEP_S, "bound_s": STEP_S}

    def apply(self, settings: dict[str, Any]) -> dict[str, Any]:
        for name, value in settings.items():
            if name != "qswap_location":
                raise ValueError(f"QSwap has no setting named {name!r}")
            if value not in ("Auto", "GPU", "Shared", "CPU", "Disk"):
                raise ValueError(f"qswap_location must be Auto, GPU, Shared, CPU or Disk, not {value!r}")
        self.applied.update(settings)
        return {"applied": settings, "messages": []}

    def trace(self) -> list[dict[str, Any]]:
        return [{"name": "step", "ph": "X", "ts": 0, "dur": STEP_S * 1e6, "pid": 0, "tid": 0}]

    def _main_model(self, now: float) -> dict[str, Any]:
        step, within = divmod(now / STEP_S, 1.0)
        head = int(within * len(self.layers))
        states = [
            "in_use" if i == head else "resident" if resident else "swapped"
            for i, resident in enumerate(self._resident)
        ]
        ahead = [
            i % len(self.layers)
            for i in range(head + 1, head + 1 + len(self.layers))
            if not self._resident[i % len(self.layers)]
        ][:RING_LAYERS]
        for nth, i in enumerate(ahead):
            states[i] = "ready" if nth < RING_LAYERS - 1 else "fetching"
        layers = [
            {
                **layer,
                "home": self._home[i],
                "state": states[i],
                "uses": int(step) + (i <= head),
                "stall_us": 0 if self._home[i] == "shared" or self._resident[i] else 900,
            }
            for i, layer in enumerate(self.layers)
        ]
        swappable = sum(layer["bytes"] for layer in layers)
        resident = sum(
            layer["bytes"] for layer, stays in zip(self.layers, self._resident, strict=True) if stays
        )
        ring = RING_LAYERS * max((layer["bytes"] for layer in layers), default=0)
        pinned = sum(
            layer["bytes"]
            for i, layer in enumerate(layers)
            if self._home[i] == "shared" and not self._resident[i]
        )
        return {
            "name": "KModel",
            "active": True,
            "managed": True,
            "bytes": {
                "total": swappable + 78 * MB,
                "budget": resident + ring + 142 * MB,
                "resident": resident,
                "ring": ring,
                "fixed": 78 * MB,
                "scratch": 64 * MB,
                "pinned": pinned,
                "pin_budget": 4096 * MB,
                "swapped_per_step": swappable - resident,
            },
            "step": {
                "index": int(step) % STEPS + 1,
                "of": STEPS,
                "seconds": STEP_S,
                "compute_s": 1.90,
                "stall_s": 0.02,
                "h2d_bytes": swappable - resident,
                "bound_s": 1.90,
            },
            "layers": layers,
        }

    def _encoder_model(self) -> dict[str, Any]:
        return {
            "name": "JointTextEncoder",
            "active": False,
            "managed": True,
            "bytes": {
                "total": sum(layer["bytes"] for layer in self.encoder),
                "budget": 0,
                "resident": 0,
                "ring": 0,
                "fixed": 0,
                "scratch": 0,
                "pinned": 0,
                "pin_budget": 4096 * MB,
                "swapped_per_step": None,
            },
            "step": None,
            "layers": [
                {**layer, "home": "disk", "state": "swapped", "uses": 1, "stall_us": 0}
                for layer in self.encoder
            ],
        }

    @staticmethod
    def _vae() -> dict[str, Any]:
        return {
            "name": "IntegratedAutoencoderKL",
            "active": True,
            "managed": False,
            "reason": "plain weights that fit: left to Forge",
            "bytes": {"total": 160 * MB},
            "layers": [],
        }


def page_html(*mounts: str, body_class: str = "", title: str = "QSwap memory") -> str:
    """A plain page with the panel's files and the given mount elements."""
    from lib_qswap.panel.page import javascript, stylesheet

    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        "<meta name=viewport content='width=device-width'>"
        "<style>:root{color-scheme:light dark}body{margin:24px auto;max-width:1120px;padding:0 16px;"
        "font:14px system-ui,sans-serif}body.dark{color-scheme:dark;background:#0b0f19}</style>"
        f"<style>{stylesheet()}</style><script>{javascript()}</script>"
        f"<body class='{body_class}'>{''.join(mounts)}</body></html>"
    )


def main() -> None:
    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import HTMLResponse

    from lib_qswap.panel.page import mount_html
    from lib_qswap.panel.routes import add_routes

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=7871)
    arguments = parser.parse_args()
    app = FastAPI()
    add_routes(app, FakeHost())
    page = page_html(mount_html("qswap-fake", hz=4))
    app.add_api_route("/", lambda: HTMLResponse(page), response_class=HTMLResponse)
    uvicorn.run(app, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
