"""What the engine asks of a device for every layer: the current stream, and another one for a moment."""

from __future__ import annotations

import contextlib
import types
from collections import Counter

import pytest
import torch

from lib_qswap.swap.device import Device


class TwoDevices:
    """The streams of two devices as torch.cuda keeps them: setting one makes its device the current one."""

    def __init__(self):
        self.asked = Counter()
        self.index = 1
        self.streams = {0: 0, 1: 0}

    def current_device(self):
        return self.index

    def current_stream(self, device):
        self.asked["stream"] += 1
        return types.SimpleNamespace(index=device.index, number=self.streams[device.index])

    def number(self, index):
        self.asked["number"] += 1
        return self.streams[index]

    def set_stream(self, stream):
        self.index = stream.index
        self.streams[stream.index] = stream.number

    @contextlib.contextmanager
    def stream(self, stream):
        self.asked["context"] += 1
        before = self.index, self.streams.copy()
        self.set_stream(stream)
        yield
        self.index, self.streams = before


@pytest.fixture
def devices():
    return TwoDevices()


@pytest.fixture
def device(devices):
    """The second one."""
    device = Device(torch.device("cpu"))
    device.device = torch.device("cuda", 1)
    device.streams, device._module, device._raw_stream = True, devices, devices.number
    return device


COPIES = types.SimpleNamespace(index=1, number=7)


def test_the_current_stream_is_made_an_object_only_when_it_is_another_one(device, devices):
    first = device.current_stream()
    assert all(device.current_stream() is first for _ in range(5))
    assert devices.asked["stream"] == 1
    devices.streams[1] = 3
    assert device.current_stream().number == 3
    devices.streams[0] = 4  # another device's is nobody's business here
    assert device.current_stream().number == 3
    devices.streams[1] = 0
    assert device.current_stream().number == 0
    assert devices.asked["number"] == 9


def test_without_a_cheap_way_to_ask_the_current_stream_is_asked_for_each_time(device, devices):
    device._raw_stream = None
    device.current_stream()
    devices.streams[1] = 3
    assert device.current_stream().number == 3


@pytest.mark.parametrize("current", [0, 1])
def test_work_on_another_stream_leaves_device_and_streams_as_they_were(device, devices, current):
    devices.index, devices.streams = current, {0: 2, 1: 5}
    seen = []
    device.issue_on(COPIES, lambda what: seen.append((what, devices.streams[1])), "a copy")
    assert seen == [("a copy", 7)]
    assert (devices.index, devices.streams) == (current, {0: 2, 1: 5})
    # The context manager alone knows what to do where another device is current.
    assert devices.asked["context"] == (current == 0)


def test_work_that_raises_on_another_stream_leaves_the_current_one_as_it_was(device, devices):
    with pytest.raises(ZeroDivisionError):
        device.issue_on(COPIES, lambda one: one / 0, 1)
    assert devices.streams == {0: 0, 1: 0}


def test_a_device_with_one_queue_does_the_work_where_it_would_go_anyway():
    seen = []
    Device(torch.device("cpu")).issue_on(None, seen.append, "a copy")
    assert seen == ["a copy"]
