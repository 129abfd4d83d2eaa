"""Homes: where masters are is read off the storage; what cannot be had steps down, with a message."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys

import pytest
import swap_models as sm
import torch
from gguf_writer import Tensor, gguf_bytes

from lib_qswap.quant.gguf_file import GGUFError, MappedFile, open_gguf
from lib_qswap.swap import arena, copier
from lib_qswap.swap import device as devices
from lib_qswap.swap import home as homes
from lib_qswap.swap import ram as rams
from lib_qswap.swap.arena import HostBuffer
from lib_qswap.swap.device import device_of
from lib_qswap.swap.execute import gather_rows
from lib_qswap.swap.home import PinBudget
from lib_qswap.swap.manager import attach, attached

pytestmark = [pytest.mark.simgpu, pytest.mark.usefixtures("engine")]

GPU = "simgpu"
F32 = {"compute_dtype": torch.float32}


def kinds(attachment):
    return [layer.home.kind for layer in attachment.layers]


def test_the_kind_of_a_home_is_what_its_storage_is(sim, tmp_path):
    model = sm.build(file=tmp_path / "model.gguf")
    with attached(model, device=GPU, location="shared", budget_bytes=0, **F32) as attachment:
        assert set(kinds(attachment)) == {"shared"}
        assert all(layer.home.payload.is_pinned() for layer in attachment.layers)
    with attached(model, device=GPU, location="cpu", budget_bytes=0, **F32) as attachment:
        assert set(kinds(attachment)) == {"cpu"}
        assert not any(layer.home.page_locked for layer in attachment.layers)
    with attached(model, device=GPU, location="disk", budget_bytes=0, **F32) as attachment:
        by_name = {layer.name: layer.home for layer in attachment.layers}
        assert {home.kind for name, home in by_name.items() if name.startswith("blocks")} == {"disk"}
        assert by_name["conv"].kind == "cpu", "it is in no file"
        assert all(home.payload is None for home in by_name.values())


def test_users_are_told_of_weights_without_a_file_where_they_are_many(sim, tmp_path, monkeypatch):
    model = sm.build(file=tmp_path / "model.gguf")
    for least_bytes, told in ((homes.WORTH_SAYING_BYTES, False), (1, True)):
        monkeypatch.setattr(homes, "WORTH_SAYING_BYTES", least_bytes)
        with attached(model, device=GPU, location="disk", budget_bytes=0, **F32):
            assert any("no file" in text for text in sm.messages()) == told


def test_a_location_chosen_later_moves_the_masters_and_keeps_the_result(sim, compute_mode, tmp_path):
    model = sm.build(file=tmp_path / "model.gguf")
    expected, before = sm.reference(model), sm.masters(model)
    with attached(model, device=GPU, location="shared", budget_bytes=0, **F32) as attachment:
        for location in ("disk", "cpu", "shared", "cpu", "disk", "shared"):
            attachment.configure(
                location=location, pin_budget_bytes=None, ring_bytes=None, arithmetic="exact"
            )
            attachment.rebalance(0)
            assert location in kinds(attachment)
            for _ in range(2):
                assert torch.equal(sm.run(model, GPU), expected)
    assert sm.masters(model) == before


def test_a_page_lock_that_is_refused_leaves_an_ordinary_home_and_says_so(sim, compute_mode):
    model = sm.build()
    expected = sm.reference(model)
    sim.fail_next_pinned(1)
    with attached(model, device=GPU, location="shared", budget_bytes=0, **F32) as attachment:
        assert set(kinds(attachment)) == {"cpu"}
        assert attachment.state.copier.staged
        assert any("page-locked" in text and "choose CPU" in text for text in sm.messages())
        sim.synchronize()  # The error that the refusal left behind is nobody else's.
        for _ in range(2):
            assert torch.equal(sm.run(model, GPU), expected)


def test_the_systems_own_limit_on_page_locking_is_a_step_down(sim, compute_mode, monkeypatch):
    """What does not get in alternates over the execution order with what does, and is not asked for again."""
    monkeypatch.setattr(arena, "CHUNK_BYTES", 600_000)
    monkeypatch.setattr(copier, "STAGING_BUFFER_BYTES", 4096)
    model = sm.build(6)
    expected = sm.reference(model)
    sim.set_pin_limit(1_800_000)
    with attached(model, device=GPU, location="shared", budget_bytes=0, **F32) as attachment:
        found = kinds(attachment)
        assert 3 <= found.count("cpu") == len(found) - found.count("shared") <= 9
        for half in (found[:6], found[-6:]):
            assert set(half) == {"shared", "cpu"}
        assert sim.stats()["registered_bytes"] == attachment.state.pin_budget.used_bytes <= 1_800_000
        assert attachment.state.copier.staging_locked_bytes == copier.staging_buffers() * 4096
        for _ in range(2):
            assert torch.equal(sm.run(model, GPU), expected)
        masters = [layer.home for layer in attachment.layers]
        attachment.rebalance(1 << 20)
        assert [layer.home for layer in attachment.layers] == masters
        assert torch.equal(sm.run(model, GPU), expected)
    # Another model asks again: there may be room by now.
    sim.set_pin_limit()
    with attached(sm.build(), device=GPU, location="shared", budget_bytes=0, **F32) as attachment:
        assert set(kinds(attachment)) == {"shared"}


@pytest.mark.parametrize("location", ["shared", "auto"])
def test_a_smaller_page_lock_budget_is_kept_by_giving_back_whole_arenas(
    sim, compute_mode, monkeypatch, tmp_path, location
):
    monkeypatch.setattr(arena, "CHUNK_BYTES", 600_000)
    monkeypatch.setattr(copier, "STAGING_BUFFER_BYTES", 4096)
    model = sm.build(6, file=tmp_path / "model.gguf")
    expected = sm.reference(model)
    options = {"location": location, "ring_bytes": None, "arithmetic": "exact"}
    with attached(model, device=GPU, location=location, budget_bytes=0, **F32) as attachment:
        assert set(kinds(attachment)) == {"shared"}
        attachment.rebalance(4 << 20)  # Some are resident: theirs may have to go, too.
        limit = attachment.state.pin_budget.used_bytes // 2
        attachment.configure(pin_budget_bytes=limit, **options)
        attachment.rebalance(4 << 20)
        attachment.rebalance(0)
        held = attachment.state.pin_budget.used_bytes
        assert sim.stats()["registered_bytes"] == held <= limit
        assert held > limit // 3
        for half in (kinds(attachment)[:6], kinds(attachment)[-6:]):
            assert "shared" in half
            assert set(half) - {"shared"}
        locked = [layer for layer in attachment.layers if layer.home.page_locked]
        homes_before = [layer.home for layer in locked]
        for budget in (4 << 20, 0):
            attachment.rebalance(budget)
            assert torch.equal(sm.run(model, GPU), expected)
            assert [layer.home for layer in locked] == homes_before
        attachment.configure(pin_budget_bytes=None, **options)
        attachment.rebalance(0)
        assert set(kinds(attachment)) == {"shared"}
        assert torch.equal(sm.run(model, GPU), expected)


def test_ram_that_is_page_locked_or_no_more_stays_where_it_is(sim, compute_mode, tmp_path):
    model = sm.build(file=tmp_path / "model.gguf")
    expected = sm.reference(model)
    options = {"ring_bytes": None, "arithmetic": "exact", "pin_budget_bytes": None}
    with attached(model, device=GPU, location="shared", budget_bytes=0, **F32) as attachment:

        def addresses():
            weights = [parameter for parameter in model.parameters() if parameter.device.type == "cpu"]
            masters = [layer.home.payload.data_ptr() for layer in attachment.layers]
            return masters, [getattr(weight, "packed", weight).data_ptr() for weight in weights]

        before = addresses()
        for location in ("cpu", "shared", "cpu"):
            attachment.configure(location=location, **options)
            attachment.rebalance(0)
            assert set(kinds(attachment)) == {location}
            assert addresses() == before
            assert all(layer.home.page_locked == (location == "shared") for layer in attachment.layers)
            assert sim.stats()["registered_bytes"] == attachment.state.pin_budget.used_bytes
            assert torch.equal(sm.run(model, GPU), expected)


def test_ram_that_cannot_be_page_locked_where_it_is_is_not_copied_for_it(sim, monkeypatch):
    model = sm.build()
    expected = sm.reference(model)
    with attached(model, device=GPU, location="shared", budget_bytes=0, **F32) as attachment:
        options = {"pin_budget_bytes": None, "ring_bytes": None, "arithmetic": "exact"}
        attachment.configure(location="cpu", **options)
        attachment.rebalance(0)
        masters = [layer.home.payload.data_ptr() for layer in attachment.layers]
        monkeypatch.setattr(devices.Device, "register", lambda _device, _buffer: "the system refuses")
        attachment.configure(location="shared", **options)
        attachment.rebalance(0)
        assert [layer.home.payload.data_ptr() for layer in attachment.layers] == masters
        assert set(kinds(attachment)) == {"cpu"}
        assert any("the system refuses" in text for text in sm.messages())
        assert torch.equal(sm.run(model, GPU), expected)


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
def test_a_file_that_a_container_has_in_its_cache_takes_no_ram_away(tmp_path, monkeypatch):
    files = {
        "memory.max": "3000000",
        "memory.current": "2500000",
        "memory.stat": "anon 400000\nfile 2100000\nactive_file 900000\ninactive_file 1100000\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(rams, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(rams, "OWN_GROUPS", tmp_path / "own")
    assert rams.available_ram_bytes() == 2_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert rams.available_ram_bytes() > 2_500_000


@pytest.mark.skipif(sys.platform != "linux", reason="control groups are Linux's")
@pytest.mark.parametrize(
    ("own", "folder", "limit", "used", "prefix"),
    [
        ("0::/user.slice/web.service\n", "", "memory.max", "memory.current", ""),
        (
            "4:cpu,memory:/user.slice/web.service\n0::/\n",
            "memory",
            "memory.limit_in_bytes",
            "memory.usage_in_bytes",
            "total_",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_the_narrowest_of_the_groups_around_a_process_counts(
    tmp_path, monkeypatch, own, folder, limit, used, prefix
):
    monkeypatch.setattr(rams, "CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(rams, "OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text(own)
    groups = {"user.slice": (5_000_000, 4_000_000), "user.slice/web.service": (8_000_000, 10)}
    for path, numbers in groups.items():
        group = tmp_path / folder / path
        group.mkdir(parents=True, exist_ok=True)
        for name, number in zip((limit, used), numbers, strict=True):
            (group / name).write_text(f"{number}\n")
        (group / "memory.stat").write_text(f"cache 7\n{prefix}inactive_file 600\n{prefix}active_file 50\n")
    assert rams.total_ram_bytes() == 5_000_000
    assert rams.available_ram_bytes() == 1_000_650
    # What limits nobody is a number as large as can be in version 1, and a word in version 2.
    for path in groups:
        (tmp_path / folder / path / limit).write_text("9223372036854771712\n" if folder else "max\n")
    assert rams.available_ram_bytes() > 5_000_000


def test_a_system_that_does_not_say_what_is_available_has_half_of_it(monkeypatch):
    names = {"SC_PHYS_PAGES": 1 << 20, "SC_PAGE_SIZE": 4096}  # macOS has no more of them

    def sysconf(name):
        if name not in names:
            raise ValueError("unrecognized configuration name")
        return names[name]

    def no_such_file(*_args, **_kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(rams.os, "sysconf", sysconf)
    monkeypatch.setattr(rams, "open", no_such_file, raising=False)
    assert rams.total_ram_bytes() == 4 << 30
    assert rams.available_ram_bytes() == 2 << 30


def test_ram_that_cannot_be_had_leaves_masters_where_they_are(sim, tmp_path, monkeypatch):
    model = sm.build(6, file=tmp_path / "model.gguf")
    expected = sm.reference(model)

    def refused(*_args, **_kwargs):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")  # Windows: its commit limit

    monkeypatch.setattr(HostBuffer, "__new__", refused)
    with pytest.raises(MemoryError, match="no 1 MB of RAM left"):
        HostBuffer.of(1 << 20)
    for location in ("shared", "cpu"):
        with attached(model, device=GPU, location=location, budget_bytes=0, **F32) as attachment:
            packed = {layer.home.kind for layer in attachment.layers if layer.name.startswith("blocks")}
            assert packed == {"disk"}
            assert any("of RAM left" in text for text in sm.messages())
            for _ in range(2):
                assert torch.equal(sm.run(model, GPU), expected)


def test_a_page_lock_budget_larger_than_what_is_left_of_ram_leaves_some_in_the_file(
    sim, tmp_path, monkeypatch
):
    model = sm.build(6, file=tmp_path / "model.gguf")
    expected = sm.reference(model)
    monkeypatch.setattr(homes, "available_ram_bytes", lambda: homes.RAM_RESERVE_BYTES + 900_000)
    with attached(
        model, device=GPU, location="shared", budget_bytes=0, pin_budget_bytes=1 << 30, **F32
    ) as attachment:
        packed = [layer for layer in attachment.layers if layer.name.startswith("blocks")]
        assert {layer.home.kind for layer in packed} == {"shared", "disk"}
        assert sum(layer.payload_bytes for layer in packed if layer.home.kind == "shared") <= 900_000
        for _ in range(2):
            assert torch.equal(sm.run(model, GPU), expected)


def test_staging_of_torchs_allocator_is_counted_as_long_as_it_is_there(sim, tmp_path, monkeypatch):
    monkeypatch.setattr(devices.Device, "can_register", property(lambda _self: False))
    monkeypatch.setattr(copier, "STAGING_BUFFER_BYTES", 64 << 10)
    model = sm.build(file=tmp_path / "model.gguf")
    with attached(model, device=GPU, location="cpu", budget_bytes=0, **F32) as attachment:
        budget, staging = attachment.state.pin_budget, copier.staging_buffers() * (64 << 10)
        assert attachment.state.copier.staging_locked_bytes == staging
        assert budget.used_bytes == staging
    assert budget.used_bytes == 0


def test_the_automatic_page_lock_budget_counts_what_is_locked_already(sim, monkeypatch):
    gb = 1 << 30
    ram = {"total": 64 * gb, "available": 50 * gb}
    monkeypatch.setattr(homes, "total_ram_bytes", lambda: ram["total"])
    monkeypatch.setattr(homes, "available_ram_bytes", lambda: ram["available"])
    budget = homes.default_pin_budget_bytes
    assert budget() == int(0.6 * 64 * gb)
    ram["available"] = 30 * gb
    assert budget() == 26 * gb
    # 10 GB of what is no longer available are page-locked by QSwap: no more and no less than before.
    ram["available"] = 20 * gb
    assert budget(10 * gb) == 26 * gb
    ram["available"] = 50 * gb
    assert budget(10 * gb) == int(0.6 * 64 * gb)
    ram["available"] = 3 * gb
    assert budget() == 0
    monkeypatch.setattr(homes.sys, "platform", "win32")
    assert budget() == budget(10 * gb) == int(0.4 * 64 * gb)


def test_a_small_page_lock_budget_is_spread_over_the_order_of_execution(sim, monkeypatch):
    monkeypatch.setattr(copier, "STAGING_BUFFER_BYTES", 64 << 10)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(256, 256) for _ in range(16))).requires_grad_(False)
    layer_bytes = 256 * 256 * 4 + 1024
    limit = 8 * layer_bytes + copier.staging_buffers() * copier.STAGING_BUFFER_BYTES
    with attached(model, device=GPU, location="shared", budget_bytes=0, pin_budget_bytes=limit) as attachment:
        found = kinds(attachment)
        assert found.count("shared") == 8
        for start in range(0, 16, 4):
            assert found[start : start + 4].count("shared") == 2
        assert attachment.state.pin_budget.used_bytes == limit
        assert any("page-lock budget" in text for text in sm.messages())


def test_without_any_page_locked_memory_everything_still_works(sim, compute_mode, tmp_path):
    model = sm.build(file=tmp_path / "model.gguf")
    expected = sm.reference(model)
    for location in ("shared", "cpu", "disk"):
        with attached(
            model, device=GPU, location=location, budget_bytes=0, pin_budget_bytes=0, **F32
        ) as attachment:
            assert "shared" not in kinds(attachment)
            assert attachment.state.copier.staging_locked_bytes == 0
            assert sim.stats()["registered_bytes"] == 0
            for _ in range(2):
                assert torch.equal(sm.run(model, GPU), expected)


def test_a_page_lock_budget_is_for_one_attachment_and_not_for_the_next(sim):
    model = sm.build()
    with attached(model, device=GPU, location="shared", budget_bytes=0, pin_budget_bytes=0, **F32) as one:
        assert set(kinds(one)) == {"cpu"}
    with attached(model, device=GPU, location="shared", budget_bytes=0, **F32) as two:
        assert set(kinds(two)) == {"shared"}


def test_page_locked_memory_is_counted_and_given_back():
    device = device_of(GPU)
    budget = PinBudget(5000)
    buffer = HostBuffer.of(4096)
    memory = torch.frombuffer(buffer, dtype=torch.uint8)
    assert buffer.lock(device, budget, memory) is None
    assert memory.is_pinned()
    assert (budget.used_bytes, budget.left_bytes) == (4096, 904)
    second = HostBuffer.of(4096)
    assert "budget" in second.lock(device, budget, torch.frombuffer(second, dtype=torch.uint8))
    assert budget.used_bytes == 4096
    del buffer
    assert budget.used_bytes == 4096, "a view still reads it"
    del memory
    assert budget.used_bytes == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc keeps freed memory like this")
def test_memory_that_was_freed_is_given_back_to_the_system():
    code = """if True:
        import ctypes
        from lib_qswap.swap.ram import give_back_freed_ram

        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

        def resident_mb():
            with open("/proc/self/statm") as file:
                return int(file.read().split()[1]) * 4096 >> 20

        def take():
            blocks = [libc.malloc(1 << 20) for _ in range(200)]
            for block in blocks:
                ctypes.memset(block, 1, 1 << 20)
            return blocks

        for block in take():  # from now on blocks of that size come from the heap
            libc.free(block)
        blocks = take()
        for block in blocks[:-1]:
            libc.free(block)
        kept = resident_mb()
        give_back_freed_ram()
        print(kept - resident_mb())
    """
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=600
    )
    assert int(done.stdout) > 150


def test_ram_that_is_short_sends_masters_to_the_file(sim, compute_mode, tmp_path, monkeypatch):
    model = sm.build(6, file=tmp_path / "model.gguf")
    expected = sm.reference(model)
    monkeypatch.setattr(homes, "available_ram_bytes", lambda: homes.RAM_RESERVE_BYTES + 900_000)
    with attached(model, device=GPU, location="cpu", budget_bytes=0, **F32) as attachment:
        packed = [layer.home.kind for layer in attachment.layers if layer.name.startswith("blocks")]
        assert set(packed) == {"cpu", "disk"}
        assert any("RAM" in text for text in sm.messages())
        for _ in range(2):
            assert torch.equal(sm.run(model, GPU), expected)


# ---------------------------------------------------------------------------------------- files that go bad
@pytest.mark.parametrize("device", [GPU, "cpu"])
def test_a_file_that_shrank_is_an_error_that_names_it_and_once_restored_all_is_well(sim, tmp_path, device):
    path = tmp_path / "model.gguf"
    model = sm.build(file=path)
    expected = sm.reference(model)
    with attached(model, device=device, location="disk", budget_bytes=0, **F32) as attachment:
        assert torch.equal(sm.run(model, device), expected)
        whole = path.read_bytes()
        # The map must not be read meanwhile: that is the signal that homes are there to avoid.
        os.truncate(path, len(whole) - 500_000)
        try:
            for _ in range(2):
                with pytest.raises((GGUFError, OSError), match=r"model\.gguf"):
                    sm.run(model, device)
        finally:
            with open(path, "r+b") as file:
                file.write(whole)
        for _ in range(2):
            assert torch.equal(sm.run(model, device), expected)
        assert attachment.state.copier.staged


@pytest.mark.parametrize("device", [GPU, "cpu"])
def test_a_file_that_cannot_be_read_is_an_error_that_names_it_and_once_it_can_all_is_well(
    sim, tmp_path, monkeypatch, device
):
    model = sm.build(file=tmp_path / "model.gguf")
    expected = sm.reference(model)
    with attached(model, device=device, location="disk", budget_bytes=0, **F32):
        assert torch.equal(sm.run(model, device), expected)
        with monkeypatch.context() as broken:
            broken.setattr(MappedFile, "_read_once", _unreadable)
            for _ in range(2):
                with pytest.raises(OSError, match=rf"{os.strerror(errno.EIO)}.*model\.gguf"):
                    sm.run(model, device)
        for _ in range(2):
            assert torch.equal(sm.run(model, device), expected)


def test_rows_of_an_embedding_come_by_reads_from_its_file(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    packed = sm.packed_bytes("Q8_0", (500, 64), 1)
    path.write_bytes(gguf_bytes([Tensor("embed", (500, 64), "Q8_0", packed)]))
    weight = open_gguf(path)["embed"]
    indices = torch.tensor([[7, 0, 499], [7, 7, 3]])
    rows = gather_rows(weight, indices, torch.float32)
    assert torch.equal(rows, weight.dequantize(torch.float32)[indices])
    assert torch.equal(gather_rows(weight.clone(), indices, torch.float32), rows)
    monkeypatch.setattr(MappedFile, "_read_once", _unreadable)
    with pytest.raises(OSError, match=r"model\.gguf"):
        gather_rows(weight, indices, torch.float32)


def _unreadable(file, offset, buffer):
    """What a disk answers that was pulled out, or a network share that is gone."""
    raise OSError(errno.EIO, os.strerror(errno.EIO))


# In a process of its own: a read through the map would end it.
SHRINKING = """
import os, sys
from pathlib import Path
import swap_models as sm
import torch
from gguf_writer import Tensor, gguf_bytes
from lib_qswap.quant.gguf_file import GGUFError, MappedFile, open_gguf
from lib_qswap.swap.manager import attached

path, location = Path(sys.argv[1]), sys.argv[2]
model = sm.build(file=path)
expected = sm.reference(model)
whole = path.read_bytes()
with attached(model, device="cpu", location=location, budget_bytes=0, compute_dtype=torch.float32):
    assert torch.equal(sm.run(model, "cpu"), expected)
    hook = model.blocks[1].register_forward_pre_hook(lambda *_: os.truncate(path, 0))
    for attempt in range(2):
        try:
            assert torch.equal(sm.run(model, "cpu"), expected)
            print("ran")
        except (GGUFError, OSError) as error:
            assert str(path) in str(error)
            print("refused")
    hook.remove()
    path.write_bytes(whole)
    for _ in range(2):
        assert torch.equal(sm.run(model, "cpu"), expected)
"""


@pytest.mark.parametrize("location", sm.LOCATIONS)
def test_a_file_that_shrinks_to_nothing_during_a_forward_does_not_end_the_process(tmp_path, location):
    tests = os.path.dirname(__file__)
    paths = os.pathsep.join([tests, os.path.dirname(tests), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, "-c", SHRINKING, os.fspath(tmp_path / "model.gguf"), location],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, f"{result.returncode}: {result.stderr}"
    outcomes = result.stdout.split()
    assert len(outcomes) == 2
    if location == "disk":
        assert outcomes == ["refused"] * 2


def test_a_file_that_shrank_before_the_model_is_attached_leaves_the_model_as_it_was(sim, tmp_path):
    path = tmp_path / "model.gguf"
    model = sm.build(file=path)
    parameters = dict(model.named_parameters())
    whole = path.read_bytes()
    os.truncate(path, len(whole) - 500_000)
    try:
        with pytest.raises((GGUFError, OSError), match=r"model\.gguf"):
            attach(model, device=GPU, location="cpu", budget_bytes=0, **F32)
    finally:
        with open(path, "r+b") as file:
            file.write(whole)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert {name: value.device.type for name, value in model.named_parameters()} == dict.fromkeys(
        parameters, "cpu"
    )
    assert sim.memory_allocated() == 0
    with attached(model, device=GPU, location="cpu", budget_bytes=0, **F32):
        sm.run(model, GPU)


def test_an_unmerged_change_of_weights_finds_the_old_home_again(sim, compute_mode):
    """What a host does that merges a LoRA and takes it back: other tensors, then the first ones."""
    model = sm.build()
    expected = sm.reference(model)
    with attached(model, device=GPU, location="shared", budget_bytes=0, **F32) as attachment:
        sm.run(model, GPU)
        layer = next(layer for layer in attachment.layers if layer.name == "blocks.1.up")
        linear, home = model.blocks[1].up, layer.home
        first = linear.weight
        with attachment.masters_bound():
            merged = first.detach().dequantize(torch.float32) * 1.5
            linear.weight = torch.nn.Parameter(merged, requires_grad=False)
        attachment.rebalance(0)
        changed = sm.run(model, GPU)
        assert not torch.equal(changed, expected)
        assert torch.equal(sm.run(model, GPU), changed)
        assert next(lay for lay in attachment.layers if lay.name == "blocks.1.up").quant == "float32"
        with attachment.masters_bound():
            linear.weight = torch.nn.Parameter(home.tensor(layer.first[0][0]), requires_grad=False)
        attachment.rebalance(0)
        assert layer.home is home
        for _ in range(2):
            assert torch.equal(sm.run(model, GPU), expected)
