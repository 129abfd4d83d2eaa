"""A layer as swapping sees it: the parts of its payload, and how they lie in one contiguous run of bytes."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lib_qswap.quant.packed import PackedTensor
from lib_qswap.swap.device import align

if TYPE_CHECKING:
    from lib_qswap.quant.formats import Format
    from lib_qswap.quant.gguf_file import FileSlice
    from lib_qswap.swap.home import Home


_COMPUTED_WITH = (torch.float16, torch.bfloat16, torch.float32)
"""Dtypes of plain formats that layers can compute with as they are."""


@dataclass(slots=True, eq=False)
class Part:
    """One tensor of a layer's payload.

    Attributes:
        name: the module's attribute ("weight", "bias").
        offset_bytes: where it starts in the payload.
        shape, dtype: logical, what the layer computes with.
        format: of a packed weight; None for a plain tensor.
        data: the bytes as the module came with them, or where the file is mapped: uint8, flat, on the CPU;
            None while only the home has them.
        source: where in a file the same bytes are, if anywhere.
    """

    name: str
    offset_bytes: int
    nbytes: int
    shape: torch.Size
    dtype: torch.dtype
    format: Format | None
    data: torch.Tensor | None
    source: FileSlice | None

    @classmethod
    def of(cls, name: str, tensor: torch.Tensor, offset_bytes: int) -> Part:
        """The part that `tensor` (a parameter on the CPU) makes at `offset_bytes`.

        Raises:
            ValueError: the tensor is on a device, or its elements do not lie in order, so that its bytes
                alone do not describe it.
        """
        if tensor.device.type not in ("cpu", "meta"):
            raise ValueError(f"{name} is on {tensor.device}: weights are swapped from RAM, so move it there")
        tensor = tensor.detach()
        if isinstance(tensor, PackedTensor):
            # Bytes that are in a file: a copy of them, from an earlier home, is not held on to.
            source = tensor.source
            data = tensor.packed.reshape(-1) if source is None else source.mapped()
            return cls(
                name,
                offset_bytes,
                data.numel(),
                tensor.shape,
                tensor.dtype,
                tensor.format,
                data,
                source,
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")
        # torch 2.3 cannot call as_subclass under a dispatch mode.
        plain = tensor if type(tensor) is torch.Tensor else tensor.as_subclass(torch.Tensor)
        data = plain.reshape(-1).view(torch.uint8)
        return cls(name, offset_bytes, data.numel(), plain.shape, plain.dtype, None, data, None)

    @property
    def dtype_on_device(self) -> torch.dtype | None:
        """Of the values as they lie in a payload; None where they have to be unpacked."""
        if self.format is None:
            return self.dtype
        is_plain = self.format.dtype == self.dtype and self.dtype in _COMPUTED_WITH and self.format.scale == 1
        return self.dtype if is_plain else None

    def view(self, payload: torch.Tensor) -> torch.Tensor:
        """This part inside `payload` (uint8, flat, any device): a PackedTensor, or a plain tensor where its
        values need no unpacking; nothing is copied."""
        data = payload[self.offset_bytes : self.offset_bytes + self.nbytes]
        plain = self.dtype_on_device
        return self.wrap(data, None) if plain is None else data.view(plain).view(self.shape)

    def wrap(self, data: torch.Tensor, source: FileSlice | None) -> torch.Tensor:
        """`data` (uint8, flat, `nbytes` long) as the tensor it stands for."""
        if self.format is None:
            return data.view(self.dtype).view(self.shape)
        elements_per_row = self.shape[-1] if self.shape else 1
        if elements_per_row % self.format.block_elements == 0:
            data = data.view(-1, self.format.packed_bytes(elements_per_row))
        return PackedTensor(data, self.format, self.shape, dtype=self.dtype, source=source)


class Measured(NamedTuple):
    """Seconds on the device's clock.

    compute_s: from the start of a layer's compute to the start of the next layer's, stalls left out; read_s:
        how much of it went by until its weights had been read.
    """

    compute_s: float
    read_s: float


@dataclass(slots=True, eq=False)
class LayerTimes:
    """What the last steps measured of one layer (seconds, on the device's clock).

    Attributes:
        measured: for the work that was run last; None before it was measured.
        by_work: for each work, in that of its measured steps in which the layer took less.
        uses: how often a forward has asked for its weights.
    """

    measured: Measured | None = None
    by_work: dict[Hashable, Measured] = field(default_factory=dict)
    stall_s: float = 0.0
    uses: int = 0


@dataclass(slots=True, eq=False)
class Layer:
    """One leaf module whose weights can be swapped.

    Attributes:
        name: its path in the model.
        payload_bytes: of all parts together, each aligned.
        home: where its master lives.
        resident: a permanent copy of the payload on the device, or None.
        resident_ready: the transfer after which `resident` holds the bytes; None once compute has been
            ordered after it.
    """

    name: str
    kind: str
    module: weakref.ref[torch.nn.Module]
    parts: tuple[Part, ...]
    payload_bytes: int
    home: Home
    resident: torch.Tensor | None = None
    resident_ready: Any = None
    times: LayerTimes = field(default_factory=LayerTimes)
    first: tuple[tuple[Part, ...], Home] | None = None
    """Parts and home that the model came with, while others take their place."""
    replaced: set[str] = field(default_factory=set)
    """The parts that others have taken the place of."""
    lease: Any = None
    """The lease of a resident layer, made once."""

    @property
    def elements(self) -> int:
        return sum(part.shape.numel() for part in self.parts)

    @property
    def quant(self) -> str:
        """The format of its largest part, as the file names it ("Q4_K"), or the dtype of a plain one
        ("float16")."""
        largest = max(self.parts, key=lambda part: part.nbytes)
        return (
            largest.format.name if largest.format is not None else str(largest.dtype).removeprefix("torch.")
        )

    def adopt(self) -> bool:
        """Looks whether the host has put other tensors into the module (merged a LoRA, or taken it back), and
        makes them the master.

        Returns whether it had.
        """
        from lib_qswap.swap.home import Home

        module = self.module()
        if module is None:
            return False
        changed = {part.name for part in self.parts if self._changed(part, module)}
        if not changed:
            return False
        first_parts, first_home = self.first or (self.parts, self.home)
        changed |= self.replaced
        # What the host never replaced has moved along into the present home; it counts as put back.
        self.replaced = {
            part.name
            for part in first_parts
            if part.name in changed and self._changed(part, module, first_home)
        }
        if self.first is not None and not self.replaced:
            self.parts, self.home = self.first
            self.first = None
        else:
            self.first = (first_parts, first_home)
            self.parts = parts_of(module)
            self.home = Home(self.parts)
        self.payload_bytes = payload_bytes(self.parts)
        return True

    def _changed(self, part: Part, module: torch.nn.Module, home: Home | None = None) -> bool:
        now, master = module._parameters[part.name], (home or self.home).tensor(part)
        if now is None or isinstance(now, PackedTensor) != isinstance(master, PackedTensor):
            return True
        return _address(now) != _address(master)

    def part_views(self, payload: torch.Tensor) -> dict[str, torch.Tensor]:
        """The parts inside `payload`."""
        return {part.name: part.view(payload) for part in self.parts}


def _address(tensor: torch.Tensor) -> int:
    return (tensor.packed if isinstance(tensor, PackedTensor) else tensor).data_ptr()


def parts_of(module: torch.nn.Module) -> tuple[Part, ...]:
    """The parts that `module`'s own parameters make, in order, packed into one payload.

    Raises:
        ValueError: one of them cannot be moved as bytes.
    """
    parts: list[Part] = []
    offset = 0
    for name, parameter in module._parameters.items():
        if parameter is not None:
            parts.append(Part.of(name, parameter, offset))
            offset += align(parts[-1].nbytes)
    return tuple(parts)


def payload_bytes(parts: tuple[Part, ...]) -> int:
    """The length of the payload that holds `parts`."""
    return align(parts[-1].offset_bytes + parts[-1].nbytes) if parts else 0
