"""Small models for tests of swapping: packed and plain layers of every kind that matters, reproducible."""

from __future__ import annotations

import contextlib
import functools
import threading
from pathlib import Path

import torch
from ggml_blocks import random_blocks
from gguf_writer import Tensor, gguf_bytes

from lib_qswap.quant.formats import FORMATS
from lib_qswap.quant.gguf_file import open_gguf
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.swap import device_state, ledger, manager, planner

WIDTH = 512
FORMAT_OF_BLOCK = ("Q4_0", "Q8_0", "Q4_K")
LOCATIONS = ("auto", "gpu", "shared", "cpu", "disk")


class Block(torch.nn.Module):
    """A packed Linear with a bias, a norm, a plain Linear of another size."""

    def __init__(self, *, dtype: torch.dtype) -> None:
        super().__init__()
        with torch.device("meta"):
            self.up = torch.nn.Linear(WIDTH, WIDTH)
            self.norm = torch.nn.LayerNorm(WIDTH)
            self.down = torch.nn.Linear(WIDTH, WIDTH, bias=False)
        self.dtype = dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.norm(self.up(x))))


class Model(torch.nn.Module):
    """Embedding, blocks, a convolution, a head tied to the embedding."""

    def __init__(self, blocks: int = 3, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.device("meta"):
            self.embed = torch.nn.Embedding(96, WIDTH)
            self.blocks = torch.nn.ModuleList(Block(dtype=dtype) for _ in range(blocks))
            self.conv = torch.nn.Conv1d(WIDTH, 64, 3, padding=1)
            self.head = torch.nn.Linear(WIDTH, 96, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens) + self.shift
        for block in self.blocks:
            x = block(x)
        return torch.cat((self.head(x), self.conv(x.transpose(1, 2)).transpose(1, 2)), -1)


@functools.cache
def packed_bytes(format_name: str, shape: tuple[int, ...], seed: int) -> bytes:
    """Blocks whose values are small enough to be added up hundreds of times."""
    format = FORMATS[format_name]
    count = torch.Size(shape).numel() // format.block_elements
    return random_blocks(format, count, "ordinary", seed).tobytes()


def packed_weight(format_name: str, shape: tuple[int, ...], seed: int = 0) -> PackedTensor:
    """A packed weight that is in no file."""
    data = bytearray(packed_bytes(format_name, shape, seed))
    return PackedTensor(
        torch.frombuffer(data, dtype=torch.uint8), FORMATS[format_name], shape, dtype=torch.float16
    )


def build(blocks: int = 3, *, file: Path | None = None, seed: int = 0) -> Model:
    """A `Model` of reproducible weights: packed ones in `blocks.*`, from a GGUF file written to `file` if
    given (the plain convolution then too)."""
    model = Model(blocks)
    generator = torch.Generator().manual_seed(seed)
    packed: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, parameter in list(model.named_parameters()):
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        if name.startswith("blocks") and key == "weight" and parameter.dim() == 2:
            index = int(name.split(".")[1])
            packed[name] = (
                FORMAT_OF_BLOCK[(index + ("down" in name)) % len(FORMAT_OF_BLOCK)],
                parameter.shape,
            )
            continue
        value = torch.randn(parameter.shape, generator=generator) * 0.05
        setattr(module, key, torch.nn.Parameter(value, requires_grad=False))
    model.head.weight = model.embed.weight
    if file is not None:
        tensors = [
            Tensor(name, shape, kind, packed_bytes(kind, shape, i + seed * 1000))
            for i, (name, (kind, shape)) in enumerate(packed.items())
        ]
        file.write_bytes(gguf_bytes(tensors, {"general.architecture": "flux"}))
        opened = open_gguf(file)
    for i, (name, (kind, shape)) in enumerate(packed.items()):
        weight = opened[name] if file is not None else packed_weight(kind, shape, i + seed * 1000)
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, torch.nn.Parameter(weight, requires_grad=False))
    return model.eval()


def tokens(device: torch.device | str = "cpu", *, seed: int = 0) -> torch.Tensor:
    """What a `Model` is called with: (2, 12) indices."""
    return torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(seed)).to(device)


def run(model: torch.nn.Module, device: torch.device | str, *, seed: int = 0) -> torch.Tensor:
    """One forward of a `Model` on `device`; the result on the CPU, checked to be finite and not constant."""
    with torch.inference_mode():
        result = model(tokens(device, seed=seed)).cpu().clone()
    assert result.isfinite().all()
    assert result.std() > 0.01
    return result


def reference(model: Model, *, seed: int = 0) -> torch.Tensor:
    """The same forward with unpacked weights in the CPU's own layers."""
    plain = Model(len(model.blocks))
    state = {
        name: value.detach().dequantize(torch.float32) if isinstance(value, PackedTensor) else value.detach()
        for name, value in model.state_dict(keep_vars=True).items()
    }
    plain.load_state_dict(state, assign=True)
    with torch.inference_mode():
        return plain(tokens(seed=seed))


def sizes(module: torch.nn.Module, device: torch.device | str, **options) -> tuple[int, int, int]:
    """(floor, whole, largest layer) of a model's budget in bytes."""
    attachment = manager.attach(module, device=device, budget_bytes=1 << 40, **options)
    try:
        largest = max(layer.payload_bytes for layer in attachment.layers)
        fixed = attachment.fixed_bytes + attachment.scratch_bytes
        return fixed + largest, attachment.whole_bytes, largest
    finally:
        attachment.detach()


@contextlib.contextmanager
def clean_engine():
    """No models, no messages, default limits inside; whatever a test left attached is detached at its end."""
    device_state._states.clear()
    ledger._messages.clear()
    effort, planner.SEARCH_EFFORT = planner.SEARCH_EFFORT, 100  # Good plans are another test's business.
    before = set(threading.enumerate())
    try:
        yield
    finally:
        planner.SEARCH_EFFORT = effort
        for attachment in ledger.attachments():
            attachment.detach()
        ledger._notes.clear()
        workers = [t for t in threading.enumerate() if t not in before and t.name == "qswap-copier"]
        for state in device_state._states.values():
            state.fit()
        device_state._states.clear()
    assert not any(worker.is_alive() for worker in workers), "a copier's thread outlived its models"


def messages() -> list[str]:
    """What users have been told since the test began."""
    return [message["text"] for message in ledger._messages]


def masters(module: torch.nn.Module) -> dict[str, bytes]:
    """The bytes of every parameter as they are now, on the host."""
    found = {}
    for name, value in module.named_parameters():
        data = value.detach()
        data = data.packed if isinstance(data, PackedTensor) else data
        found[name] = bytes(data.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return found
