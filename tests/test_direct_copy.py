"""Copies by CUDA's own function: how it is called, when it is not, and that the copier uses it."""

from __future__ import annotations

import contextlib
import ctypes
import types

import pytest
import torch
import torch.nn as nn

from lib_qswap.swap import direct_copy
from lib_qswap.swap.direct_copy import DirectCopy
from lib_qswap.swap.manager import attach

DEVICE = torch.device("cpu", 0)
STREAM = 0x7F0012345678


class Runtime:
    """CUDA's runtime where the device's memory is the host's. error: what its copies return."""

    def __init__(self, error: int = 0, copies: bool = True):
        self.error, self.calls, self.taken = error, [], 0

        def copy(target, source, nbytes, direction, stream):
            self.calls.append((nbytes, direction, stream))
            if copies and not self.error:
                ctypes.memmove(target, source, nbytes)
            return self.error

        def take_error():
            self.taken += 1
            return self.error

        kinds = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p
        self.cudaMemcpyAsync = ctypes.CFUNCTYPE(ctypes.c_int, *kinds)(copy)
        self.cudaGetLastError = take_error


class Stream:
    cuda_stream = STREAM
    order = ()

    def wait_stream(self, other):
        self.order = (*self.order, other)

    def synchronize(self):
        self.order = (*self.order, "synchronized")


@pytest.fixture
def module():
    """torch's module for the device."""
    return types.SimpleNamespace(
        current_device=lambda: 0,
        current_stream=lambda _device: "current",
        device=lambda _device: contextlib.nullcontext(),
    )


def numbers(count: int) -> torch.Tensor:
    return torch.arange(count, dtype=torch.int64).to(torch.uint8)


def test_so_many_bytes_are_copied_to_the_stream(module):
    runtime = Runtime()
    direct = DirectCopy(runtime, Stream(), DEVICE, module)
    source, target = numbers(300), torch.zeros(300, dtype=torch.uint8)
    assert direct(target[10:], source[20:], 100)
    assert torch.equal(target[10:110], source[20:120])
    assert not target[:10].any()
    assert not target[110:].any()
    assert runtime.calls == [(100, 1, STREAM)]
    assert runtime.taken == 0


def test_nothing_is_copied_while_another_device_is_the_current_one(module):
    runtime = Runtime()
    direct = DirectCopy(runtime, Stream(), DEVICE, module)
    target = torch.zeros(8, dtype=torch.uint8)
    direct._current_device = lambda: 1
    assert not direct(target, numbers(8), 8)
    assert runtime.calls == []
    direct._current_device = lambda: 0
    assert direct(target, numbers(8), 8)


def test_an_error_is_taken_back_and_the_last_one(module):
    runtime = Runtime(error=1)
    direct = DirectCopy(runtime, Stream(), DEVICE, module)
    target = torch.zeros(8, dtype=torch.uint8)
    assert not direct(target, numbers(8), 8)
    assert runtime.taken == 1
    runtime.error = 0
    assert not direct(target, numbers(8), 8)
    assert len(runtime.calls) == 1


def test_the_first_library_that_is_there_is_tried(module, monkeypatch):
    runtime, stream, opened = Runtime(), Stream(), []

    def library(name):
        opened.append(name)
        if name == "missing":
            raise OSError(name)
        return types.SimpleNamespace() if name == "another" else runtime

    monkeypatch.setattr(ctypes, "CDLL", library)
    found = direct_copy.find(["missing", "another", "runtime", "not asked for"], stream, DEVICE, module)
    assert isinstance(found, DirectCopy)
    assert opened == ["missing", "another", "runtime"]
    assert stream.order == ("current", "synchronized")
    assert direct_copy.find(["missing"], stream, DEVICE, module) is None


@pytest.mark.parametrize("runtime", [Runtime(error=46), Runtime(copies=False)], ids=["error", "no bytes"])
def test_a_function_that_does_not_copy_is_not_used(module, monkeypatch, runtime):
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: runtime)
    assert direct_copy.find(["runtime"], Stream(), DEVICE, module) is None


def test_where_memory_to_try_it_with_is_refused_it_is_not_used(module, monkeypatch):
    def refused(*_arguments, **_options):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(torch, "zeros", refused)
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Runtime())
    assert direct_copy.find(["runtime"], Stream(), DEVICE, module) is None


def test_trying_it_draws_no_random_numbers_and_page_locks_nothing(module, monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Runtime())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda _tensor: pytest.fail("it was page-locked"))
    before = torch.get_rng_state()
    assert direct_copy.find(["runtime"], Stream(), DEVICE, module) is not None
    assert torch.equal(torch.get_rng_state(), before)


# ------------------------------------------------------------------------------------------------- the copier
@pytest.mark.simgpu
@pytest.mark.parametrize("together", [False, True])
@torch.no_grad()
def test_page_locked_layers_are_copied_directly_and_by_torch_where_that_fails(sim, together):
    torch.manual_seed(0)
    width = 128
    model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(24)))
    layer_bytes = width * width * 4
    x = torch.randn(2, width)
    expected = model(x)
    attachment = attach(
        model,
        device=torch.device("simgpu"),
        location="shared",
        budget_bytes=12 * layer_bytes if together else 3 * layer_bytes,
        ring_bytes=12 * layer_bytes if together else None,
    )
    copier, copied, works = attachment.state.copier, [], True

    def direct(target, source, nbytes):
        if works:
            whole, there = (one.as_strided((nbytes,), (1,), one.storage_offset()) for one in (source, target))
            with torch.simgpu.stream(copier.stream):
                there.copy_(whole, non_blocking=True)
            copied.append(nbytes)
        return works

    copier.direct = direct
    try:
        for _ in range(3):
            torch.testing.assert_close(model(x.to("simgpu")).cpu(), expected)
        assert max(copied) > layer_bytes if together else set(copied) == {layer_bytes}
        direct_bytes = sum(copied)
        works = False
        torch.testing.assert_close(model(x.to("simgpu")).cpu(), expected)
        assert sum(copied) == direct_bytes
        assert copier.h2d_bytes > direct_bytes
    finally:
        copier.direct = None
        attachment.detach()


@pytest.mark.simgpu
@torch.no_grad()
def test_what_is_not_page_locked_is_copied_by_torch(sim):
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4)))
    x = torch.randn(2, 512)
    expected = model(x)
    attachment = attach(
        model, device=torch.device("simgpu"), location="cpu", budget_bytes=2 << 20, pin_budget_bytes=0
    )
    attachment.state.copier.direct = lambda *_: pytest.fail("it was copied directly")
    try:
        torch.testing.assert_close(model(x.to("simgpu")).cpu(), expected)
    finally:
        attachment.state.copier.direct = None
        attachment.detach()
