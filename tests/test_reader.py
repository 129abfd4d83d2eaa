"""Reading into staging: the right bytes, and more threads only where they pay."""

from __future__ import annotations

import threading

import pytest
import swap_models
import torch

from lib_qswap.swap import copier, reader
from lib_qswap.swap.manager import attached
from lib_qswap.swap.reader import Reader

PIECE_BYTES = 1 << 20
SECONDS_PER_BYTE = 1e-9


class Clock:
    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


class Source:
    """Random bytes that take their time on `clock`, in which up to `parallel` threads share."""

    def __init__(self, clock, *, parallel=8, fails_from=None):
        self.data = torch.randint(0, 256, (PIECE_BYTES + 12345,), dtype=torch.uint8)
        self.clock, self.parallel, self.fails_from = clock, parallel, fails_from
        self.at_once = 1
        self.lock = threading.Lock()
        self.threads = set()

    def read_into(self, destination, start_byte):
        with self.lock:
            self.threads.add(threading.get_ident())
            self.clock.now_s += destination.numel() * SECONDS_PER_BYTE / min(self.at_once, self.parallel)
        if self.fails_from is not None and start_byte >= self.fails_from:
            raise OSError("the disk is gone")
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
        start, size = i % 100, PIECE_BYTES - 3 * (i % 100)
        out = torch.zeros(size, dtype=torch.uint8)
        source.at_once = one.threads
        one.read(source, out, start)
        assert torch.equal(out, source.data[start : start + size])
        source.clock.now_s += idle_s


@pytest.mark.parametrize(
    ("parallel", "cores", "kept"),
    [(8, 8, 4), (2, 8, 2), (8, 4, 2), (8, 6, 2), (8, 7, 2), (8, 12, 4), (8, 64, 4)],
)
def test_as_many_threads_are_kept_as_are_faster_and_have_cores(make, clock, parallel, cores, kept):
    one, source = make(cores), Source(clock, parallel=parallel)
    read(one, source, 60)
    assert one.threads == kept
    source.threads.clear()
    read(one, source, 4)
    assert len(source.threads) == kept


def test_more_threads_are_given_up_where_they_are_not_faster(make, clock):
    one, source = make(), Source(clock, parallel=1)
    read(one, source, 40)
    assert one.threads == 1
    source.threads.clear()
    read(one, source, 20)
    assert len(source.threads) == 1, "once is enough for a while"


def test_what_was_given_up_is_tried_again_after_a_while(make, clock, monkeypatch):
    monkeypatch.setattr(reader, "AGAIN_BYTES", 100 * PIECE_BYTES)
    one, source = make(), Source(clock, parallel=1)
    read(one, source, 40)
    source.parallel = 2
    read(one, source, 60)
    assert one.threads == 1
    read(one, source, 80)
    assert one.threads == 2


def test_no_other_thread_is_tried_where_something_else_takes_long(make, clock):
    one, source = make(), Source(clock)
    read(one, source, 40, idle_s=1e-3)
    assert len(source.threads) == 1


def test_no_other_thread_is_tried_without_cores_to_spare(make, clock):
    one, source = make(cores=2), Source(clock)
    read(one, source, 40)
    assert len(source.threads) == 1


def test_small_pieces_are_read_by_one_thread(make, clock):
    one, source = make(), Source(clock)
    read(one, source, 60)
    source.threads.clear()
    out = torch.zeros(5000, dtype=torch.uint8)
    one.read(source, out, 7)
    assert torch.equal(out, source.data[7:5007])
    assert len(source.threads) == 1


def test_a_closed_reader_has_no_other_threads_and_finds_its_number_anew(make, clock):
    one, source = make(), Source(clock)
    read(one, source, 60)
    one.close()
    assert one.threads == 1
    assert not any(thread.name == "qswap-reader" for thread in threading.enumerate())
    read(one, source, 60)
    assert one.threads == 4


@pytest.mark.parametrize("fails_from", [0, PIECE_BYTES // 4], ids=["all", "all but the first"])
def test_what_fails_in_any_thread_is_an_error_and_the_next_read_works(make, clock, fails_from):
    one, source = make(), Source(clock)
    read(one, source, 60)
    broken = Source(clock, fails_from=fails_from)
    with pytest.raises(OSError, match="the disk is gone"):
        one.read(broken, torch.zeros(PIECE_BYTES, dtype=torch.uint8), 0)
    read(one, source, 3)


@pytest.mark.simgpu
@pytest.mark.parametrize("location", ["cpu", "disk"])
def test_several_threads_bring_the_right_bytes_through_fewer_buffers(sim, tmp_path, monkeypatch, location):
    monkeypatch.setattr(copier, "STAGING_BUFFER_BYTES", 64 << 10)
    monkeypatch.setattr(reader, "available_cores", lambda: 8)
    monkeypatch.setattr(reader, "TRIAL_BYTES", 1 << 20)
    monkeypatch.setattr(reader, "LEAST_BYTES", 16 << 10)
    # That it is always the reading that takes long, and pays.
    monkeypatch.setattr(reader, "BUSY", 0.0)
    monkeypatch.setattr(reader, "WORTH", 0.0)
    model = swap_models.build(6, file=tmp_path / "model.gguf")
    expected = swap_models.reference(model)
    options = {"device": "simgpu", "location": location, "compute_dtype": torch.float32}
    with (
        swap_models.clean_engine(),
        attached(model, budget_bytes=0, arithmetic="exact", **options) as attachment,
    ):
        used = attachment.state.copier
        assert len(used._staging) == copier.STAGING_BUFFERS
        for _ in range(8):
            assert torch.equal(swap_models.run(model, "simgpu"), expected)
        assert used.reader.threads == 4
        assert [buffer.numel() for buffer, _ in used._staging] == [128 << 10] * 2
