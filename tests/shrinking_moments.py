"""Moments at which the file of a model in use shrinks to nothing: python -m shrinking_moments FOLDER

Each moment is a function that gets a freshly opened model, shrinks its file, and then needs the file's bytes.
One line is printed for each, "NAME: refused" where that is an error that names the file, before the next one
is tried. A moment that reads through the map of the file ends the process instead.
"""

from __future__ import annotations

import contextlib
import copy
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import forge_standin
import swap_models
import torch
from conftest import _reason_to_skip_simgpu
from gguf_writer import ARRAY, I32, Tensor, Value, gguf_bytes

from lib_qswap.quant.gguf_file import GGUFError, open_gguf
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.swap import manager
from lib_qswap.swap.execute import gather_rows

WIDTH = 1024
CPU = torch.device("cpu")
MOMENTS: dict[str, Callable[[Opened], None]] = {}


class Opened:
    """A model file of five tensors, opened: two of Q4_K, one of F16, a convolution and a bias."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "model.gguf"
        matrix = swap_models.packed_bytes("Q4_K", (WIDTH, WIDTH), 0)
        kernel = swap_models.packed_bytes("Q4_K", (576, 256), 1)
        plain = torch.rand(WIDTH, WIDTH, dtype=torch.float16).numpy().tobytes()
        tensors = [
            Tensor("weight", (WIDTH, WIDTH), "Q4_K", matrix),
            Tensor("other", (WIDTH, WIDTH), "Q4_K", matrix),
            Tensor("plain", (WIDTH, WIDTH), "F16", plain),
            Tensor("kernel.weight", (576, 256), "Q4_K", kernel),
            Tensor("bias", (WIDTH,), "F32"),
        ]
        shape = Value(ARRAY, [256, 64, 3, 3], I32)
        self.path.write_bytes(gguf_bytes(tensors, {"comfy.gguf.orig_shape.kernel.weight": shape}))
        self.file = open_gguf(self.path)
        self.weight, self.other, self.plain = (self.file[name] for name in ("weight", "other", "plain"))

    def shrink(self) -> None:
        os.truncate(self.path, 0)


def moment(function: Callable[[Opened], None]) -> Callable[[Opened], None]:
    MOMENTS[function.__name__] = function
    return function


def _enter(name: str, operation: Callable[[Opened], object]) -> None:
    """Enters an operation on weights that are open."""

    def run(opened: Opened) -> None:
        opened.shrink()
        operation(opened)

    MOMENTS[name] = run


for name, operation in {
    "unpacking": lambda opened: opened.weight.dequantize(torch.float16),
    "unpacking_in_forges_order": lambda opened: opened.weight.dequantize(arithmetic="like Forge"),
    "unpacking_to_another_dtype": lambda opened: opened.weight.dequantize(torch.float64),
    "unpacking_values_as_they_are": lambda opened: opened.plain.dequantize(),
    "rounding_values": lambda opened: opened.plain.dequantize(torch.bfloat16),
    "unpacking_a_part_of_the_rows": lambda opened: opened.weight[7:9].dequantize(),
    "unpacking_a_column": lambda opened: opened.weight[:, 3],
    "converting_to_integers": lambda opened: opened.weight.to(torch.int32),
    "copying_into_a_plain_tensor": lambda opened: torch.empty(WIDTH, WIDTH).copy_(opened.weight),
    "multiplying": lambda opened: torch.nn.functional.linear(torch.ones(1, WIDTH), opened.weight.float()),
    "cloning": lambda opened: opened.weight.clone(),
    "moving_with_a_copy": lambda opened: opened.weight.to("cpu", copy=True),
    "deep_copying": lambda opened: copy.deepcopy(torch.nn.Parameter(opened.weight, requires_grad=False)),
    "pickling": lambda opened: pickle.dumps(opened.weight),
    "joining": lambda opened: torch.cat((opened.weight, opened.other)),
    "gathering_rows": lambda opened: gather_rows(opened.weight, torch.tensor([3, 1]), torch.float32),
    "reading_a_tensor_that_is_copied": lambda opened: opened.file["bias"],
}.items():
    _enter(name, operation)


@moment
def loading_into_a_plain_module(opened: Opened) -> None:
    module = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    opened.shrink()
    module.load_state_dict({"weight": opened.weight})


@moment
def moving_to_another_device(opened: Opened) -> None:
    if _reason_to_skip_simgpu() or torch.torch_version.TorchVersion(torch.__version__) < (2, 13):
        raise ImportError("the simulated accelerator cannot be compiled here")
    import simgpu  # noqa: F401

    opened.shrink()
    opened.weight.to("simgpu")


def _linear(weight: PackedTensor, layers: int = 1) -> torch.nn.Module:
    with torch.device("meta"):
        module = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers)))
    for layer in module:
        layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


@moment
def computing_a_model_that_nobody_manages(opened: Opened) -> None:
    model = _linear(opened.weight.with_dtype(torch.float32))
    opened.shrink()
    model(torch.ones(1, WIDTH))


@moment
def copying_masters_into_memory(opened: Opened) -> None:
    model = _linear(opened.weight)
    opened.shrink()
    manager.attach(model, device="cpu", location="cpu", budget_bytes=0)


@moment
def fetching_a_layer(opened: Opened) -> None:
    model = _linear(opened.weight, 4)  # of which the first may be there already
    with manager.attached(model, device="cpu", location="disk", budget_bytes=0):
        opened.shrink()
        model(torch.ones(1, WIDTH))


@moment
def putting_fixed_weights_onto_the_device(opened: Opened) -> None:
    model = torch.nn.Module()
    model.scale = torch.nn.Parameter(opened.weight, requires_grad=False)
    opened.shrink()
    manager.attach(model, device="cpu")


@moment
def merging_into_a_master(opened: Opened) -> None:
    model = _linear(opened.weight)
    with manager.attached(model, device="cpu", location="disk", budget_bytes=0) as attachment:
        opened.shrink()
        with attachment.masters_bound():
            merged = model[0].weight.dequantize(torch.float32) * 1.5
            model[0].weight = torch.nn.Parameter(merged, requires_grad=False)


@moment
def forge_loading_a_checkpoint(opened: Opened) -> None:
    state_dict = _forge().utils.load_torch_file(str(opened.path))
    module = torch.nn.Linear(WIDTH, WIDTH, bias=False)
    opened.shrink()
    module.load_state_dict({"weight": state_dict["plain"]})


@moment
def forge_computing_a_linear_layer_on_the_cpu(opened: Opened) -> None:
    layer = _forge().operations.ForgeOperationsGGUF.Linear()
    layer.weight = torch.nn.Parameter(opened.weight, requires_grad=False)
    opened.shrink()
    layer(torch.ones(1, WIDTH))


@moment
def forge_computing_a_convolution_on_the_cpu(opened: Opened) -> None:
    layer = _forge().operations.ForgeOperations.Conv2d(64, 256, 3)
    layer.load_state_dict({"weight": opened.file["kernel.weight"]}, strict=False)
    assert isinstance(layer.weight, PackedTensor)
    opened.shrink()
    layer(torch.ones(1, 64, 8, 8))


@moment
def forge_looking_up_an_embedding(opened: Opened) -> None:
    layer = _forge().operations.ForgeOperations.Embedding(WIDTH, WIDTH)
    layer.weight = torch.nn.Parameter(opened.weight, requires_grad=False)
    opened.shrink()
    layer(torch.tensor([5]))


@moment
def forge_unpacking_a_small_embedding(opened: Opened) -> None:
    layer = _forge().operations.ForgeOperations.Embedding(WIDTH, WIDTH)
    opened.shrink()
    layer.load_state_dict({"weight": opened.weight})


@moment
def forge_adding_a_lora_to_a_layer_on_the_cpu(opened: Opened) -> None:
    webui = _forge()
    layer = webui.operations.ForgeOperationsGGUF.Linear()
    layer.weight = torch.nn.Parameter(opened.weight, requires_grad=False)
    layer.forge_online_loras = {"weight": []}
    opened.shrink()
    webui.operations.weights_manual_cast(layer, torch.ones(1, WIDTH))


@moment
def forge_placing_a_model(opened: Opened) -> None:
    webui = _forge()
    patcher = webui.patcher_of(_linear(opened.weight), torch.float32, CPU)
    opened.shrink()
    webui.qswap("managed").load(SimpleNamespace(model=patcher, device=CPU), 1)


@moment
def forge_beginning_a_generation_on_the_cpu(opened: Opened) -> None:
    webui = _forge()
    patcher = webui.patcher_of(_linear(opened.weight), torch.float32, CPU)
    opened.shrink()
    webui.memory_management.load_models_gpu([patcher])


def _forge() -> forge_standin.WebUI:
    """The stand-in with everything of QSwap in place, until the process ends."""
    if not _running:
        webui = _until_the_end.enter_context(forge_standin.running())
        from lib_qswap.forge.patches import PatchTable

        parts = ("loading", "forward", "bnb", "memory", "lora")
        PatchTable(patch for part in parts for patch in webui.qswap(part).patches()).apply()
        _running.append(webui)
    return _running[0]


_running: list[forge_standin.WebUI] = []
_until_the_end = contextlib.ExitStack()


def main(folder: Path) -> None:
    for name, function in MOMENTS.items():
        opened = Opened(folder)
        outcome = "nothing happened"
        try:
            with torch.inference_mode():
                function(opened)
        except ImportError as error:
            outcome = f"skipped: {error}"
        except (GGUFError, OSError, RuntimeError) as error:  # torch makes the last of what a module refuses
            outcome = "refused" if str(opened.path) in str(error) else f"the file is not named: {error}"
        print(f"{name}: {outcome}", flush=True)


if __name__ == "__main__":
    with _until_the_end:
        main(Path(sys.argv[1]))
