"""RAM that opening a model, and each swap location, adds, beside the payload; and how long they take.

    python benchmarks/host_memory.py [--hidden 1792] [--quant Q4_K] [--json FILE]

The file (2 GB at hidden size 1792) is written into a temporary folder. Each location runs in a process of its
own on the simulated accelerator, with nothing resident. Memory is anonymous (RssAnon), but for all that
opening takes (VmRSS). Times are taken with the file in the system's cache, those of placing on the clock of
the processor; page-locking costs nothing on the simulated device. Linux only: it reads /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1] / "tests"
LOCATIONS = ("shared", "cpu", "disk")
OPENINGS = 5


def status_bytes(field: str) -> int:
    """A field of this process's status, such as RssAnon."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def measure(path: Path, location: str) -> dict[str, float]:
    """In a process of its own: what opening adds, and what placing at `location` adds to that."""
    sys.path.insert(0, str(TESTS))
    import simgpu
    import torch

    from lib_qswap.quant.gguf_file import open_gguf
    from lib_qswap.standalone.flux import build
    from lib_qswap.swap.manager import attach

    torch.empty(1, device="simgpu")
    before, whole_before = status_bytes("RssAnon"), status_bytes("VmRSS")
    file = open_gguf(path)
    weights = dict(file.items())
    opened, whole_opened = status_bytes("RssAnon"), status_bytes("VmRSS")
    del weights
    openings = []
    for _ in range(OPENINGS):
        begun = time.perf_counter()
        open_gguf(path)
        openings.append(time.perf_counter() - begun)
    model = build(file, str(path), dtype=torch.bfloat16)
    built = status_bytes("RssAnon")
    device_bytes, begun = simgpu.memory_allocated(), time.process_time()
    attachment = attach(
        model, device="simgpu", location=location, budget_bytes=0, compute_dtype=torch.bfloat16
    )
    placing_s = time.process_time() - begun
    # The simulated device's memory is this machine's RAM, too.
    placed = status_bytes("RssAnon") - (simgpu.memory_allocated() - device_bytes)
    return {
        "payload_bytes": attachment.payload_bytes,
        "opened_bytes": opened - before,
        "opened_rss_bytes": whole_opened - whole_before,
        "open_s": min(openings),
        "placing_processor_s": placing_s,
        "placed_bytes": placed - built,
        "page_locked_bytes": simgpu.stats()["registered_bytes"],
        "page_locked_layers": sum(layer.home.page_locked for layer in attachment.layers),
        "layers": len(attachment.layers),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=1792)
    parser.add_argument("--quant", default="Q4_K")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(Path(arguments.measure[0]), arguments.measure[1])))
        return
    from lib_qswap.standalone.demo_file import make_demo_file

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        make_demo_file(path, arguments.quant, hidden=arguments.hidden)
        print(f"file {path.stat().st_size / 1e9:.2f} GB")
        results = {}
        for location in LOCATIONS:
            command = [sys.executable, __file__, "--measure", str(path), location]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            results[location] = result
            share = result["placed_bytes"] / result["payload_bytes"]
            print(
                f"{location:<7} opening takes {result['open_s'] * 1e3:.1f} ms and adds "
                f"{result['opened_rss_bytes'] / 1e6:.1f} MB, placing "
                f"{result['placing_processor_s']:.2f} s and {result['placed_bytes'] / 1e6:.1f} MB = "
                f"{share:.4f} of the payload; page-locked {result['page_locked_bytes'] / 1e6:.1f} MB, "
                f"{result['page_locked_layers']} of {result['layers']} layers"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
