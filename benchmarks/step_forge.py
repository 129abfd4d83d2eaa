"""Forge's own swapping, for step_times.py: Queue and Async with CPU and Shared, at every budget.

Forge's memory manager, patcher and GGUF layers are those of a web UI's folder. They run in a process of their
own, with the interpreter of the folder's venv where there is one, since they need what Forge needs; no model
of Forge is loaded and no web server started. The model is the one that everybody gets: on a device that
computes, its layers are Forge's GGUF layers of the same packed weights, with Forge's unpacking. On the
simulated accelerator they fetch their weights as those do and keep the device busy for their set times, in
which unpacking is.

"GPU Weights" is the budget, given as the web UI gives it: what is not for weights is for the computation.
Forge keeps up to 1/1.3 of it resident and leaves the rest to weights in flight. Weights are in the form that
Forge brings them into when a model is loaded for the first time, in which Q4_K takes a ninth more bytes.
Shared page-locks next to nothing here, as in the web UI: Forge's GGUF parameter copies its bytes into
ordinary memory again whenever it is made, from page-locked ones too. Outputs are compared with each other
only: Forge's unpacking rounds differently.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("Queue", "Async")
PLACES = ("CPU", "Shared")

Row = dict[str, Any]


def forge_rows(folder: Path, job: dict[str, Any], limit_s: float) -> list[Row]:
    """The rows of all methods, measured by `measure` in a process of its own; where that fails, one with the
    error.

    job: see `measure`. limit_s: seconds that it may take.
    """
    with tempfile.TemporaryDirectory() as temporary:
        answer = Path(temporary) / "rows.json"
        limit = None if limit_s == math.inf else max(1.0, limit_s)
        command = [str(interpreter(folder)), __file__, str(folder), json.dumps(job), str(answer)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=limit)
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip() or "it said nothing").splitlines()[-1]
            return [{"system": "Forge", "error": f"exit code {error.returncode}: {last}"}]
        except (OSError, subprocess.TimeoutExpired) as error:
            return [{"system": "Forge", "error": str(error)}]
        return json.loads(answer.read_text())


def interpreter(folder: Path) -> Path:
    """Python with what Forge needs: $FORGE_PYTHON, that of the web UI's venv, or this one."""
    if "FORGE_PYTHON" in os.environ:
        return Path(os.environ["FORGE_PYTHON"])
    venv = folder / "venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    return venv if venv.exists() else Path(sys.executable)


# ------------------------------------------------------------------------------- within Forge's process
def enter(folder: Path, simulated: bool) -> Any:
    """Imports Forge's backend from the folder. Returns what is used of it."""
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "packages_3rdparty")]
    # The device is looked for when it is imported; the simulated one is given to it afterwards.
    sys.argv = ["launch.py", *(["--always-cpu"] if simulated else [])]
    from backend import memory_management, operations, operations_gguf, stream
    from backend.patcher.base import ModelPatcher

    if simulated:
        from simgpu.launch_forge import use_simgpu

        use_simgpu("bf16", side_stream=True)
    return SimpleNamespace(
        memory=memory_management,
        operations=operations,
        ParameterGGUF=operations_gguf.ParameterGGUF,
        stream=stream,
        ModelPatcher=ModelPatcher,
    )


def parameter(forge: Any, packed: Any) -> Any:
    """A packed weight as Forge's file reader hands it on."""
    import gguf  # Forge's, by the path

    data = packed.packed.view(packed.shape[0], -1)
    if packed.format.name in ("F16", "F32"):  # numpy has these.
        data = data.view(packed.format.dtype)
    tensor = SimpleNamespace(
        tensor_type=gguf.GGMLQuantizationType[packed.format.name],
        shape=tuple(reversed(packed.shape)),
        data=data.numpy(),
    )
    weight = forge.ParameterGGUF(tensor)
    weight.computation_dtype = packed.dtype
    return weight


def forge_model(forge: Any, model: Any) -> Any:
    """`model`, a QSwap model of packed linear layers, with Forge's layers in their place."""
    import torch
    from step_models import READ_BYTES

    class Busy(forge.operations.ForgeOperationsGGUF.Linear):
        """Fetches its weight as its base class does, then keeps the device busy, then adds the weight's last
        bytes to the input."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight, bias, signal = forge.operations.weights_manual_cast(
                self, x, skip_weight_dtype=True, weight_fn=unpacked, skip_bias_dtype=True
            )
            with forge.operations.main_stream_worker(weight, bias, signal):
                self.busy(sum(self.times))
                return x + weight.view(-1)[-READ_BYTES:]

    def unpacked(weight: Any) -> torch.Tensor:
        """Memory for the unpacked weight, on the stream on which Forge unpacks; of its values only those that
        are read."""
        nbytes = weight.shape.numel() * torch.bfloat16.itemsize
        out = torch.empty(nbytes, dtype=torch.uint8, device=weight.device)
        out[-READ_BYTES:] = weight.data.view(-1).view(torch.uint8)[-READ_BYTES:]
        return out

    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            busy = hasattr(module, "busy")
            layer = (Busy if busy else forge.operations.ForgeOperationsGGUF.Linear)()
            del layer.dummy
            if busy:
                layer.busy, layer.times = module.busy, module.times
            layer.weight = parameter(forge, module.weight.detach())
            if module.bias is not None:
                layer.bias = torch.nn.Parameter(module.bias.detach().clone(), requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer)
    forge.memory.bake_gguf_model(model)
    return model


def load(forge: Any, patcher: Any, device: Any, weights_bytes: float | None) -> int:
    """Loads the patcher's model by Forge's load_models_gpu with so many bytes of "GPU Weights", or whole.

    Returns the bytes that each step swaps.
    """
    import torch

    free = forge.memory.get_free_memory(device)
    forge.memory.current_inference_memory = 0 if weights_bytes is None else free - weights_bytes
    forge.memory.load_models_gpu([patcher])
    swapped = 0
    for module in patcher.model.modules():
        for name, weight in module._parameters.items():
            if weight is None:
                continue
            if hasattr(module, "parameters_manual_cast"):
                swapped += weight.nbytes if weight.device.type == "cpu" else 0
            else:  # The norms, which Forge's own models cast when they are used.
                module._parameters[name] = torch.nn.Parameter(weight.detach().to(device), requires_grad=False)
    return swapped


def measure(forge: Any, job: dict[str, Any]) -> Iterator[Row]:
    """The rows of one case.

    job: device, file, sides and clock as for `make_rig`; case: its value in the rig's cases; card: the two
    numbers of a `Card`, or None; compute_s: see `Runner`; shares: of the model in the budget; steps: that are
    timed.
    """
    import torch
    from step_rigs import Card, make_rig
    from step_runner import Runner, failure

    rig = make_rig(job["device"], Path(job["file"]), job["sides"], job["clock"])
    runner = Runner(rig, job["steps"], job["compute_s"])
    device = rig.device.device
    card = Card(*job["card"]) if job["card"] else None
    with rig.case(job["case"], job["compute_s"]), rig.standing_for(card), torch.no_grad():
        for place, method in itertools.product(PLACES, METHODS):
            forge.memory.PIN_SHARED_MEMORY = place == "Shared"
            forge.stream.stream_activated = method == "Async"
            before = runner.baseline()
            model = forge_model(forge, rig.qswap_model())
            patcher = forge.ModelPatcher(model, device, torch.device("cpu"))
            total = forge.memory.module_size(model)
            for share in job["shares"]:
                row: Row = {"system": f"Forge {method} {place}", "budget_share": share}
                try:
                    swapped = load(forge, patcher, device, share * total if share < 1 else None)
                    row |= {"model_bytes": total, "resident_share": 1 - swapped / total}
                    row |= {"swapped_bytes_per_step": swapped, **runner.times(model, before)}
                    row |= runner.bound(row, None)
                except Exception as error:
                    row |= failure(error)
                forge.operations.cleanup_cache()
                forge.memory.unload_all_models()
                yield row
            del model, patcher
            gc.collect()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("job", type=json.loads, help="JSON, see `measure`")
    parser.add_argument("answer", type=Path)
    parsed = parser.parse_args(arguments)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]
    import torch

    torch.set_num_threads(1)
    folder = parsed.folder.resolve()
    forge = enter(folder, simulated=parsed.job["device"] == "simgpu")
    parsed.answer.write_text(json.dumps(list(measure(forge, parsed.job))))


if __name__ == "__main__":
    main()
