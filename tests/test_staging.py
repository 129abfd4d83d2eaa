"""The copier's worker reads pieces of several transfers at once, and copies them in the order asked for."""

from __future__ import annotations

import contextlib
import threading
import types

import pytest
import torch

from lib_qswap.swap import copier as copying
from lib_qswap.swap import reader
from lib_qswap.swap.copier import Copier
from lib_qswap.swap.device import device_of
from lib_qswap.swap.home import PinBudget
from lib_qswap.swap.reader import Reader
from lib_qswap.swap.transfer import Transfer

pytestmark = pytest.mark.simgpu

BUFFER_BYTES = 32 << 10
PAYLOAD_BYTES = 3 * BUFFER_BYTES - 1000
LATE_S = 20.0


class Home:
    """Random bytes; pieces named in `held` wait for their event, and `broken` ones cannot be read."""

    page_locked = False

    def __init__(self, seed, *, page_locked=False):
        data = torch.randint(0, 256, (PAYLOAD_BYTES,), generator=torch.Generator().manual_seed(seed))
        self.payload = data.to(torch.uint8)
        if page_locked:
            self.payload, self.page_locked = self.payload.pin_memory(), True
        self.held = {}
        self.broken = set()
        self.read = []

    def read_into(self, destination, start_byte):
        self.read.append(start_byte)
        if start_byte in self.held:
            assert self.held[start_byte].wait(LATE_S), "nothing else was read meanwhile"
        if start_byte in self.broken:
            raise OSError("the disk is gone")
        destination.copy_(self.payload[start_byte : start_byte + destination.numel()])


@contextlib.contextmanager
def worker(threads):
    copier = Copier(device_of("simgpu"), PinBudget(1 << 30))
    copier.reader = Reader(threads=threads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "available_cores", lambda: 1 if threads == 1 else 8)
        copier.use_worker(True)
    assert len(copier._staging) == (4 if threads == 1 else 8)
    try:
        yield copier
    finally:
        copier.use_worker(False)


@pytest.fixture(autouse=True)
def small(sim, monkeypatch):
    monkeypatch.setattr(copying, "STAGING_BUFFER_BYTES", BUFFER_BYTES)
    monkeypatch.setattr(reader, "LEAST_BYTES", 1)


def submit(copier, *homes):
    transfers = []
    for home in homes:
        target = torch.zeros(PAYLOAD_BYTES, dtype=torch.uint8, device="simgpu")
        layer = types.SimpleNamespace(home=home, payload_bytes=PAYLOAD_BYTES)
        transfers.append(Transfer(layer, target, {}))
    device = device_of("simgpu")
    device.order(device.current_stream(), copier.stream)
    for transfer in transfers:
        copier.submit(transfer)
    return transfers


def arrived(copier, transfers):
    copier.finish()
    return [bool(one.arrived) and torch.equal(one.target.cpu(), one.layer.home.payload) for one in transfers]


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_all_bytes_arrive_from_homes_of_all_kinds(threads):
    with worker(threads) as copier:
        homes = [Home(i, page_locked=i % 3 == 1) for i in range(12)]
        assert arrived(copier, submit(copier, *homes)) == [True] * 12
        assert [len(home.read) for home in homes[:2]] == [3, 0]


def test_a_piece_that_takes_long_does_not_keep_those_behind_it_from_being_read():
    with worker(2) as copier:
        slow, next_one = Home(0), Home(1)
        slow.held[0] = threading.Event()
        begin = next_one.read_into

        def opening(destination, start_byte):
            slow.held[0].set()
            begin(destination, start_byte)

        next_one.read_into = opening
        # The second thread reads the slow one's second piece, and then the first of the next one.
        assert arrived(copier, submit(copier, slow, next_one)) == [True, True]


def test_what_was_read_first_is_not_copied_before_what_was_asked_for_first():
    with worker(2) as copier:
        slow, locked, quick = Home(0), Home(1, page_locked=True), Home(2)
        slow.held[0] = threading.Event()
        transfers = submit(copier, slow, locked, quick)
        waited = threading.Event()
        assert not waited.wait(0.2)
        assert [one.issued for one in transfers] == [False] * 3
        slow.held[0].set()
        assert arrived(copier, transfers) == [True] * 3


@pytest.mark.parametrize("threads", [1, 2])
def test_a_copy_takes_as_long_as_its_reading_is_waited_for(threads):
    with worker(threads) as copier:
        homes = [Home(i) for i in range(3)]
        homes[1].held[0] = threading.Event()
        threading.Timer(0.3, homes[1].held[0].set).start()
        transfers = submit(copier, *homes)
        assert arrived(copier, transfers) == [True] * 3
        took_s = [one.events.started.elapsed_time(one.events.ready) * 1e-3 for one in transfers]
        assert took_s[1] > 0.2
        assert max(took_s[0], took_s[2]) < 0.2


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_piece_that_cannot_be_read_is_an_error_of_its_transfer_alone(threads, place):
    with worker(threads) as copier:
        homes = [Home(i) for i in range(5)]
        homes[2].broken.add(place * BUFFER_BYTES)
        transfers = submit(copier, *homes)
        assert arrived(copier, transfers) == [True, True, False, True, True]
        assert all(one.issued for one in transfers)
        assert isinstance(transfers[2].error, OSError)
        assert arrived(copier, submit(copier, Home(9))) == [True]


def test_a_thread_that_cannot_be_started_is_an_error_of_the_transfer(monkeypatch):
    with worker(2) as copier:
        with monkeypatch.context() as patch:
            patch.setattr(reader, "OtherThread", lambda: 1 / 0)
            (transfer,) = submit(copier, Home(0))
            copier.drain()
            assert isinstance(transfer.error, ZeroDivisionError)
            assert transfer.issued
        assert arrived(copier, submit(copier, Home(1))) == [True]


def test_a_transfer_that_was_cancelled_is_not_read():
    with worker(2) as copier:
        slow, cancelled = Home(0), Home(1)
        slow.held[0] = threading.Event()
        transfers = submit(copier, slow)
        blocked = submit(copier, *[Home(i) for i in range(3)])  # More than is read at once.
        (last,) = submit(copier, cancelled)
        last.cancelled = True
        slow.held[0].set()
        assert arrived(copier, [*transfers, *blocked]) == [True] * 4
        assert last.issued
        assert not cancelled.read


def test_the_worker_ends_when_all_that_it_was_asked_for_is_done():
    with worker(4) as copier:
        transfers = submit(copier, *[Home(i) for i in range(6)])
        copier.use_worker(False)
        assert all(one.issued for one in transfers)
        assert arrived(copier, transfers) == [True] * 6
