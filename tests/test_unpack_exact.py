"""Exact unpacking: fp32 bit for bit as gguf-py, fp16 and bf16 rounded once, in chunks, on any device."""

from __future__ import annotations

import threading

import ggml_blocks
import numpy as np
import pytest
import torch
from bnb_checkpoint import TABLES

import lib_qswap.quant.unpack as unpacking
from lib_qswap.quant import unpack_cpu
from lib_qswap.quant.formats import FORMATS
from lib_qswap.quant.unpack import unpack

UNPACKED = [row for row in FORMATS.values() if row.unpack is not None]
EVERY_TYPE = pytest.mark.parametrize("format", UNPACKED, ids=lambda row: row.name)
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 32 super-blocks, so that a small tensor has several."""
    monkeypatch.setattr(unpacking, "_CPU_CHUNK_ELEMENTS", -(-8192 // torch.get_num_threads()))
    monkeypatch.setattr(unpacking, "_TEMPORARY_BYTES", 8192 * 2)


PLAIN_OF_NUMPY = {"F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8"}


def reference(format, blocks: np.ndarray) -> torch.Tensor:
    """What gguf-py makes of the blocks, fp32 (n, block_elements); by formula for types that it lacks."""
    count = len(blocks)
    if format.name in PLAIN_OF_NUMPY:
        return torch.from_numpy(blocks.view(PLAIN_OF_NUMPY[format.name]).astype(np.float32))
    if format.name.startswith("F8_"):
        return torch.from_numpy(fp8_values(format.name)[blocks])
    if format.name.startswith("BNB_"):
        table = TABLES[format.name.removeprefix("BNB_").lower()]
        nibbles = np.stack((blocks[:, 4:] >> 4, blocks[:, 4:] & 0x0F), -1).reshape(count, 64)
        return torch.from_numpy(table[nibbles] * blocks[:, :4].copy().view(np.float32))
    if format.name == "Q1_0":
        bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").astype(np.float32)
        return torch.from_numpy((2 * bits - 1) * blocks[:, :2].copy().view(np.float16).astype(np.float32))
    if format.name == "Q2_0":
        q = (blocks[:, 2:, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3).reshape(count, 64)
        return torch.from_numpy(
            (q.astype(np.float32) - 1) * blocks[:, :2].copy().view(np.float16).astype(np.float32)
        )
    if format.name == "Q8_K":
        q = blocks[:, 4:260].view(np.int8).astype(np.float32)
        return torch.from_numpy(q * blocks[:, :4].copy().view(np.float32))
    gguf = pytest.importorskip("gguf")
    values = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[format.name])
    return torch.from_numpy(np.array(values).reshape(count, format.block_elements))


def fp8_values(name: str) -> np.ndarray:
    """fp32 (256,): what each byte stands for, by the definition of E4M3 (without infinities) and of E5M2."""
    mantissa_bits, bias = {"F8_E4M3": (3, 7), "F8_E5M2": (2, 15)}[name]
    values = []
    for byte in range(256):
        exponent, mantissa = (byte & 0x7F) >> mantissa_bits, byte & (1 << mantissa_bits) - 1
        fraction = mantissa / (1 << mantissa_bits)
        value = (1 + fraction) * 2.0 ** (exponent - bias) if exponent else fraction * 2.0 ** (1 - bias)
        if name == "F8_E4M3" and byte & 0x7F == 0x7F:
            value = np.nan
        if name == "F8_E5M2" and exponent == 31:
            value = np.nan if mantissa else np.inf
        values.append(-value if byte & 0x80 else value)
    return np.array(values, np.float32)


def several_chunks(format) -> int:
    """Blocks: three chunks and a little with `small_chunks`."""
    return 3 * 8192 // format.block_elements + 35


def unpacked(format, blocks: np.ndarray, dtype=torch.float32, **arithmetic) -> torch.Tensor:
    out = torch.full((len(blocks), format.block_elements), torch.nan, dtype=dtype)
    assert unpack(format, torch.from_numpy(blocks), out, **arithmetic) is out
    return out


def assert_same_bits(values: torch.Tensor, expected: torch.Tensor) -> None:
    """Bit for bit, the sign of zero included."""
    assert values.dtype == expected.dtype
    torch.testing.assert_close(
        values.view(BITS[values.dtype]), expected.view(BITS[values.dtype]), rtol=0, atol=0
    )


@EVERY_TYPE
@pytest.mark.parametrize("scales", ["any", "ordinary", "edge", "zero"])
def test_values_are_those_of_gguf_py_bit_for_bit_and_rounded_once(format, scales, small_chunks):
    blocks = ggml_blocks.random_blocks(format, max(14 * 14 + 3, several_chunks(format)), scales)
    expected = reference(format, blocks)
    assert expected.isfinite().all()
    if scales in ("any", "ordinary"):
        assert expected.unique().numel() > 2 or format.name == "Q1_0"
    assert_same_bits(unpacked(format, blocks), expected)
    if format.name in ("F64", "I32", "I64"):
        return  # fp32 is not what the halves are rounded from: see test_unpack_plain
    for dtype in (torch.float16, torch.bfloat16):
        assert_same_bits(unpacked(format, blocks, dtype), expected.to(dtype))


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("name", unpacking._CPU_KINDS)
def test_small_chunks_are_unpacked_in_the_way_of_the_cpu(name, threads, monkeypatch, request):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    request.getfixturevalue("small_chunks")
    done, original = [], unpack_cpu.unpack_whole_chunks
    monkeypatch.setattr(
        unpack_cpu, "unpack_whole_chunks", lambda *args: done.append(original(*args)) or done[-1]
    )
    format = FORMATS[name]
    count = several_chunks(format)
    unpacked(format, ggml_blocks.random_blocks(format, count, "ordinary"), torch.bfloat16)
    assert count - 64 < sum(done) <= count


@EVERY_TYPE
def test_the_first_and_the_last_block_of_a_tensor_are_what_they_are_alone(format, small_chunks):
    blocks = ggml_blocks.random_blocks(format, 8192 // format.block_elements * 3 + 1, "ordinary")
    values = unpacked(format, blocks, torch.bfloat16)
    for place in (0, -1):
        alone = unpacked(format, blocks[[place]], torch.bfloat16)
        assert_same_bits(values[[place]], alone)
        assert_same_bits(unpacked(format, blocks[[place]]), reference(format, blocks[[place]]))


@EVERY_TYPE
@pytest.mark.parametrize("count", [0, 1, 7, 8, 65])
def test_any_number_of_blocks_is_unpacked_whatever_the_chunk(format, count, small_chunks):
    blocks = ggml_blocks.random_blocks(format, 129, "ordinary")
    whole = unpacked(format, blocks)
    assert_same_bits(unpacked(format, blocks[:count].copy()), whole[:count])


@EVERY_TYPE
def test_a_chunk_larger_than_the_tensor_gives_the_same_values(format, small_chunks, monkeypatch):
    blocks = ggml_blocks.random_blocks(format, 129, "ordinary")
    in_small_chunks = unpacked(format, blocks, torch.float16)
    monkeypatch.undo()
    assert_same_bits(unpacked(format, blocks, torch.float16), in_small_chunks)


@EVERY_TYPE
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_blocks_may_start_at_any_byte(format, offset, small_chunks):
    blocks = ggml_blocks.random_blocks(format, 80, "ordinary")
    storage = torch.zeros(blocks.size + offset, dtype=torch.uint8)
    storage[offset:] = torch.from_numpy(blocks).view(-1)
    out = torch.empty(80, format.block_elements)
    assert_same_bits(unpack(format, storage[offset:], out), unpacked(format, blocks))


@pytest.mark.parametrize("name", unpacking._CPU_KINDS)
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_blocks_may_lie_in_a_storage_that_starts_at_any_byte(name, offset, small_chunks):
    """A file's map is such a storage; one of the two may be aligned where the other is not."""
    format = FORMATS[name]
    blocks = ggml_blocks.random_blocks(format, several_chunks(format), "ordinary")
    expected = unpacked(format, blocks)
    data = np.zeros(blocks.size + 64, np.uint8)
    base = -data.ctypes.data % 16 + offset
    storage = torch.frombuffer(data.data, dtype=torch.uint8, offset=base)
    for start in (0, -offset % 16, 8):
        storage[start : start + blocks.size] = torch.from_numpy(blocks).view(-1)
        packed = storage[start : start + blocks.size]
        assert_same_bits(unpack(format, packed, torch.empty_like(expected)), expected)


def test_shapes_are_free_as_long_as_the_number_of_elements_fits():
    blocks = ggml_blocks.random_blocks(FORMATS["Q4_K"], 12, "ordinary")
    out = torch.empty(3, 4, 256, dtype=torch.float16)
    packed = torch.from_numpy(blocks).view(3, -1)
    assert_same_bits(
        unpack(FORMATS["Q4_K"], packed, out).view(12, 256), unpacked(FORMATS["Q4_K"], blocks, torch.float16)
    )


def test_tensors_that_do_not_fit_are_refused_with_the_reason():
    q4_0, packed, out = FORMATS["Q4_0"], torch.zeros(4, 18, dtype=torch.uint8), torch.empty(4, 32)
    with pytest.raises(ValueError, match="96 elements of Q4_0 take 54 bytes, but there are 72"):
        unpack(q4_0, packed, out[:3])
    with pytest.raises(ValueError, match="whole number of Q4_0 blocks"):
        unpack(q4_0, packed, out.view(-1)[:100])
    with pytest.raises(ValueError, match=r"uint8, not torch\.int8"):
        unpack(q4_0, packed.view(torch.int8), out)
    with pytest.raises(ValueError, match="contiguous"):
        unpack(q4_0, packed.t(), out)
    with pytest.raises(ValueError, match=r"not torch\.float64"):
        unpack(q4_0, packed, out.double())
    with pytest.raises(ValueError, match="contiguous"):
        unpack(q4_0, packed, out.t())
    with pytest.raises(ValueError, match="on cpu, their values on meta"):
        unpack(q4_0, packed, torch.empty(4, 32, device="meta"))
    with pytest.raises(ValueError, match="'fast'"):
        unpack(q4_0, packed, out, arithmetic="fast")


def test_a_type_that_nobody_unpacks_is_named():
    with pytest.raises(NotImplementedError, match="Q8_1"):
        unpack(FORMATS["Q8_1"], torch.zeros(40, dtype=torch.uint8), torch.empty(32))


@pytest.mark.parametrize("first_in_inference_mode", [True, False])
def test_tensors_of_inference_mode_and_others_may_be_mixed(first_in_inference_mode):
    for name in ("IQ2_XS", "Q6_K"):
        format = FORMATS[name]
        blocks = ggml_blocks.random_blocks(format, 16, "ordinary")
        with torch.inference_mode(first_in_inference_mode):
            first = unpacked(format, blocks)
        with torch.inference_mode(not first_in_inference_mode):
            again = unpacked(format, blocks)
            unpack(format, torch.from_numpy(blocks), first)
        assert_same_bits(again.clone(), first.clone())
        ordinary = again if first_in_inference_mode else first
        weight = torch.ones(1, requires_grad=True)
        (ordinary * weight).sum().backward()
        assert weight.grad.item() == pytest.approx(ordinary.sum().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["Q5_K", "Q5_0", "IQ4_XS", "BNB_NF4", "TQ1_0"])
def test_threads_do_not_disturb_each_other(name, small_chunks):
    format = FORMATS[name]
    count = several_chunks(format)
    work = [ggml_blocks.random_blocks(format, count, "ordinary", seed) for seed in range(4)]
    expected = [unpacked(format, blocks, torch.float16) for blocks in work]
    results: dict[int, torch.Tensor] = {}

    def run(index: int) -> None:
        for _ in range(3):
            results[index] = unpacked(format, work[index], torch.float16)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(4):
        assert_same_bits(results[index], expected[index])


@pytest.mark.simgpu
def test_a_device_gives_the_same_values_without_transfers_or_waits(sim, compute_mode, small_chunks):
    for format in UNPACKED:
        blocks = torch.from_numpy(ggml_blocks.random_blocks(format, 67, "ordinary"))
        packed = blocks.to("simgpu")
        out = torch.empty(67, format.block_elements, dtype=torch.float16, device="simgpu")
        unpack(format, packed, out)  # constants and tables travel once
        out.fill_(torch.nan)
        sim.synchronize()
        sim.reset_stats()
        unpack(format, packed, out)
        stats = sim.stats()
        moved = {key: value for key, value in stats.items() if key.startswith(("h2d", "d2h")) and value}
        assert moved == {}, format.name
        assert stats["host_waits"] == 0, format.name
        assert stats["ops"] > 0
        assert_same_bits(out.cpu(), unpacked(format, blocks.numpy(), torch.float16))


@pytest.mark.simgpu
@pytest.mark.parametrize("arithmetic", ["exact", "like Forge"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_temporaries_stay_within_their_limit_on_an_accelerator(dtype, arithmetic, sim, monkeypatch):
    limit_bytes = 1 << 19
    monkeypatch.setattr(unpacking, "_TEMPORARY_BYTES", limit_bytes)
    for format in UNPACKED:
        # Two chunks of the types that take least, and a little.
        count = 2 * limit_bytes // format.block_elements // 8 * 8 + 8
        packed = torch.from_numpy(ggml_blocks.random_blocks(format, count, "ordinary")).to("simgpu")
        out = torch.empty(count, format.block_elements, dtype=dtype, device="simgpu")
        unpack(format, packed, out, arithmetic=arithmetic)
        sim.reset_stats()
        before = torch.simgpu.memory_allocated()
        unpack(format, packed, out, arithmetic=arithmetic)
        peak = torch.simgpu.max_memory_allocated()
        assert before <= peak <= before + limit_bytes * 1.01, format.name
        assert peak > before or format.dtype is not None, format.name


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K"])
@pytest.mark.parametrize("scale", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("position", [0, 1], ids=["d", "dmin"])
@pytest.mark.parametrize("bad", [100, 900])
def test_a_scale_that_is_no_number_spoils_its_own_block_alone(name, scale, position, bad, small_chunks):
    # One is among the blocks whose scales are unpacked first, at once, the other is not.
    blocks = ggml_blocks.random_blocks(FORMATS[name], 1003, "any")
    blocks[bad].view(np.float16)[position] = scale
    expected = unpacked(FORMATS[name], blocks)
    assert not expected[bad].isfinite().any()
    assert expected[:bad].isfinite().all()
    assert expected[bad + 1 :].isfinite().all()
    values = unpacked(FORMATS[name], blocks, torch.float16)
    assert torch.equal(values.isnan(), expected.isnan())
    assert torch.equal(values.nan_to_num(nan=0), expected.half().nan_to_num(nan=0))


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
@pytest.mark.parametrize("scale", [2.0**-24, 0.01, 65504.0, 0.0, -0.0, -0.01, np.inf, -np.inf, np.nan])
def test_ternary_numbers_have_the_right_sign_where_they_are_zero(name, scale, small_chunks, monkeypatch):
    format = FORMATS[name]
    blocks = ggml_blocks.random_blocks(format, 14 * 14 + 3, "ordinary")
    d = blocks[:, -2:].view(np.float16)
    d[:] = np.maximum(np.abs(d), np.float16(1e-4))
    d[100] = scale
    expected = unpacked(format, blocks)
    if np.isfinite(scale):
        assert_same_bits(expected, reference(format, blocks))
    calls, original = [], torch.native_batch_norm
    monkeypatch.setattr(
        torch, "native_batch_norm", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    values = unpacked(format, blocks, torch.float16)
    assert torch.equal(values.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert_same_bits(values[numbers], expected.half()[numbers])
    assert bool(calls) == (0 < scale < np.inf), "whether the quick way was taken"


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "TQ1_0", "TQ2_0"])
def test_where_torch_cannot_scale_rows_the_values_are_the_same(name, small_chunks, monkeypatch):
    blocks = ggml_blocks.random_blocks(FORMATS[name], 14 * 14 + 3, "edge")
    quick = unpacked(FORMATS[name], blocks, torch.float16)
    monkeypatch.setattr(torch, "native_batch_norm", _not_implemented)
    monkeypatch.setattr(unpack_cpu, "can_scale_rows", unpack_cpu.can_scale_rows.__wrapped__)
    assert not unpack_cpu.can_scale_rows()
    assert_same_bits(unpacked(FORMATS[name], blocks, torch.float16), quick)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K", "TQ1_0", "TQ2_0"])
def test_where_torch_scales_rows_less_precisely_it_is_not_asked_to(name, small_chunks, monkeypatch):
    blocks = ggml_blocks.random_blocks(FORMATS[name], 14 * 14 + 3, "edge")
    quick = unpacked(FORMATS[name], blocks, torch.float16)
    original = torch.native_batch_norm

    def less_precisely(rows, scale, *rest, out):
        original(rows, scale * 1.0001, *rest, out=out)

    monkeypatch.setattr(torch, "native_batch_norm", less_precisely)
    monkeypatch.setattr(unpack_cpu, "can_scale_rows", unpack_cpu.can_scale_rows.__wrapped__)
    assert not unpack_cpu.can_scale_rows()
    assert_same_bits(unpacked(FORMATS[name], blocks, torch.float16), quick)


@pytest.mark.parametrize("name", ["Q4_K", "Q5_K"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_is_of_no_account(name, dtype, small_chunks, monkeypatch):
    """Other programs set it while they make a model."""
    blocks = ggml_blocks.random_blocks(FORMATS[name], 14 * 14 + 3, "any")
    expected = unpacked(FORMATS[name], blocks, torch.float16)
    monkeypatch.setattr(unpack_cpu, "can_scale_rows", unpack_cpu.can_scale_rows.__wrapped__)
    calls, original = [], torch.native_batch_norm
    monkeypatch.setattr(
        torch, "native_batch_norm", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    torch.set_default_dtype(dtype)
    try:
        values = unpacked(FORMATS[name], blocks, torch.float16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_bits(values, expected)
    assert len(calls) > 2, "the slower way was taken"


def _not_implemented(*args, **kwargs):
    raise RuntimeError("\"batch_norm\" not implemented for 'Half'")
