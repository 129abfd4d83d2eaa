"""Reading into staging: the right bytes, and a second thread only where it pays."""

from __future__ import annotations

import threading

import pytest
import torch

from lib_qswap.swap import reader
from lib_qswap.swap.reader import Reader

PIECE_BYTES = 1 << 20
SECONDS_PER_BYTE = 1e-9


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


class Source:
    """Random bytes that take their time on `clock`, where two threads take no longer than one; `serial`: a
    disk that does one thing after the other."""

    def __init__(self, clock, *, serial=False, fails_from=None):
        self.data = torch.randint(0, 256, (PIECE_BYTES + 12345,), dtype=torch.uint8)
        self.clock, self.serial, self.fails_from = clock, serial, fails_from
        self.reader = threading.get_ident()
        self.lock = threading.Lock()
        self.threads = set()

    def read_into(self, destination, start_byte):
        self.threads.add(threading.get_ident())
        if self.fails_from is not None and start_byte >= self.fails_from:
            raise OSError("the disk is gone")
        if self.serial or threading.get_ident() == self.reader:
            with self.lock:
                self.clock.now_s += destination.numel() * SECONDS_PER_BYTE
        destination.copy_(self.data[start_byte : start_byte + destination.numel()])


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make(monkeypatch, clock):
    """A reader that compares after eight pieces, on a machine of `cores`."""
    monkeypatch.setattr(reader, "TRIAL_BYTES", 8 * PIECE_BYTES)
    made = []

    def make(cores=8):
        monkeypatch.setattr(reader, "available_cores", lambda: cores)
        made.append(Reader(clock))
        return made[-1]

    yield make
    for one in made:
        one.close()
    assert not any(thread.name == "qswap-reader" for thread in threading.enumerate())


def read(one, source, pieces, idle_s=0.0):
    for i in range(pieces):
        start, size = i, PIECE_BYTES - 3 * i
        out = torch.zeros(size, dtype=torch.uint8)
        one.read(source, out, start)
        assert torch.equal(out, source.data[start : start + size])
        source.clock.now_s += idle_s


def test_a_second_thread_is_kept_where_it_is_faster(make, clock):
    one, source = make(), Source(clock)
    read(one, source, 40)
    assert one.threads == 2
    assert len(source.threads) == 2


def test_a_second_thread_is_given_up_where_it_is_not(make, clock):
    one, source = make(), Source(clock, serial=True)
    read(one, source, 40)
    assert one.threads == 1
    source.threads.clear()
    read(one, source, 20)
    assert len(source.threads) == 1, "once is enough"


def test_no_second_thread_is_tried_where_something_else_takes_long(make, clock):
    one, source = make(), Source(clock)
    read(one, source, 40, idle_s=1e-3)
    assert len(source.threads) == 1


def test_no_second_thread_is_tried_without_a_core_to_spare(make, clock):
    one, source = make(cores=2), Source(clock)
    read(one, source, 40)
    assert len(source.threads) == 1


def test_small_pieces_are_read_by_one_thread(make, clock):
    one, source = make(), Source(clock)
    read(one, source, 40)
    source.threads.clear()
    out = torch.zeros(5000, dtype=torch.uint8)
    one.read(source, out, 7)
    assert torch.equal(out, source.data[7:5007])
    assert len(source.threads) == 1


@pytest.mark.parametrize("fails_from", [0, PIECE_BYTES // 4], ids=["both", "the second"])
def test_what_fails_in_either_thread_is_an_error_and_the_next_read_works(make, clock, fails_from):
    one, source = make(), Source(clock)
    read(one, source, 40)
    broken = Source(clock, fails_from=fails_from)
    with pytest.raises(OSError, match="the disk is gone"):
        one.read(broken, torch.zeros(PIECE_BYTES, dtype=torch.uint8), 0)
    read(one, source, 3)
