"""Replacing attributes of the host, all of them or none, and putting back exactly what was there.

What goes into the host is a thin forwarder that knows the original and asks its patch whether it is active.
So a replacement that another extension has wrapped since can still be switched off: the wrapper stays where
it is and ours passes everything through.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

_MISSING: Any = object()


class _Installation:
    """One forwarder put into the host. It has a switch of its own: a forwarder that was left behind in
    another extension's chain stays off when a later one is installed in front of it."""

    def __init__(self, before: Any):
        self.before = before
        """The raw attribute in the owner's own `__dict__`; `_MISSING`: it was inherited."""
        self.forwarder: Any = None
        self.wrapper: Any = _MISSING
        """What another extension had put over the forwarder when it was switched off."""
        self.on = False


@dataclass(eq=False)
class Patch:
    """One attribute of the host and what takes its place.

    `owner` is a module, a class or an instance. `replacement` is called as `replacement(original, *args,
    **kwargs)` where `original` is what was there before, as a plain callable: for a method, the first of
    `args` is `self`; for a class (a constructor), calling it makes an instance.
    """

    owner: Any
    attribute: str
    replacement: Callable[..., Any]
    _installation: _Installation | None = field(default=None, init=False, repr=False)

    def __str__(self) -> str:
        name = getattr(self.owner, "__qualname__", None) or getattr(self.owner, "__name__", None)
        return f"{name or type(self.owner).__name__}.{self.attribute}"

    @property
    def active(self) -> bool:
        return self._installation is not None and self._installation.on

    @property
    def buried(self) -> bool:
        """Whether our forwarder, switched off, is still in the chain of another extension's wrapper."""
        return self._installation is not None and not self._installation.on

    @property
    def original(self) -> Any:
        """The object that restoring puts back (descriptors not bound); None where nothing is installed or the
        attribute was inherited."""
        installed = self._installation
        return None if installed is None or installed.before is _MISSING else installed.before

    def _current(self) -> Any:
        return vars(self.owner).get(self.attribute, _MISSING)

    def apply(self) -> None:
        """Installs the replacement; does nothing where it is active. Raises AttributeError when the owner has
        no such attribute, TypeError when it cannot be called."""
        if self.active:
            return
        installed, current = self._installation, self._current()
        if (
            installed is None
            or current is _MISSING
            or not (current is installed.forwarder or current is installed.wrapper)
        ):
            installed = _Installation(before=current)
            installed.forwarder = self._forwarder(
                installed, self._inherited() if current is _MISSING else current
            )
            setattr(self.owner, self.attribute, installed.forwarder)
            self._installation = installed
        installed.wrapper = _MISSING
        installed.on = True

    def restore(self) -> None:
        """Puts the original back. Where another extension has wrapped ours, the wrapper stays and our
        forwarder passes everything through."""
        installed = self._installation
        if installed is None:
            return
        installed.on = False
        if self._current() is not installed.forwarder:
            installed.wrapper = self._current()
            return
        if installed.before is _MISSING:
            delattr(self.owner, self.attribute)
        else:
            setattr(self.owner, self.attribute, installed.before)
        self._installation = None

    def _inherited(self) -> Any:
        for owner in getattr(self.owner, "__mro__", type(self.owner).__mro__):
            if self.attribute in vars(owner):
                found = vars(owner)[self.attribute]
                # Through an instance, what a class defines has to be bound; through a class it stays raw.
                return found if isinstance(self.owner, type) else getattr(self.owner, self.attribute)
        raise AttributeError(f"{self.owner!r} has no attribute {self.attribute!r} to replace")

    def _forwarder(self, installed: _Installation, raw: Any) -> Any:
        """A forwarder of the same descriptor type as `raw`, the attribute that it goes in front of."""
        if isinstance(raw, (staticmethod, classmethod)):
            return type(raw)(self._forward(installed, raw.__func__))
        if isinstance(raw, type):
            return _ClassForwarder(raw, self._forward(installed, raw))
        if not callable(raw):
            raise TypeError(f"{self} is {raw!r}, not something that can be called")
        return self._forward(installed, raw)

    def _forward(self, installed: _Installation, original: Callable[..., Any]) -> Callable[..., Any]:
        replacement = self.replacement

        # `updated=()`: a class's attributes stay where they are.
        @functools.wraps(original, updated=())
        def forward(*args: Any, **kwargs: Any) -> Any:
            if installed.on:
                return replacement(original, *args, **kwargs)
            return original(*args, **kwargs)

        return forward


class _ClassForwarder:
    """Stands where a class stood: a call is forwarded, everything else (attributes, `isinstance`,
    subclassing) is the class's own affair."""

    def __init__(self, original: type, construct: Callable[..., Any]):
        self.__wrapped__ = original
        self._construct = construct

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._construct(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)

    def __instancecheck__(self, instance: object) -> bool:
        return isinstance(instance, self.__wrapped__)

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self.__wrapped__)

    def __mro_entries__(self, bases: tuple) -> tuple[type, ...]:
        return (self.__wrapped__,)


class PatchTable:
    """Patches that are applied and restored together. Both are idempotent and may be called from any thread.

    Raises ValueError when two patches name the same attribute: only one of them could be restored.
    """

    def __init__(self, patches: Iterable[Patch]):
        self.patches = tuple(patches)
        self._lock = threading.RLock()
        seen: set[tuple[int, str]] = set()
        for patch in self.patches:
            key = (id(patch.owner), patch.attribute)
            if key in seen:
                raise ValueError(f"{patch} is to be replaced twice")
            seen.add(key)

    @property
    def applied(self) -> bool:
        return bool(self.patches) and all(patch.active for patch in self.patches)

    def apply(self) -> None:
        """Installs every replacement. When one fails, those before it are taken back in reverse order and the
        error is raised."""
        with self._lock:
            done: list[Patch] = []
            try:
                for patch in self.patches:
                    done.append(patch)
                    patch.apply()
            except BaseException:
                for patch in reversed(done):
                    patch.restore()
                raise

    def restore(self) -> list[Patch]:
        """Puts every original back, last one first. Returns the patches that another extension has wrapped:
        these only pass through now."""
        with self._lock:
            for patch in reversed(self.patches):
                patch.restore()
            return [patch for patch in self.patches if patch.buried]
