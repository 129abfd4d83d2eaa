"""A forward that the device had no memory for is done again, with fewer residents beside it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch


class RetryingForward:
    """The forward of a model's root in place of its own: out of memory, it lets `relieve` make room and
    begins anew, with the arguments as they were, until there is nothing left to give. What it raises,
    `abandon` is told of."""

    def __init__(
        self,
        root: torch.nn.Module,
        relieve: Callable[[torch.nn.Module], bool],
        abandon: Callable[[torch.nn.Module], None],
    ) -> None:
        self._root = weakref.ref(root)
        self._own: Callable[..., Any] | None = root.__dict__.get("forward")
        self._relieve, self._abandon = relieve, abandon

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        root = self._root()
        if root is None:
            raise ReferenceError("the model is gone")
        contents = list(_contents((args, kwargs)))
        while True:
            try:
                if self._own is not None:
                    return self._own(*args, **kwargs)
                return type(root).forward(root, *args, **kwargs)
            except torch.cuda.OutOfMemoryError:  # the name that torch 2.3 has as well, for every device
                if torch.is_grad_enabled() or not self._relieve(root):
                    self._abandon(root)
                    raise
            except BaseException:
                self._abandon(root)
                raise
            # Only here has the traceback let go of the tensors of the forward that failed.
            for container, content in contents:
                _restore(container, content)

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
