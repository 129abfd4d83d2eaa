"""Which kernel unpacks: what the user chose, what the device has, and what has failed."""

from __future__ import annotations

import subprocess
import sys

import ggml_blocks
import pytest
import torch

from lib_qswap.quant import kernels, unpack_bnb, unpack_codebook, unpack_legacy
from lib_qswap.quant.formats import FORMATS
from lib_qswap.quant.unpack import unpack, unpack_with_torch

Q4_K = FORMATS["Q4_K"]


class FakeKernel:
    """Stands in for a Triton kernel, on the CPU.

    calls: after the first, by which it is checked. wrong: where its values are 1 too much.
    """

    alignment = 4

    def __init__(self, error: Exception | None = None, wrong: slice = slice(0), format=Q4_K) -> None:
        self.error, self.wrong, self.format = error, wrong, format
        self.calls = -1

    def unpack(self, packed, out, block_elements, dtype):
        self.calls += 1
        if self.error is not None:
            raise self.error
        unpack_with_torch(self.format, packed, out, dtype)
        out.view(-1)[self.wrong] += 1


@pytest.fixture
def told(monkeypatch):
    """What kernels report, with nothing chosen, nothing failed and nothing said before."""
    messages = []
    monkeypatch.setattr(kernels, "_choice", "Auto")
    monkeypatch.setattr(kernels, "_given_up", set())
    monkeypatch.setattr(kernels, "_checked", set())
    monkeypatch.setattr(kernels, "_listener", messages.append)
    kernels._say_once.cache_clear()
    yield messages
    kernels._say_once.cache_clear()


@pytest.fixture
def served(told, monkeypatch):
    """Triton serves the CPU; returns a function that puts a kernel there for every type."""
    monkeypatch.setattr(kernels, "why_not_triton", lambda device_type: None)

    def put(kernel):
        monkeypatch.setattr(kernels, "load", lambda format: kernel)
        return kernel

    return put


def some_blocks():
    return torch.from_numpy(ggml_blocks.random_blocks(Q4_K, 8, "ordinary"))


def unpacked(**how):
    return unpack(Q4_K, some_blocks(), torch.empty(8, 256, dtype=torch.float16), **how)


def test_triton_unpacks_where_it_serves_the_device(served):
    kernel = served(FakeKernel())
    unpacked()
    assert kernel.calls == 1
    assert kernels.in_use("cpu") == "Triton"
    kernels.choose("Triton")
    unpacked()
    assert kernel.calls == 2


@pytest.mark.parametrize("wrong", [slice(0, 1), slice(-1, None)], ids=["the first", "the last"])
def test_a_kernel_with_one_wrong_value_is_not_used(told, served, wrong):
    kernel = served(FakeKernel(wrong=wrong))
    expected = unpack_with_torch(Q4_K, some_blocks(), torch.empty(8, 256, dtype=torch.float16), torch.float32)
    for _ in range(2):
        assert torch.equal(unpacked(), expected)
    assert kernel.calls == 0
    assert len(told) == 1
    assert "its values are not those of PyTorch's operations" in told[0]


BLOCK_TYPES = [row for row in FORMATS.values() if row.unpack and row.dtype is None]


@pytest.mark.parametrize("format", BLOCK_TYPES, ids=lambda row: row.name)
def test_a_kernel_is_checked_on_the_cpu_whatever_the_default_device_is(told, served, format):
    kernel = served(FakeKernel(format=format))
    blocks = torch.from_numpy(ggml_blocks.random_blocks(format, 8, "ordinary"))
    expected = unpack_with_torch(format, blocks, torch.empty(8, format.block_elements), torch.float32)
    for cache in (unpack_codebook._pair_table, unpack_bnb._pair_table, unpack_legacy.bits_to_top):
        cache.cache_clear()  # Tables are made once.
    out = torch.empty(8, format.block_elements)
    torch.set_default_device("meta")
    torch.set_default_dtype(torch.float16)
    try:
        unpack(format, blocks, out)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert told == []
    assert kernel.calls == 1
    assert torch.equal(out, expected)


def test_running_out_of_memory_is_no_failure_of_the_kernel(told, served):
    served(FakeKernel(torch.cuda.OutOfMemoryError("full")))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        unpacked()
    kernel = served(FakeKernel())
    unpacked()
    assert told == []
    assert kernel.calls == 1


def test_blocks_at_another_kind_of_address_are_another_check(told, served):
    kernel = served(FakeKernel())
    blocks = some_blocks()
    buffer = torch.empty(blocks.numel() + 32, dtype=torch.uint8)
    for count, address in enumerate((0, 0, 4, 4), 1):
        start = (address - buffer.data_ptr()) % 16
        packed = buffer[start : start + blocks.numel()].view(blocks.shape).copy_(blocks)
        unpack(Q4_K, packed, torch.empty(8, 256))
        assert kernel.calls == count + (count > 2)


def test_torch_unpacks_where_the_user_chose_it(served):
    kernel = served(FakeKernel())
    kernels.choose("Torch")
    assert unpacked().unique().numel() > 2
    assert kernels.in_use("cpu") == "Torch"
    assert kernel.calls == -1


def test_both_arithmetics_are_the_kernels(served):
    kernel = served(FakeKernel())
    exact, like_forge = unpacked(), unpacked(arithmetic="like Forge")
    assert kernel.calls == 1 + 2, "each is checked"
    assert not torch.equal(exact, like_forge)


def test_a_kernel_that_fails_is_replaced_for_good_with_one_message(told, served):
    kernel = served(FakeKernel(RuntimeError("no C compiler\nand a traceback")))
    for _ in range(3):
        assert unpacked().unique().numel() > 2
    assert kernel.calls == 0
    assert len(told) == 1
    assert "Q4_K" in told[0]
    assert "RuntimeError: no C compiler" in told[0]
    assert "traceback" not in told[0]
    assert kernels.in_use("cpu") == "Triton, Torch for Q4_K"
    # Others go on.
    q8_0 = FORMATS["Q8_0"]
    other = served(FakeKernel(format=q8_0))
    unpack(q8_0, torch.from_numpy(ggml_blocks.random_blocks(q8_0, 8, "ordinary")), torch.empty(8, 32))
    assert other.calls == 1


def test_a_kernel_whose_module_cannot_be_imported_is_replaced_as_well(told, served, monkeypatch):
    def broken(format):
        raise ImportError("libtriton.so: wrong ELF class")

    monkeypatch.setattr(kernels, "load", broken)
    assert unpacked().isfinite().all()
    assert len(told) == 1
    assert "wrong ELF class" in told[0]


def test_a_type_without_a_kernel_is_torchs_and_no_failure(told, served):
    served(None)
    assert unpacked().isfinite().all()
    assert told == []
    assert kernels.in_use("cpu") == "Triton"


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_a_device_that_triton_does_not_serve_is_torchs_silently_unless_triton_was_chosen(told, device):
    assert kernels.in_use(device) == "Torch"
    unpacked()
    assert told == []
    kernels.choose("Triton")
    assert kernels.in_use(device) == "Torch"
    unpacked()
    unpacked()
    assert len(told) == 1
    assert "does not serve cpu" in told[0]


@pytest.mark.parametrize("broken", ["None", "types.SimpleNamespace(__version__='2.3.1')"])
def test_without_a_triton_that_is_new_enough_torch_unpacks_on_a_gpu(broken):
    code = (
        f"import sys, types; sys.modules['triton'] = {broken};"
        "from lib_qswap.quant import kernels; print(kernels.in_use('cuda'), kernels.why_not_triton('cuda'));"
        "print(kernels.could_be_faster('cuda')); print(kernels.could_be_faster('mps'));"
        "kernels.choose('Torch'); print(kernels.could_be_faster('cuda'))"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    why, hint, *others = answer.splitlines()
    assert why.startswith("Torch ")
    assert ("cannot be imported" in why) or ("2.3.1 is too old" in why)
    assert why.removeprefix("Torch ") in hint
    assert "Version 3.2 or newer is needed" in hint
    assert others == ["None", "None"], "nothing can be done on Metal, nor against the user's choice"


def test_importing_the_package_and_unpacking_on_the_cpu_does_not_import_triton():
    code = (
        "import sys, torch; before = 'triton' in sys.modules;"
        "from lib_qswap.quant.formats import FORMATS; from lib_qswap.quant.unpack import unpack;"
        "import lib_qswap.swap.manager;"
        "unpack(FORMATS['Q8_0'], torch.zeros(34, dtype=torch.uint8), torch.empty(32));"
        "assert ('triton' in sys.modules) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_page_shows_what_a_kernel_reports():
    code = (
        "from lib_qswap.swap import ledger; from lib_qswap.quant import kernels;"
        "kernels._say_once('Triton cannot unpack Q4_K here'); print(ledger.snapshot()['messages'])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Triton cannot unpack Q4_K here" in answer
    assert "'level': 'warning'" in answer


def test_every_ggml_type_of_blocks_that_torch_unpacks_has_a_triton_kernel():
    pytest.importorskip("triton")
    missing = [
        row.name
        for row in FORMATS.values()
        if row.unpack and row.dtype is None and row.ggml_id is not None and kernels.load(row) is None
    ]
    assert missing == []
    assert kernels.load(FORMATS["F16"]) is None
    assert kernels.load(FORMATS["I32"]) is None
