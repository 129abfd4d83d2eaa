"""Reading into staging: the right bytes, and more threads only where they pay."""

from __future__ import annotations

import itertools
import threading
from collections import deque

import pytest
import swap_models
import torch

from lib_qswap.swap import copier, reader
from lib_qswap.swap.manager import attached
from lib_qswap.swap.reader import Reader

PIECE_BYTES = 1 << 20
SECONDS_PER_BYTE = 1e-9


class Clock:
    """Between two looks at it, when something was begun and when it was done, go `takes_s`."""

    def __init__(self):
        self.now_s = self.takes_s = 0.0

    def __call__(self):
        now_s, self.now_s, self.takes_s = self.now_s, self.now_s + self.takes_s, 0.0
        return now_s


class Source:
    """Random bytes."""

    def __init__(self, *, fails_from=None):
        self.data = torch.randint(0, 256, (PIECE_BYTES + 12345,), dtype=torch.uint8)
        self.fails_from = fails_from
        self.threads = set()

    def read_into(self, destination, start_byte):
        self.threads.add(threading.get_ident())
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


def read(one, source, pieces, clock, *, parallel=8, idle_s=0.0):
    """As many pieces at once as there are threads. On `clock` each is waited for as long as takes where
    `parallel` of them share in it, and `idle_s` goes by until it is."""
    under_way = deque()
    for i in range(pieces):
        start, size = i % 100, PIECE_BYTES - 3 * (i % 100)
        out = torch.zeros(size, dtype=torch.uint8)
        under_way.append((one.begin(source, out, start), start, out))
        while len(under_way) >= one.threads:
            finish(one, source, *under_way.popleft(), clock, parallel)
            clock.now_s += idle_s
    while under_way:
        finish(one, source, *under_way.popleft(), clock, parallel)


def finish(one, source, reading, start, out, clock, parallel):
    clock.takes_s = out.numel() * SECONDS_PER_BYTE / min(one.threads, parallel)
    assert one.finish(reading) is None
    assert torch.equal(out, source.data[start : start + out.numel()])


@pytest.mark.parametrize(
    ("parallel", "cores", "kept"),
    [(8, 8, 4), (2, 8, 2), (8, 4, 2), (8, 6, 2), (8, 7, 2), (8, 12, 4), (8, 64, 4)],
)
def test_as_many_threads_are_kept_as_are_faster_and_have_cores(make, clock, parallel, cores, kept):
    one, source = make(cores), Source()
    read(one, source, 60, clock, parallel=parallel)
    assert one.threads == kept
    source.threads.clear()
    read(one, source, 8, clock, parallel=parallel)
    assert len(source.threads) == kept


def test_more_threads_are_given_up_where_they_are_not_faster(make, clock):
    one, source = make(), Source()
    read(one, source, 40, clock, parallel=1)
    assert one.threads == 1
    source.threads.clear()
    read(one, source, 20, clock, parallel=1)
    assert len(source.threads) == 1, "once is enough for a while"


def test_what_was_given_up_is_tried_again_after_a_while(make, clock, monkeypatch):
    monkeypatch.setattr(reader, "AGAIN_BYTES", 100 * PIECE_BYTES)
    one, source = make(), Source()
    read(one, source, 40, clock, parallel=1)
    read(one, source, 60, clock, parallel=2)
    assert one.threads == 1
    read(one, source, 80, clock, parallel=2)
    assert one.threads == 2


def test_each_time_twice_as_much_is_read_before_it_is_tried_again(make, clock, monkeypatch):
    monkeypatch.setattr(reader, "AGAIN_BYTES", 50 * PIECE_BYTES)
    monkeypatch.setattr(reader, "MOST_AGAIN_BYTES", 200 * PIECE_BYTES)
    one, source = make(), Source()
    trials, before = [], set()
    for piece in range(1000):
        source.threads.clear()
        read(one, source, 1, clock, parallel=1)
        if (one.threads > 1) > (before == {2}):
            trials.append(piece)
        before = {one.threads}
    waited = [then - now for now, then in itertools.pairwise(trials)]
    assert [round(pieces / 50) for pieces in waited] == [1, 2, 4, 4, 4]


def test_no_other_thread_is_tried_where_something_else_takes_long(make, clock):
    one, source = make(), Source()
    read(one, source, 40, clock, idle_s=2e-3)
    assert len(source.threads) == 1


def test_no_other_thread_is_tried_without_cores_to_spare(make, clock):
    one, source = make(cores=2), Source()
    read(one, source, 40, clock)
    assert len(source.threads) == 1


def test_small_pieces_are_read_by_one_thread(make, clock):
    one, source = make(), Source()
    read(one, source, 60, clock)
    source.threads.clear()
    out = torch.zeros(5000, dtype=torch.uint8)
    assert one.finish(one.begin(source, out, 7)) is None
    assert torch.equal(out, source.data[7:5007])
    assert len(source.threads) == 1


def test_a_closed_reader_has_no_other_threads_and_finds_its_number_anew(make, clock):
    one, source = make(), Source()
    read(one, source, 60, clock)
    one.close()
    assert one.threads == 1
    assert not any(thread.name == "qswap-reader" for thread in threading.enumerate())
    read(one, source, 60, clock)
    assert one.threads == 4


@pytest.mark.parametrize("threads", [1, 3])
def test_what_fails_in_any_thread_is_an_error_of_its_piece_alone(threads):
    one, source = Reader(threads=threads), Source()
    broken = Source(fails_from=1)
    buffers = torch.zeros((4, PIECE_BYTES), dtype=torch.uint8)
    try:
        asked = [(source, 5), (broken, 0), (broken, 1), (source, 6)]
        begun = [one.begin(where, out, start) for (where, start), out in zip(asked, buffers, strict=True)]
        errors = [one.finish(reading) for reading in begun]
    finally:
        one.close()
    assert [str(error) for error in errors] == ["None", "None", "the disk is gone", "None"]
    assert torch.equal(buffers[3], source.data[6 : 6 + PIECE_BYTES])


@pytest.mark.simgpu
@pytest.mark.parametrize("location", ["cpu", "disk"])
def test_several_threads_bring_the_right_bytes_through_more_buffers(sim, tmp_path, monkeypatch, location):
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
        assert len(used._staging) == 2 * copier.STAGING_BUFFERS
        for _ in range(8):
            assert torch.equal(swap_models.run(model, "simgpu"), expected)
        assert used.reader.threads == 4
