"""A forward that the device had no memory for is done again, with fewer residents beside it."""

from __future__ import annotations

import enum
import numbers
import weakref
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch

from lib_qswap.swap.inventory import version_of


class RetryingForward:
    """The forward of a model's root in place of its own: out of memory, it lets `relieve` make room and
    begins anew, with the arguments as they were, until there is nothing left to give. What it raises,
    `abandon` is told of. Where an argument or a buffer may have changed for good (a cache of keys and
    values), a second run would compute something else: there is none."""

    def __init__(
        self,
        root: torch.nn.Module,
        relieve: Callable[[torch.nn.Module], bool],
        abandon: Callable[[torch.nn.Module], None],
    ) -> None:
        self._root = weakref.ref(root)
        self._own: Callable[..., Any] | None = root.__dict__.get("forward")
        self._relieve, self._abandon = relieve, abandon
        self._with_buffers = [weakref.ref(module) for module in root.modules() if module._buffers]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        root = self._root()
        if root is None:
            raise ReferenceError("the model is gone")
        contents = list(_contents((args, kwargs)))
        buffers = self._versions()
        while True:
            try:
                if self._own is not None:
                    return self._own(*args, **kwargs)
                return type(root).forward(root, *args, **kwargs)
            except torch.cuda.OutOfMemoryError:  # the name that torch 2.3 has as well, for every device
                again = _can_be_restored(args, kwargs) and buffers == self._versions()
                if torch.is_grad_enabled() or not again or not self._relieve(root):
                    self._abandon(root)
                    raise
            except BaseException:
                self._abandon(root)
                raise
            # Only here has the traceback let go of the tensors of the forward that failed.
            for container, content in contents:
                _restore(container, content)
            buffers = self._versions()  # Making room may have put others in their place.

    def _versions(self) -> list[tuple[int, int | None]]:
        """Of the buffers, by which a change of one is seen."""
        modules = [module for reference in self._with_buffers if (module := reference()) is not None]
        buffers = [one for module in modules for one in module._buffers.values() if one is not None]
        return [(id(one), version_of(one)) for one in buffers]

    def put_in_place(self) -> None:
        root = self._root()
        if root is not None:
            root.__dict__["forward"] = self

    def remove(self) -> None:
        """Gives the root its own forward back, unless somebody else has replaced it since."""
        root = self._root()
        if root is not None and root.__dict__.get("forward") is self:
            if self._own is None:
                del root.__dict__["forward"]
            else:
                root.__dict__["forward"] = self._own


_WITHOUT_STATE = (
    dict, list, tuple, set, frozenset, str, bytes, type(None), numbers.Number, enum.Enum, FunctionType,
    MethodType, torch.Tensor, torch.dtype, torch.device, torch.Generator, torch.nn.Module,
)  # fmt: skip


def _can_be_restored(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether none of the arguments is an object with a state of its own. What containers hold belongs to
    hosts that repeat steps themselves."""
    return all(isinstance(value, _WITHOUT_STATE) for value in (*args, *kwargs.values()))


def _contents(value: Any) -> Iterator[tuple[Any, Any]]:
    """The dicts and lists in `value`, at any depth, each with a copy of it. A forward may take out of them
    what it has used: a ControlNet's residuals, block by block. Subclasses, which may refuse either, are left
    alone."""
    waiting, seen = [value], set[int]()
    while waiting:
        value = waiting.pop()
        if type(value) not in (dict, list, tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) is not tuple:
            yield value, value.copy()
        waiting.extend(value.values() if type(value) is dict else value)


def _restore(container: Any, content: Any) -> None:
    if type(container) is dict:
        container.clear()
        container.update(content)
    else:
        container[:] = content
