"""How a layer is computed from its payload: unpack into the scratch, multiply.

`Forward` is what `attach()` puts in place of a module's own forward; a host with forwards of its own calls
`weight_for` itself.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from lib_qswap.quant import multiply
from lib_qswap.quant.packed import PackedTensor
from lib_qswap.quant.unpack import Arithmetic, unpack
from lib_qswap.swap.device import Device, align

if TYPE_CHECKING:
    from lib_qswap.swap.device_state import DeviceState
    from lib_qswap.swap.layer import Layer
    from lib_qswap.swap.lease import AnyLease

LINEAR_MODULE = "torch.nn.modules.linear"
"""Where torch's own forward of linear layers comes from, unless somebody has put another in its place."""


class Scratch:
    """The one reusable piece of device memory that weights are unpacked into, in the order of the compute
    stream."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._buffer: torch.Tensor | None = None
        self._views: dict[tuple[torch.Size, torch.dtype, int], torch.Tensor] = {}

    @property
    def nbytes(self) -> int:
        return 0 if self._buffer is None else self._buffer.numel()

    def resize(self, nbytes: int) -> None:
        """Only between steps.

        Raises:
            torch.OutOfMemoryError: the device has not that much; the scratch is then empty.
        """
        if align(nbytes) != self.nbytes:
            self._views.clear()
            self._buffer = None
            if nbytes:
                with torch.inference_mode(False):
                    self._buffer = torch.empty(align(nbytes), dtype=torch.uint8, device=self._device.device)

    def view(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The scratch as a tensor of this shape and dtype; what it held before is lost.

        It grows where it is too small: the caller computes in a wider dtype than was announced.
        """
        found = self._views.get((shape, dtype, 0))
        if found is None:
            nbytes = shape.numel() * dtype.itemsize
            if nbytes > self.nbytes:
                self.resize(nbytes)
            found = self._view_at(0, shape, dtype)
        return found

    def _view_at(self, offset_bytes: int, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        assert self._buffer is not None
        found = self._buffer[offset_bytes : offset_bytes + shape.numel() * dtype.itemsize]
        found = self._views[shape, dtype, offset_bytes] = found.view(dtype).view(shape)
        return found

    def copy_behind(self, weight: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor | None:
        """A copy of `tensor` behind `weight`, which is the view that was asked for last; None where there is
        no room for it."""
        offset_bytes = align(weight.numel() * weight.element_size())
        found = self._views.get((tensor.shape, tensor.dtype, offset_bytes))
        if found is None:
            if offset_bytes + tensor.numel() * tensor.element_size() > self.nbytes:
                return None
            found = self._view_at(offset_bytes, tensor.shape, tensor.dtype)
        return found.copy_(tensor)


def weight_for(
    weight: torch.Tensor,
    dtype: torch.dtype,
    scratch: Scratch | None,
    *,
    arithmetic: Arithmetic,
    computation_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`weight` (on the device, packed or plain) in `dtype`: itself, or the scratch, valid until the next
    call; without a scratch a tensor of its own."""
    if isinstance(weight, PackedTensor):
        out = new_or_in(scratch, weight.shape, dtype, weight.device)
        unpack(
            weight.format,
            weight.packed,
            out,
            arithmetic=arithmetic,
            computation_dtype=computation_dtype or dtype,
        )
        return out
    if weight.dtype == dtype and scratch is not None:
        return weight
    return new_or_in(scratch, weight.shape, dtype, weight.device).copy_(weight)


def new_or_in(
    scratch: Scratch | None, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """Memory for a weight: the scratch, or, without one, a tensor of its own."""
    if scratch is None:
        return torch.empty(shape, dtype=dtype, device=device)
    return scratch.view(shape, dtype)


def goes_back(x: torch.Tensor) -> bool:
    """Whether the weight that `x` is multiplied by is read again, in a backward pass: neither the scratch nor
    a slot of the ring will hold it then."""
    return x.requires_grad and torch.is_grad_enabled()


def let_go(
    lease: AnyLease, weight: torch.Tensor, bias: torch.Tensor | None, scratch: Scratch | None
) -> torch.Tensor | None:
    """Releases `lease` where what its layer computes with, `weight` and `bias`, lies in its slot no more or
    need not: a weight that was unpacked into the scratch. The slot is then filled again while the layer
    computes. Returns the bias to compute with."""
    if scratch is None or weight is lease.parts["weight"]:
        return bias
    if lease.in_ring and bias is not None and bias is lease.parts.get("bias"):
        kept = scratch.copy_behind(weight, bias)
        if kept is None:
            return bias
        bias = kept
    lease.release()
    return bias


def gather_rows(
    weight: torch.Tensor,
    indices: torch.Tensor,
    dtype: torch.dtype,
    *,
    arithmetic: Arithmetic = "exact",
    computation_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Rows of a master that stays on the host, on the device of `indices`; shape (*indices.shape, row
    length).

    Only the rows asked for are read, unpacked and copied: a text encoder's embedding has 32,128 of them and a
    prompt needs 256. `arithmetic` and `computation_dtype` are `unpack`'s.

    Raises:
        IndexError: there is no such row.
        OSError, GGUFError: the file of the master can no longer be read.
    """
    wanted = indices.reshape(-1).cpu()
    if wanted.numel() and int(wanted.min()) < 0:
        raise IndexError("index out of range in self")  # as torch.nn.Embedding says it
    if isinstance(weight, PackedTensor):
        packed = _packed_rows(weight, wanted)
        rows = PackedTensor(packed, weight.format, torch.Size((wanted.numel(), weight.shape[1])), dtype=dtype)
        gathered = rows.dequantize(dtype, arithmetic=arithmetic, computation_dtype=computation_dtype)
    else:
        gathered = weight.as_subclass(torch.Tensor)[wanted].to(dtype)
    return gathered.to(indices.device).view(*indices.shape, weight.shape[1])


def _packed_rows(weight: PackedTensor, wanted: torch.Tensor) -> torch.Tensor:
    """The packed bytes of some rows. A file is read, not its map: it may have shrunk since it was opened."""
    if weight.source is None:
        return weight.packed.view(weight.shape[0], -1)[wanted]
    row_bytes = weight.packed_nbytes // weight.shape[0]
    different, places = wanted.unique(return_inverse=True)
    rows = torch.empty((different.numel(), row_bytes), dtype=torch.uint8, device="cpu")
    for i, row in enumerate(different.tolist()):
        weight.source.read_into(rows[i], row * row_bytes)
    return rows[places]


_NONE = torch.empty(0, dtype=torch.uint8, device="cpu")
"""In place of a tensor that a layer is not given."""


class Forward:
    """The forward of a swapped module: its class's own, with the weights that are on the device right now."""

    def __init__(
        self,
        layer: Layer,
        original: Callable[..., Any],
        state: DeviceState,
        arithmetic: Arithmetic,
        computation_dtype: torch.dtype | None,
    ) -> None:
        self._layer = layer
        self._original = original
        self._turn = state.turn
        self._streamer = state.streamer
        self._scratch = state.scratch
        self._arithmetic = arithmetic
        self._computation_dtype = computation_dtype
        self._is_linear = original is torch.nn.Linear.forward and original.__module__ == LINEAR_MODULE
        # Torch's forwards want all of one dtype. Others may compute in their weight's, or in any.
        is_torchs = str(getattr(original, "__module__", None)).startswith("torch.nn.modules.")
        self._casts = is_torchs or computation_dtype is not None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        module = self._layer.module()
        if module is None:
            raise ReferenceError(f"{self._layer.name}: its module is gone")
        if self._turn.is_mine:
            return self._compute(module, args, kwargs)
        # Called by itself, or by a method that is not its model's forward, it takes its turn alone.
        with self._turn.held():
            self._streamer.follow()
            return self._compute(module, args, kwargs)

    def _compute(self, module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        inputs = args[0] if args else next(iter(kwargs.values()), None)
        if not isinstance(inputs, torch.Tensor):
            inputs = next((one for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)), _NONE)
        lease = self._streamer.acquire(self._layer)
        try:
            if self._is_linear and inputs.is_floating_point():
                return self._linear(lease, inputs)
            return self._original_on(lease, module, inputs, args, kwargs)
        finally:
            lease.release()

    def _linear(self, lease: AnyLease, x: torch.Tensor) -> torch.Tensor:
        """Without the detour over the module's parameters, which costs more than some layers compute."""
        weight, bias = lease.parts["weight"], lease.parts.get("bias")
        if self._arithmetic == "exact" and multiply.serves(weight, x):
            return linear(weight, bias, x, self._scratch, self._computation_dtype)
        scratch = None if goes_back(x) else self._scratch
        weight = self._weight(weight, x.dtype, scratch)
        if bias is not None:
            bias = _cast(bias, x.dtype)
        bias = let_go(lease, weight, bias, scratch)
        return torch.nn.functional.linear(x, weight, bias)

    def _original_on(
        self, lease: AnyLease, module: torch.nn.Module, inputs: torch.Tensor, args: Any, kwargs: Any
    ) -> Any:
        dtype = inputs.dtype if inputs.is_floating_point() else self._layer.parts[0].dtype
        scratch = None if goes_back(inputs) else self._scratch
        others = {name: tensor for name, tensor in lease.parts.items() if name != "weight"}
        parts = {name: self._part(tensor, dtype, scratch) for name, tensor in others.items()}
        weight = lease.parts.get("weight")
        # Its module knows what whole numbers stand for.
        if weight is not None and not (weight.is_floating_point() and self._is_cast(weight)):
            parts["weight"] = _kept(weight, scratch)
        elif weight is not None:
            parts["weight"] = weight = self._weight(weight, dtype, scratch)
            if parts.keys() <= {"weight", "bias"}:
                bias = let_go(lease, weight, parts.get("bias"), scratch)
                if bias is not None:
                    parts["bias"] = bias
        masters = module._parameters.copy()
        try:
            # Straight into the table: registering a Parameter is slow.
            module._parameters.update(parts)  # type: ignore[arg-type]
            return self._original(module, *args, **kwargs)
        finally:
            module._parameters.update(masters)

    def _is_cast(self, tensor: torch.Tensor) -> bool:
        return self._casts or isinstance(tensor, PackedTensor)

    def _part(self, tensor: torch.Tensor, dtype: torch.dtype, scratch: Scratch | None) -> torch.Tensor:
        part = _cast(tensor, dtype) if self._is_cast(tensor) else tensor
        return _kept(tensor, scratch) if part is tensor else part

    def _weight(self, weight: torch.Tensor, dtype: torch.dtype, scratch: Scratch | None) -> torch.Tensor:
        return weight_for(
            weight,
            dtype,
            scratch,
            arithmetic=self._arithmetic,
            computation_dtype=self._computation_dtype,
        )


def _kept(tensor: torch.Tensor, scratch: Scratch | None) -> torch.Tensor:
    """`tensor`, of a slot; without a scratch, for a backward pass, a copy that stays what it is."""
    return tensor if scratch is not None else tensor.clone()


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A small part in `dtype`: itself, or a tensor of its own."""
    if isinstance(tensor, PackedTensor):  # Its `to` would leave it packed, where it is.
        return tensor.dequantize(dtype)
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != dtype else tensor


def linear(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    x: torch.Tensor,
    scratch: Scratch,
    computation_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """A linear layer of exact arithmetic on an input that `multiply.serves` has accepted: in one kernel,
    or by way of the scratch where that has just failed."""
    if isinstance(bias, PackedTensor):
        bias = bias.dequantize(x.dtype)
    product = multiply.product(weight, x, bias)
    if product is not None:
        return product
    unpacked = weight_for(weight, x.dtype, scratch, arithmetic="exact", computation_dtype=computation_dtype)
    return torch.nn.functional.linear(x, unpacked, None if bias is None else bias.to(x.dtype))


class GatheredForward:
    """The forward of a big embedding: its rows are gathered on the host, its weight never travels."""

    def __init__(self, module: torch.nn.Embedding, dtype: torch.dtype) -> None:
        self._module = weakref.ref(module)
        self._dtype = dtype

    def __call__(self, indices: torch.Tensor) -> torch.Tensor:
        module = self._module()
        if module is None:
            raise ReferenceError("the embedding is gone")
        return gather_rows(module.weight, indices, self._dtype)


def can_gather(module: torch.nn.Module) -> bool:
    """Whether rows of `module` can be gathered on the host with the same result."""
    return isinstance(module, torch.nn.Embedding) and module.max_norm is None
