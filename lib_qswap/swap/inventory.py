"""What a model consists of, for swapping: layers that are swapped whole, embeddings whose rows are gathered
on the host, and everything else, which is fixed on the device."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable

import torch
from torch.nn.modules.batchnorm import _NormBase

from lib_qswap.quant.packed import PackedTensor
from lib_qswap.swap.execute import can_gather
from lib_qswap.swap.home import Home
from lib_qswap.swap.layer import Layer, parts_of, payload_bytes

FIXED_BELOW_BYTES = 64 << 10
"""A layer smaller than this stays on the device: its copy would cost more in latency than in bytes."""

GATHERED_FROM_BYTES = 16 << 20
"""An embedding of this size and more stays on the host, and its rows are gathered there."""


class Fixed:
    """A parameter or buffer that is on the device as long as its model is active."""

    __slots__ = ("_bound", "is_buffer", "master", "module", "name")

    def __init__(self, module: torch.nn.Module, name: str, master: torch.Tensor, is_buffer: bool) -> None:
        self.module = weakref.ref(module)
        self.name, self.master, self.is_buffer = name, master, is_buffer
        self._bound: tuple[torch.Tensor, int | None] | None = None

    def adopt_change(self) -> None:
        """Takes a buffer on the device that a forward has changed or replaced for the master: the count of a
        batch normalization, say."""
        module, bound, self._bound = self.module(), self._bound, None
        now = None if module is None or bound is None else module._buffers.get(self.name)
        if now is None or bound is None:
            return
        # A batch normalization that trains changes its statistics without counting.
        trains = isinstance(module, _NormBase) and module.training
        if now is not bound[0] or version_of(now) != bound[1] or trains:
            with torch.inference_mode(False), torch.no_grad():
                self.master = now.detach().to("cpu", copy=True)

    def bind(self, tensor: torch.Tensor) -> None:
        module = self.module()
        if module is not None and isinstance(tensor, torch.nn.Parameter):
            module._parameters[self.name] = tensor
        elif module is not None:
            module._buffers[self.name] = tensor
            self._bound = None if tensor is self.master else (tensor, version_of(tensor))


class Inventory:
    """The parameters and buffers of a model, sorted.

    Attributes:
        layers: in the order of definition.
        gathered: big embeddings.
        borrowers: modules that have the weight of a gathered embedding as well and do not compute with it.
        fixed: what is on the device as long as the model is active; a tied parameter is in it once for
            each owner.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        can_swap: Callable[[torch.nn.Module], bool],
        borrows: Callable[[torch.nn.Module], bool] = lambda _module: False,
        stays_on_host: Callable[[torch.nn.Module, str], bool] = lambda _module, _name: False,
    ) -> None:
        """Args:
        can_swap: whether a module can be a layer.
        borrows: whether a module has another one's parameter without computing with it.
        stays_on_host: whether the buffer of that name does, because the module copies what it needs of it.
        """
        self.layers: list[Layer] = []
        self.gathered: list[weakref.ref[torch.nn.Embedding]] = []
        self.borrowers: list[weakref.ref[torch.nn.Module]] = []
        self.fixed: list[Fixed] = []
        masters: dict[int, torch.Tensor] = {}  # by parameter: a tied one has one master
        owners = Counter(id(parameter) for module in model.modules() for parameter in _own(module).values())
        users = owners - Counter(
            id(parameter) for one in model.modules() if borrows(one) for parameter in _own(one).values()
        )
        on_host = {
            id(module.weight)
            for module in model.modules()
            if isinstance(module, torch.nn.Embedding)
            and can_gather(module)
            and users[id(module.weight)] == 1
            and packed_nbytes(module.weight) >= GATHERED_FROM_BYTES
        }
        for name, module in model.named_modules():
            own = _own(module)
            untied = all(owners[id(parameter)] == 1 for parameter in own.values())
            if own and all(id(parameter) in on_host for parameter in own.values()):
                if isinstance(module, torch.nn.Embedding):
                    self.gathered.append(weakref.ref(module))
                else:
                    self.borrowers.append(weakref.ref(module))
            elif not (own and untied and can_swap(module) and self._add_layer(name, module)):
                for key, parameter in own.items():
                    master = masters.setdefault(id(parameter), parameter.detach())
                    self.fixed.append(Fixed(module, key, master, is_buffer=False))
            for key, buffer in module._buffers.items():
                if buffer is not None and not stays_on_host(module, key):
                    self.fixed.append(Fixed(module, key, buffer, is_buffer=True))

    def _add_layer(self, name: str, module: torch.nn.Module) -> bool:
        try:
            parts = parts_of(module)
        except ValueError:
            return False
        nbytes = payload_bytes(parts)
        if nbytes < FIXED_BELOW_BYTES:
            return False
        self.layers.append(
            Layer(name, type(module).__name__, weakref.ref(module), parts, nbytes, Home(parts))
        )
        return True

    @property
    def fixed_bytes(self) -> int:
        return sum({id(fixed.master): packed_nbytes(fixed.master) for fixed in self.fixed}.values())

    def bind_fixed_to(self, device: torch.device) -> None:
        """Puts copies of what is fixed onto `device`.

        Raises:
            torch.OutOfMemoryError: there is no room; the modules keep what they had.
        """
        moved: dict[int, torch.Tensor] = {}
        with torch.inference_mode(False), torch.no_grad():
            for fixed in self.fixed:
                if id(fixed.master) not in moved:
                    moved[id(fixed.master)] = fixed.master.to(device, copy=device.type == "cpu")
        self._bind_fixed(moved)

    def bind_fixed_to_masters(self) -> None:
        for fixed in self.fixed:
            fixed.adopt_change()
        self._bind_fixed({id(fixed.master): fixed.master for fixed in self.fixed})

    def _bind_fixed(self, tensors: dict[int, torch.Tensor]) -> None:
        """Puts `tensors`, by the id of their masters, into the modules; what was tied stays tied."""
        parameters: dict[int, torch.nn.Parameter] = {}
        for fixed in self.fixed:
            key = id(fixed.master)
            if fixed.is_buffer:
                fixed.bind(tensors[key])
                continue
            if key not in parameters:
                parameters[key] = torch.nn.Parameter(tensors[key], requires_grad=False)
            fixed.bind(parameters[key])

    def adopt_fixed(self) -> None:
        """Takes what the modules have now for the masters."""
        masters: dict[int, torch.Tensor] = {}
        for fixed in self.fixed:
            module = fixed.module()
            now = module._parameters.get(fixed.name) if module is not None and not fixed.is_buffer else None
            if now is not None:
                fixed.master = masters.setdefault(id(now), now.detach())


def version_of(tensor: torch.Tensor) -> int | None:
    """It counts the changes; inference tensors have none."""
    return None if tensor.is_inference() else tensor._version


def _own(module: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in module._parameters.items() if parameter is not None}


def packed_nbytes(tensor: torch.Tensor) -> int:
    """What `tensor` takes as it is: packed bytes, or those of its elements."""
    return (
        tensor.packed_nbytes if isinstance(tensor, PackedTensor) else tensor.numel() * tensor.element_size()
    )
