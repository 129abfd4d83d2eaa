"""The `qswap` command.

Each command imports what it needs when it runs, so that `qswap --help` is immediate and `qswap inspect` needs
no Gradio. What a user can get wrong (arguments, files) ends with one line on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from lib_qswap import __version__

if TYPE_CHECKING:
    import torch

    from lib_qswap.standalone.budget import Budget
    from lib_qswap.standalone.host import Settings, StandaloneHost

LOCATIONS = ("auto", "gpu", "shared", "cpu", "disk")
BENCHMARKS = ("dequant", "load", "step", "all")
# Names without importing what makes them; a test holds this against `demo_file.QUANTS`.
DEMO_QUANTS = (
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
    "F16",
)
DEVICES = "auto (default), cpu, cuda, xpu, mps, or another that torch knows"
DEFAULT_STEPS = 4
DEFAULT_PIXELS, DEFAULT_PIXELS_ON_CPU = 256, 128


class UsageError(Exception):
    """What the user can mend, as one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, where argparse would print the usage as well."""
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        return run_command(arguments)
    except KeyboardInterrupt:  # at any moment: importing torch alone takes seconds
        print("stopped", file=sys.stderr)
        return 130


def run_command(arguments: Sequence[str] | None) -> int:
    parsed = build_parser().parse_args(arguments)
    # On the CPU, threads that spin while they wait for the next product take the cores from those that still
    # compute: ten times slower where anything else runs. OpenMP reads this once, when torch is imported.
    # Unpacking alone is many short operations, and measured as a web UI runs it, with threads that spin.
    if getattr(parsed, "what", None) != "dequant":
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from torch.cuda import OutOfMemoryError  # of every device, by the name that torch 2.3 has as well
    except ModuleNotFoundError as error:
        lacks = str(error.name).partition(".")[0]
        print(
            f"qswap: {sys.executable} has no {lacks}: take the Python that the web UI runs on (`venv` in its "
            "folder, or `system\\python` beside it)",
            file=sys.stderr,
        )
        return 2

    from lib_qswap import GGUFError
    from lib_qswap.panel.report import printable

    try:
        code = parsed.command(parsed)
        print(end="", flush=True)  # A closed pipe shows here, not when Python ends.
        return code
    except (UsageError, GGUFError) as error:
        message = str(error)
    except OutOfMemoryError as error:
        message = f"the device has no room even for the smallest budget: {error}"
    except BrokenPipeError:  # Whoever reads the output has seen enough, as `head` has.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python would flush into the pipe at exit.
        return 0
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
    print(f"qswap: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


def build_parser() -> Parser:
    parser = Parser(
        prog="qswap", description="Run quantized diffusion models that do not fit into GPU memory."
    )
    parser.add_argument("--version", action="version", version=f"qswap {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str, *, json_help: str = "print JSON instead of text") -> Parser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=run)
        sub.add_argument("--json", action="store_true", help=json_help)
        return sub

    sub = command("inspect", inspect, "What is in a GGUF or safetensors file: tensors, types, problems.")
    sub.add_argument("file", type=file_name, help="a .gguf or .safetensors file")

    with_page = "print JSON instead of text; with the page, its address alone"
    text = "Make a Flux-shaped model of random weights once, run it, show the panel."
    sub = command("demo", demo, text, json_help=with_page)
    sub.add_argument("--quant", default="Q4_K", choices=DEMO_QUANTS, help="type of its blocks (default Q4_K)")
    add_run_arguments(sub)

    sub = command("run", run, "Run a Flux-family GGUF file, show the panel.", json_help=with_page)
    sub.add_argument("file", type=file_name, help="a .gguf file")
    add_run_arguments(sub)

    sub = command("plan", plan, "Which layers a budget keeps resident, and how long a step then takes.")
    sub.add_argument(
        "--profile",
        type=Path,
        required=True,
        metavar="P.json",
        help="layers and link, or a saved /qswap/v1/residency",
    )
    sub.add_argument(
        "--budget",
        type=budget,
        required=True,
        help="for resident layers and the transfer buffer: share of the layers' bytes, or bytes: 40%%, 512MB",
    )

    sub = command("bench", bench, "Measure unpacking, loading and steps on this machine.")
    sub.add_argument(
        "what",
        choices=BENCHMARKS,
        help="unpacking weights, loading the demo model, its steps by location and budget, or all of them",
    )
    sub.add_argument("--quant", default="Q4_K", choices=DEMO_QUANTS, help="of the model, in load and step")
    sub.add_argument("--device", default="auto", help=DEVICES)
    sub.add_argument(
        "--location", type=str.lower, choices=LOCATIONS[2:], help="for step: one of them (default all)"
    )
    sub.add_argument("--types", type=lambda text: text.split(","), metavar="Q4_K,Q6_K", help="for dequant")
    sub.add_argument("--comfyui-gguf", type=Path, metavar="DIR", help="for dequant: its checkout")
    sub.add_argument("--ggml", type=Path, metavar="FILE", help="for dequant: libggml-base of llama.cpp")

    sub = command("doctor", doctor, "What this machine and a web UI offer QSwap.")
    sub.add_argument("--webui", type=Path, metavar="DIR", help="folder of a Stable Diffusion WebUI")
    return parser


def add_run_arguments(parser: Parser) -> None:
    add = parser.add_argument
    add("--headless", action="store_true", help="no page: print the summary and the residency table")
    add(
        "--location",
        default="auto",
        type=str.lower,
        choices=LOCATIONS,
        help="where weights wait that are not on the device (default auto)",
    )
    add(
        "--budget",
        type=budget,
        help="share of the model's bytes, or bytes: 25%%, 512MB, 2GB (default: what is free)",
    )
    add("--steps", type=positive, default=DEFAULT_STEPS, help=f"denoising steps (default {DEFAULT_STEPS})")
    add(
        "--size",
        type=positive,
        help=f"side of the image in pixels (default {DEFAULT_PIXELS}; on the CPU {DEFAULT_PIXELS_ON_CPU})",
    )
    add("--seed", type=seed, default=0, help="of the image's noise (default 0)")
    add("--arithmetic", default="exact", choices=("exact", "like-forge"), help="how weights are rounded")
    add("--device", default="auto", help=DEVICES)
    add("--port", type=port, default=7861, help="of the page (default 7861)")
    add("--open", action="store_true", help="open the page in the browser")


def file_name(text: str) -> Path:
    if not text:  # which Path takes for the current folder
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


def budget(text: str) -> Budget:
    from lib_qswap.standalone.budget import Budget

    try:
        return Budget.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of 1 or more")
    return int(text)


def seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text} is no seed: they go from 0 to 2**63 - 1")
    return number


def port(text: str) -> int:
    number = positive(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: ports end at 65535")
    return number


# -------------------------------------------------------------------------------- commands
def demo(arguments: argparse.Namespace) -> int:
    from lib_qswap.standalone.demo_file import demo_file
    from lib_qswap.standalone.headless import Progress

    device = usable_device(arguments)  # before the file is made, which takes its time
    settings = settings_for(device, arguments)
    path = demo_file(arguments.quant, on_progress=Progress("making the demo model"))
    return run_file(path, device, settings, arguments)


def run(arguments: argparse.Namespace) -> int:
    device = usable_device(arguments)
    return run_file(arguments.file, device, settings_for(device, arguments), arguments)


def usable_device(arguments: argparse.Namespace) -> torch.device:
    from lib_qswap.standalone.host import find_device

    try:
        return find_device(arguments.device)
    except ValueError as error:
        raise UsageError(str(error)) from None


def settings_for(device: torch.device, arguments: argparse.Namespace) -> Settings:
    from lib_qswap.standalone.denoise import check_size
    from lib_qswap.standalone.host import Settings

    pixels = arguments.size or (DEFAULT_PIXELS_ON_CPU if device.type == "cpu" else DEFAULT_PIXELS)
    try:
        check_size(pixels)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Settings(
        location=arguments.location,
        budget=arguments.budget,
        arithmetic="exact" if arguments.arithmetic == "exact" else "like Forge",
        steps=arguments.steps,
        pixels=pixels,
        seed=arguments.seed,
    )


def run_file(path: Path, device: torch.device, settings: Settings, arguments: argparse.Namespace) -> int:
    host = make_host(path, device, settings)
    if not arguments.headless:
        serve_page(host, arguments)
        return 0
    from lib_qswap.standalone.headless import report, run_headless

    try:
        summary, snapshot = run_headless(host)
    except FloatingPointError as error:
        raise UsageError(f"{path}: {error}") from None
    answer = {**summary.as_dict(), "messages": snapshot["messages"]}
    print_result(arguments, answer, report(path, summary, snapshot))
    return 0


def serve_page(host: StandaloneHost, arguments: argparse.Namespace) -> None:
    try:
        from lib_qswap.standalone.app import serve
    except ImportError as error:
        raise UsageError(
            f"the page needs {error.name}: use --headless, or, in an environment of its own, "
            "`pip install '.[demo]'`"
        ) from None

    def announce(url: str) -> None:
        text = json.dumps({"url": url}) if arguments.json else f"The page is at {url} (Ctrl-C ends it)."
        print(text, flush=True)

    serve(host, port=arguments.port, open_browser=arguments.open, announce=announce)


def make_host(path: Path, device: torch.device, settings: Settings) -> StandaloneHost:
    from lib_qswap.standalone.host import StandaloneHost

    try:
        return StandaloneHost(path, device, settings)
    except ValueError as error:
        raise UsageError(str(error)) from error


def inspect(arguments: argparse.Namespace) -> int:
    from lib_qswap.panel.report import printable
    from lib_qswap.quant.inspect import format_report, inspect_file

    found = inspect_file(arguments.file)
    print_result(arguments, found, "\n".join(map(printable, format_report(found).split("\n"))))
    return 0


def plan(arguments: argparse.Namespace) -> int:
    from lib_qswap.panel.report import printable
    from lib_qswap.profile_file import read_profile
    from lib_qswap.swap.planner import make_plan

    try:
        layers, link_bytes_per_s = read_profile(arguments.profile)
        total_bytes = sum(layer.nbytes for layer in layers)
        budget_bytes = arguments.budget.of(total_bytes)
        made = make_plan(layers, budget_bytes=budget_bytes, link_bytes_per_s=link_bytes_per_s)
    except ValueError as error:
        raise UsageError(f"{arguments.profile}: {error}") from None
    if made.budget_bytes > budget_bytes:
        largest = max(layers, key=lambda layer: layer.nbytes)
        raise UsageError(
            f"a budget of {budget_bytes:,} B is too small for any plan: the largest layer, {largest.name}, "
            f"takes {largest.nbytes:,} B, which is the least budget"
        )
    answer = {
        "resident": list(made.resident),
        "ring_bytes": made.ring_bytes,
        "step_s": made.step_s,
        "bound_s": made.bound_s,
    }
    kept = set(made.resident)
    resident_bytes = sum(layer.nbytes for layer in layers if layer.name in kept)
    swapped_bytes = total_bytes - resident_bytes
    text = [
        f"budget    {budget_bytes:,} of {total_bytes:,} B",
        f"resident  {len(made.resident)} of {len(layers)} layers, {resident_bytes:,} B",
        f"ring      {made.ring_bytes:,} B",
        f"swapped   {swapped_bytes:,} B per step, {swapped_bytes / link_bytes_per_s:.4f} s on the link",
        f"step      {made.step_s:.4f} s (bound {made.bound_s:.4f} s, the longer of compute and link)",
        *(f"  {printable(name)}" for name in made.resident),
    ]
    print_result(arguments, answer, "\n".join(text))
    return 0


def bench(arguments: argparse.Namespace) -> int:
    from lib_qswap.standalone import bench_dequant
    from lib_qswap.standalone.bench import Options, run_benchmarks

    names = BENCHMARKS[:-1] if arguments.what == "all" else (arguments.what,)
    types = arguments.types or bench_dequant.TYPES
    unknown = [name for name in types if name not in bench_dequant.TYPES]
    if unknown:
        raise UsageError(f"--types: {unknown[0]!r} is no type of blocks: {', '.join(bench_dequant.TYPES)}")
    device = usable_device(arguments)
    try:
        peers = bench_dequant.find_peers(arguments.comfyui_gguf, arguments.ggml, device)
    except ValueError as error:
        raise UsageError(str(error)) from None
    locations: Any = (arguments.location,) if arguments.location else LOCATIONS[2:]
    results, lines = run_benchmarks(names, Options(arguments.quant, locations, types, peers), device)
    print_result(arguments, results, "\n".join(lines))
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    from lib_qswap.doctor import examine

    try:
        findings = examine(arguments.webui)
    except ValueError as error:
        raise UsageError(str(error)) from None
    print_result(arguments, asdict(findings), "\n".join(findings.lines()))
    return 0 if findings.supported else 1


def print_result(arguments: argparse.Namespace, data: Any, text: str) -> None:
    print(json.dumps(data, indent=2) if arguments.json else text)
