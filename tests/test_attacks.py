"""Hostile files end in a GGUFError that names the fault, at once and in little memory; odd ones are read."""

import os
import sys
import tracemalloc
from pathlib import Path

import pytest
from attacks import ATTACKS
from machine_speed import comparable_seconds

from lib_qswap import cli
from lib_qswap.quant.gguf_file import GGUFError, open_gguf
from lib_qswap.quant.inspect import inspect_file

# Python 3.10 takes a fifth longer for the same loops.
LIMIT_S = 0.1 if sys.version_info >= (3, 11) else 0.15
LIMIT_BYTES = 50 << 20

HOSTILE = [attack for attack in ATTACKS if attack.refused]
ODD = [attack for attack in ATTACKS if not attack.refused]

# With this scope, all tests of one attack run before the next one is written.
hostile = pytest.mark.parametrize("attack", HOSTILE, ids=[attack.name for attack in HOSTILE], scope="module")
odd = pytest.mark.parametrize("attack", ODD, ids=[attack.name for attack in ODD], scope="module")


@pytest.fixture(scope="module")
def path(attack, tmp_path_factory):
    """The attack's file; removed at once, because some are large."""
    path = attack.write(tmp_path_factory.mktemp(attack.name[:30]))
    yield path
    if path.is_file():
        path.unlink()


def test_every_attack_has_a_name_of_its_own():
    names = [attack.name for attack in ATTACKS]
    assert len(set(names)) == len(names) > 100


@hostile
def test_a_hostile_file_is_refused_in_one_line_that_names_the_fault(attack, path, capsys):
    with pytest.raises(GGUFError) as caught:
        open_gguf(path)
    message = str(caught.value)
    assert attack.says in message
    assert message.isprintable()
    # A part that is at fault is named instead of the first.
    assert os.fspath(path.parent) in message
    assert len(message) - len(os.fspath(path)) < 300

    assert cli.main(["inspect", os.fspath(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == f"qswap: {' '.join(message.split())}\n"


@pytest.mark.flaky(reruns=3, reruns_delay=1)
@hostile
def test_a_hostile_file_costs_a_tenth_of_a_second_at_most(attack, path):
    def refused():
        with pytest.raises(GGUFError):
            open_gguf(path)

    assert min(comparable_seconds(refused) for _ in range(3)) < LIMIT_S


@hostile
def test_a_hostile_file_costs_50_megabytes_at_most(attack, path):
    tracemalloc.start()
    try:
        with pytest.raises(GGUFError):
            open_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < LIMIT_BYTES
    finally:
        tracemalloc.stop()
    if os.access("/proc/self/clear_refs", os.W_OK):  # Linux
        assert _resident_growth(path) < LIMIT_BYTES


def _resident_growth(path):
    """Bytes by which the peak of this process's resident memory exceeds what it was before."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident
    before = _resident_peak()
    with pytest.raises(GGUFError):
        open_gguf(path)
    return _resident_peak() - before


def _resident_peak():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line)
    return int(line.split()[1]) << 10


@odd
def test_an_odd_file_is_listed(attack, path, capsys):
    for name, tensor in open_gguf(path).items():
        assert tensor.packed.nbytes == tensor.source.nbytes, name
    assert inspect_file(path)["version"] in (2, 3)
    assert cli.main(["inspect", os.fspath(path)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert attack.says in out
    assert out.replace("\n", "").isprintable()
