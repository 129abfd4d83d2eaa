"""A stand-in for Stable Diffusion WebUI Forge: the names, signatures and habits that QSwap meets there, and
nothing behind them.

`with forge_standin.running() as webui:` puts its packages `backend`, `modules` and `modules_forge` on the
import path, fresh, and takes them and QSwap's own state away again at the end.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent
SCRIPT = ROOT.parents[1] / "scripts" / "qswap.py"
_PACKAGES = ("backend", "modules", "modules_forge")


def _as_loaded(network: Any) -> Any:
    """`network` with the plain parameters that Forge's loader makes: trainable, and of inference mode."""
    import torch

    made: dict[int, Any] = {}
    with torch.inference_mode():
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if type(parameter) is torch.nn.Parameter and parameter.device.type == "cpu":
                    if id(parameter) not in made and not parameter.is_inference():
                        trainable = parameter.is_floating_point()
                        made[id(parameter)] = torch.nn.Parameter(parameter.detach().clone(), trainable)
                    module._parameters[name] = made.get(id(parameter), parameter)
    return network


class WebUI:
    """The running stand-in: `webui.shared`, `webui.memory_management` and so on are its modules."""

    _MODULES = (
        "backend.memory_management",
        "backend.operations",
        "backend.operations_bnb",
        "backend.operations_gguf",
        "backend.stream",
        "backend.utils",
        "backend.patcher.base",
        "backend.patcher.controlnet",
        "modules.call_queue",
        "modules.options",
        "modules.processing",
        "modules.script_callbacks",
        "modules.scripts",
        "modules.sd_models",
        "modules.shared",
        "modules_forge.main_entry",
        "modules_forge.main_thread",
    )

    def __init__(self) -> None:
        for name in self._MODULES:
            setattr(self, name.rpartition(".")[2], importlib.import_module(name))

    def __getattr__(self, name: str) -> ModuleType:
        raise AttributeError(f"the stand-in has no module {name}")

    def qswap(self, name: str) -> ModuleType:
        """A module of `lib_qswap.forge`."""
        return importlib.import_module(f"lib_qswap.forge.{name}")

    def replace_parts(self, **patches: Callable[[], list[Any]]) -> None:
        """Puts these `patches` functions in place of the modules of the same name in `lib_qswap.forge`; no
        patches for those not named."""
        package = importlib.import_module("lib_qswap.forge")
        for name in ("loading", "forward", "bnb", "managed", "memory", "lora"):
            part = ModuleType(f"lib_qswap.forge.{name}")
            part.patches = patches.get(name, list)
            part.attached = []
            part.attach_engine = part.attached.append
            part.release_all = lambda: None
            sys.modules[part.__name__] = part
            setattr(package, name, part)

    def patcher_of(self, network: Any, dtype: Any, device: Any) -> Any:
        """A patcher of a model whose diffusion model is `network`, computed in `dtype` on `device`."""
        import torch

        model = torch.nn.Module()
        model.diffusion_model = _as_loaded(network)
        model.computation_dtype = dtype
        patcher = self.base.ModelPatcher(model, device, torch.device("cpu"))
        patcher.model_patches_to = lambda where: None
        patcher.model_dtype = lambda: dtype
        patcher.forge_patch_model = lambda device: model
        patcher.forge_unpatch_model = lambda: None
        return patcher

    def load_scripts(self) -> None:
        """What Forge does at its start, and again on Reload UI."""
        self.scripts.load_scripts([str(SCRIPT)])

    def reload_ui(self) -> None:
        self.script_callbacks.run("script_unloaded")
        self.load_scripts()

    def generate(self, job: str = "task", **processing: Any) -> Any:
        """One generation as a request starts it, with the scripts that are registered; returns the processing
        object."""
        with self.call_queue.queue_lock:
            self.shared.state.begin(job)
            try:
                p = self.processing.StableDiffusionProcessing(**processing)
                self.processing.process_images(p)
                return p
            finally:
                self.shared.state.end()


def _forget() -> None:
    for name in list(sys.modules):
        if name.partition(".")[0] in _PACKAGES or name.startswith("lib_qswap.forge."):
            del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if parent in sys.modules:  # `from package import module` looks at the package's attributes first
                vars(sys.modules[parent]).pop(child, None)


@contextmanager
def running() -> Iterator[WebUI]:
    _forget()
    sys.path.insert(0, str(ROOT))
    try:
        yield WebUI()
    finally:
        sys.path.remove(str(ROOT))
        _forget()
        # What notices.to_console set: the console's handler would speak in the tests that follow, too.
        log = logging.getLogger("qswap")
        log.handlers.clear()
        log.setLevel(logging.NOTSET)
        log.propagate = True
