"""Temporaries of unpacking on the CPU: bounded, whatever the size of the tensor."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.profiler import ProfilerActivity, profile

import lib_qswap.quant.unpack as unpacking
from lib_qswap.quant import unpack_cpu, unpack_cpu_codebook, unpack_cpu_k, unpack_cpu_legacy
from lib_qswap.quant.formats import FORMATS
from lib_qswap.quant.unpack import unpack

UNPACKED = [row for row in FORMATS.values() if row.unpack is not None]
LIMIT_BYTES = 64 << 20


def peak_bytes(work) -> int:
    """The most that torch's CPU allocator holds during `work`, beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = [(_start(event), event.nbytes()) for event in events if event.name() == "[memory]"]
    held = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        held += nbytes
        peak = max(peak, held)
    return peak


def _start(event) -> int:
    # Before 2.4, microseconds: equal ones stay in their order.
    return event.start_ns() if hasattr(event, "start_ns") else event.start_us()


def test_the_measurement_sees_what_is_held_at_once():
    def work():
        kept = torch.empty(3 << 20, dtype=torch.uint8)
        for _ in range(3):
            kept + 1

    assert peak_bytes(work) == pytest.approx(6 << 20, rel=1e-4)


@pytest.mark.parametrize("arithmetic", ["exact", "like Forge"])
def test_temporaries_stay_below_64_mb_for_the_largest_chunks(arithmetic, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    for format in UNPACKED:
        # Five chunks of those whose scales are unpacked for several at once, two of the others.
        elements = 1 << (25 if format.name in unpacking._CPU_KINDS else 23)
        packed = torch.zeros(format.packed_bytes(elements), dtype=torch.uint8)
        out = torch.empty(elements, dtype=torch.float16)
        used = peak_bytes(partial(unpack, format, packed, out, arithmetic=arithmetic))
        assert used < LIMIT_BYTES, f"{format.name}: {used >> 20} MB"


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "Q5_0", "IQ2_S"])
def test_temporaries_do_not_grow_with_the_tensor(name, monkeypatch):
    format = FORMATS[name]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)

    def used(elements: int) -> int:
        packed = torch.zeros(format.packed_bytes(elements), dtype=torch.uint8)
        out = torch.empty(elements, dtype=torch.float16)
        monkeypatch.setattr(unpack_cpu, "_kept", threading.local())
        return peak_bytes(partial(unpack, format, packed, out))

    # Whole chunks: what is left of them is unpacked in another way, with less memory.
    assert 0 < used(32 * unpacking._CPU_CHUNK_ELEMENTS) <= used(16 * unpacking._CPU_CHUNK_ELEMENTS) * 1.01


def test_the_next_tensor_of_a_type_takes_the_same_buffers(monkeypatch):
    format = FORMATS["Q5_K"]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(unpack_cpu, "_kept", threading.local())
    elements = 8 * unpacking._CPU_CHUNK_ELEMENTS
    packed = torch.zeros(format.packed_bytes(elements), dtype=torch.uint8)
    out = torch.empty(elements, dtype=torch.bfloat16)
    first, second = (peak_bytes(partial(unpack, format, packed, out)) for _ in range(2))
    assert second < first / 4


TRACED = (
    unpack_cpu_k.Q6_K,
    unpack_cpu_legacy.Q5_0,
    unpack_cpu_codebook.IQ4_NL,
    unpack_cpu_codebook.BNB_NF4,
)


def test_buffers_of_somebody_who_traces_are_not_used_again(monkeypatch):
    monkeypatch.setattr(unpack_cpu, "_kept", threading.local())
    with FakeTensorMode():
        traced = [unpack_cpu._unpacker_of(kind, 64) for kind in TRACED]
    assert isinstance(traced[0].words, FakeTensor)
    for kind in TRACED:
        for kept in vars(unpack_cpu._unpacker_of(kind, 64)).values():
            assert not isinstance(kept, FakeTensor), kind


def test_threads_that_unpack_at_once_do_not_share_buffers():
    format = FORMATS["Q4_K"]
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (8, 1 << 13, format.block_bytes), dtype=torch.uint8, generator=generator)
    blocks[..., 1::2][..., :2] = 0x20  # d and dmin: small numbers.
    alone = [unpack(format, packed.view(-1), torch.empty(1 << 21)) for packed in blocks]
    together = [torch.empty(1 << 21) for _ in blocks]

    def work(number: int) -> None:
        for _ in range(5):
            unpack(format, blocks[number].view(-1), together[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(blocks))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(map(torch.equal, alone, together))
