"""What this machine, this torch and a web UI offer QSwap: the facts that a bug report needs first."""

from __future__ import annotations

import contextlib
import importlib.util
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lib_qswap import __version__
from lib_qswap.swap.device import Device, device_of
from lib_qswap.swap.home import default_pin_budget_bytes
from lib_qswap.swap.ram import available_ram_bytes, total_ram_bytes

GB = 1 << 30
PAGE_LOCK_TRIAL_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Findings:
    """Plain data; `webui` is what the probe says of the web UI's folder, None where none was given."""

    versions: dict[str, str | None]
    ram: dict[str, int]
    devices: list[dict[str, Any]]
    webui: dict[str, Any] | None

    @property
    def supported(self) -> bool:
        return self.webui is None or bool(self.webui["supported"])

    def lines(self) -> list[str]:
        lines = [f"{name:<10} {version or 'not installed'}" for name, version in self.versions.items()]
        lines.append(
            f"{'RAM':<10} {self.ram['total'] / GB:.1f} GB, {self.ram['available'] / GB:.1f} GB available, "
            f"{self.ram['pin_budget'] / GB:.1f} GB may be page-locked"
        )
        for device in self.devices:
            lines.append(
                f"{device['device']:<10} {device['name']}, {device['free'] / GB:.1f} of "
                f"{device['total'] / GB:.1f} GB free"
            )
            lines += [f"{'':<10} {fact}" for fact in device["facts"]]
        if not self.devices:
            lines.append(f"{'device':<10} none that torch can use: the demo runs on the CPU")
        if self.webui is not None:
            lines.append(f"{'web UI':<10} {self.webui['webui']}: {self.webui['family_name']}")
            lines.append(f"{'':<10} {self.webui['reason']}")
            lines += [
                f"{'':<10} {'found  ' if hook['ok'] else 'MISSING'}  {hook['name']}"
                + ("" if hook["ok"] else f": expected {hook['expected']}, found {hook['found'] or 'nothing'}")
                for hook in self.webui["hooks"]
            ]
        return lines


def examine(webui: Path | None) -> Findings:
    """Looks at the machine, and at the web UI in the folder `webui` without importing any of it.

    Raises:
        ValueError: there is no web UI in that folder.
    """
    return Findings(
        versions={
            "qswap": __version__,
            "Python": f"{platform.python_version()} on {platform.platform()}",
            "torch": torch.__version__,
            "CUDA": torch.version.cuda,
            "ROCm": torch.version.hip,
            "Triton": _version_of("triton"),
        },
        ram={
            "total": total_ram_bytes(),
            "available": available_ram_bytes(),
            "pin_budget": default_pin_budget_bytes(),
        },
        devices=[_device_facts(device_of(device)) for device in _accelerators()],
        webui=None if webui is None else _inspect_webui(webui),
    )


def _inspect_webui(webui: Path) -> dict[str, Any]:
    from lib_qswap.forge.probe import inspect_webui

    return inspect_webui(webui)


def _version_of(package: str) -> str | None:
    from importlib import metadata

    if not importlib.util.find_spec(package):
        return None
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    # Triton comes as triton-windows, or as PyTorch's own build for other makers' GPUs.
    for name in metadata.packages_distributions().get(package, ()):
        return f"{metadata.version(name)} ({name})"
    return "of unknown version"


def _accelerators() -> list[torch.device]:
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        if module.is_available():
            return [torch.device(kind, index) for index in range(module.device_count())]
    return [torch.device("mps")] if torch.backends.mps.is_available() else []


def _device_facts(device: Device) -> dict[str, Any]:
    free, total = device.memory_bytes()
    name, facts = device.device.type, []
    if device.device.type == "cuda":
        properties = torch.cuda.get_device_properties(device.device)
        name = properties.name
        facts.append(f"compute capability {properties.major}.{properties.minor}")
        native = (
            "natively" if properties.major >= 8 or torch.version.hip else "only by emulation: choose fp16"
        )
        facts.append(f"computes bf16 {native}")
    facts.append("copies on a stream of their own" if device.streams else "one stream: copies do not overlap")
    facts.append(f"page-locking: {_try_page_lock(device)}")
    return {"device": str(device.device), "name": name, "free": free, "total": total, "facts": facts}


def _try_page_lock(device: Device) -> str:
    """Locks a little memory the way homes do, and says how that went."""
    if not device.can_page_lock:
        return "this device has none"
    memory = torch.empty(PAGE_LOCK_TRIAL_BYTES, dtype=torch.uint8)
    if not device.can_register:
        try:
            memory.pin_memory(device.device)
        except RuntimeError as error:
            return f"refused ({str(error).splitlines()[0]})"
        return "works, through torch's allocator (rounds up)"
    refused = device.register(memory)
    if refused is not None:
        return f"refused: {refused}" + ("; raise `ulimit -l`" if sys.platform == "linux" else "")
    device.unregister(memory.data_ptr())
    return "works, for memory that exists already (exact sizes)"
