"""What of an attachment sits in its model's modules: hooks and forwards, put in place and taken out again."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch

from lib_qswap.swap.execute import Forward, GatheredForward
from lib_qswap.swap.kept_outputs import KeptForward
from lib_qswap.swap.profile import work_of
from lib_qswap.swap.retry import RetryingForward

if TYPE_CHECKING:
    from lib_qswap.swap.manager import Attachment


class ModuleHooks:
    """The hooks on an attachment's roots, and the forwards of its layers where those are replaced."""

    def __init__(self, attachment: Attachment) -> None:
        self._hooks: list[Any] = []
        self._retrying: list[RetryingForward] = []
        self._forwards: list[tuple[weakref.ref[torch.nn.Module], Any]] = []
        self._kept: list[tuple[weakref.ref[torch.nn.Module], Any, KeptForward]] = []
        self._hook_roots(attachment)

    def _hook_roots(self, attachment: Attachment) -> None:
        reference = weakref.ref(attachment)

        def before(root: torch.nn.Module, args: Any, kwargs: Any) -> None:
            attachment = reference()
            if attachment is not None:
                asked = attachment.idle.asked(root, args, kwargs)
                attachment.begin_step(root, work_of(id(root), args, kwargs), asked)

        def after(root: torch.nn.Module, _args: Any, _output: Any) -> None:
            attachment = reference()
            if attachment is not None:
                attachment.end_step(root)

        def end_turn(root: torch.nn.Module, _args: Any, _output: Any) -> None:
            attachment = reference()
            if attachment is not None:
                attachment.state.turn.end_step(id(root))

        def relieve(root: torch.nn.Module) -> bool:
            attachment = reference()
            return attachment is not None and attachment.adaptation.relieve(root)

        def abandon(root: torch.nn.Module) -> None:
            attachment = reference()
            if attachment is not None:
                attachment.abandon_step(root)

        for reference_to_root in attachment.roots:
            root = reference_to_root()
            if root is not None:
                self._hooks.append(root.register_forward_pre_hook(before, with_kwargs=True))
                self._hooks.append(root.register_forward_hook(after))
                # Also where somebody else's hook raises, or a forward that somebody has put over ours.
                self._hooks.append(root.register_forward_hook(end_turn, always_call=True))
                self._retrying.append(RetryingForward(root, relieve, abandon))
                self._retrying[-1].put_in_place()

    def replace_forwards(self, attachment: Attachment) -> None:
        """Lets every swapped module compute from its lease; for models whose host has no forwards of its own
        for that."""
        for layer in attachment.layers:
            module = layer.module()
            if module is not None:
                original = module.__dict__.get("forward")
                call = _ignoring_module(original) if original is not None else type(module).forward
                module.__dict__["forward"] = Forward(
                    layer, call, attachment.state, attachment.arithmetic, attachment.compute_dtype
                )
                self._forwards.append((weakref.ref(module), original))
        for reference in attachment.gathered:
            embedding = reference()
            if embedding is not None:
                self._forwards.append((weakref.ref(embedding), embedding.__dict__.get("forward")))
                dtype = attachment.compute_dtype or embedding.weight.dtype
                embedding.__dict__["forward"] = GatheredForward(embedding, dtype)

    def keep_outputs(self, attachment: Attachment) -> None:
        """Lets the layers that depend on the conditioning alone give what they gave before."""
        for layer in attachment.idle.kept.layers:
            module = layer.module()
            if module is not None:
                original = module.__dict__.get("forward")
                call = _ignoring_module(original) if original is not None else None
                module.__dict__["forward"] = ours = KeptForward(layer, call, attachment.idle.kept)
                self._kept.append((weakref.ref(module), original, ours))

    def remove(self) -> None:
        """Gives the modules their own forwards back. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for reference, original, ours in self._kept:
            module = reference()
            # Whoever has put another in its place since calls it: it only passes on from now on.
            if module is not None and module.__dict__.get("forward") is ours:
                _put(module, original)
        self._kept.clear()
        for reference, original in self._forwards:
            module = reference()
            if module is not None:
                _put(module, original)
        self._forwards.clear()
        for forward in self._retrying:
            forward.remove()
        self._retrying.clear()


def is_attached(module: torch.nn.Module) -> bool:
    """Whether a forward of an attachment is in place of its own."""
    return isinstance(
        module.__dict__.get("forward"), RetryingForward | Forward | GatheredForward | KeptForward
    )


def _put(module: torch.nn.Module, forward: Any) -> None:
    """Gives `module` a forward of its own, or, with None, its class's."""
    if forward is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = forward


def _ignoring_module(function: Any) -> Any:
    return lambda _module, *args, **kwargs: function(*args, **kwargs)
