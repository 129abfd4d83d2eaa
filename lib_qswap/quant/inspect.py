"""The report behind `qswap inspect FILE`: what is in a GGUF or safetensors file, and what in it will make
trouble."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import model_kind, safetensors_header
from .gguf_file import GGUFFile, open_gguf
from .mapped_file import MappedFile

_VALUE_CHARACTERS = 200

# For one screen.
_LARGEST_SHOWN = 5
_METADATA_SHOWN = 12
_PROBLEMS_SHOWN = 8
_LINE_CHARACTERS = 100


def inspect_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in a GGUF or safetensors file, as plain data for JSON.

    Keys: `path`; `version` (of GGUF; None for safetensors, as the name tells); `what`, `use` (sentences: what
    the file is, and what to do with it in Forge); `files` (`path`, `bytes`; one, or each part of a split
    model), `file_bytes` (of all); `metadata` (the short values), `metadata_count` (of all); `tensor_count`,
    `parameters` (elements of all tensors), `packed_bytes` (of all tensors); `types` (for each type `type`,
    `tensors`, `parameters`, `bytes`; most bytes first); `tensors` (in the order of the file `name`, `type`,
    `shape` with rows first, `parameters`, `bytes`, `offset`, `part` from 1); `problems` (sentences).

    Raises GGUFError for a file that cannot be opened at all.
    """
    if os.fsdecode(path).lower().endswith(".safetensors"):
        mapped = MappedFile(path)
        metadata, stored = safetensors_header.read_header(mapped)
        described = [{**tensor._asdict(), "part": 1} for tensor in stored]
        for tensor in described:
            tensor["shape"], tensor["bytes"] = list(tensor["shape"]), tensor.pop("nbytes")
        problems = [] if described else ["The file has no tensors: it is not a model."]
        return _report((mapped,), None, metadata, described, problems)
    file = open_gguf(path)
    described = [
        {
            "name": info.name,
            "type": info.format.name,
            "shape": list(info.shape),
            "parameters": math.prod(info.shape),
            "bytes": info.nbytes,
            "offset": info.offset,
            "part": info.part + 1,
        }
        for info in file.tensors
    ]
    return _report(file.files, file.version, file.metadata, described, list(_problems(file)))


def _report(
    files: Sequence[MappedFile],
    version: int | None,
    metadata: Mapping[str, Any],
    tensors: list[dict[str, Any]],
    problems: list[str],
) -> dict[str, Any]:
    what, use = model_kind.describe({tensor["name"]: tensor["shape"] for tensor in tensors})
    return {
        "path": files[0].path,
        "version": version,
        "what": what,
        "use": use,
        "files": [{"path": part.path, "bytes": part.size} for part in files],
        "file_bytes": sum(part.size for part in files),
        "metadata": {key: _plain(value) for key, value in metadata.items() if _is_short(value)},
        "metadata_count": len(metadata),
        "tensor_count": len(tensors),
        "parameters": sum(tensor["parameters"] for tensor in tensors),
        "packed_bytes": sum(tensor["bytes"] for tensor in tensors),
        "types": _types(tensors),
        "tensors": tensors,
        "problems": problems,
    }


def _is_short(value: Any) -> bool:
    if isinstance(value, (str, list)):
        return len(str(value)) <= _VALUE_CHARACTERS
    return isinstance(value, (int, float))


def _plain(value: Any) -> Any:
    """`value` as JSON can say it: which knows neither infinities nor NaN."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _types(described: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    tensors: Counter[str] = Counter()
    parameters: Counter[str] = Counter()
    nbytes: Counter[str] = Counter()
    for tensor in described:
        tensors[tensor["type"]] += 1
        parameters[tensor["type"]] += tensor["parameters"]
        nbytes[tensor["type"]] += tensor["bytes"]
    return [
        {"type": name, "tensors": tensors[name], "parameters": parameters[name], "bytes": total}
        for name, total in nbytes.most_common()
    ]


def _problems(file: GGUFFile) -> Iterator[str]:
    if not file.tensors:
        yield "The file has no tensors: it is a vocabulary or metadata only, not a model."
        return
    known = model_kind.describe({info.name: info.shape for info in file.tensors})[0] != model_kind.UNKNOWN
    if "general.architecture" not in file.metadata and not known:
        yield "general.architecture is missing: a host has to guess the model from the names of its tensors."
    locked: dict[str, list[str]] = {}
    for info in file.tensors:
        if info.format.unpack is None:
            locked.setdefault(info.format.name, []).append(info.name)
    for name, names in locked.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"Tensor {names[0]}{more}: there is no known way to unpack {name}; take a file of another type."
    unused = _unused_bytes(file)
    if unused:
        yield f"{unused} bytes of the data belong to no tensor: harmless, or the rest of a damaged download."


def _unused_bytes(file: GGUFFile) -> int:
    """Bytes between and after the tensors, but for the padding that each is entitled to."""
    unused = 0
    for index, (part, alignment) in enumerate(zip(file.files, file.alignments, strict=True)):
        inside = (info for info in file.tensors if info.part == index and info.nbytes)
        by_place = sorted(inside, key=lambda info: info.offset)
        starts = [info.offset for info in by_place[1:]] + [part.size]
        for info, start in zip(by_place, starts, strict=False):
            end = -(-(info.offset + info.nbytes) // alignment) * alignment
            unused += max(0, start - end)
    return unused


def format_report(report: dict[str, Any]) -> str:
    """The report of `inspect_file` for one screen of a terminal."""
    files = f"{len(report['files'])} files, " if len(report["files"]) > 1 else ""
    kind = "safetensors" if report["version"] is None else f"GGUF version {report['version']}"
    lines = [
        report["path"],
        f"  {kind}, {files}{_size(report['file_bytes'])},"
        f" {report['tensor_count']} tensors, {_count(report['parameters'])} parameters",
        f"  {report['what']}",
        *([f"  {report['use']}"] if report["use"] else []),
    ]
    metadata = [f"  {key} = {value}" for key, value in report["metadata"].items()]
    if report["metadata_count"]:
        lines.append("")
    lines += [_cut(line) for line in metadata[:_METADATA_SHOWN]]
    hidden = report["metadata_count"] - min(len(metadata), _METADATA_SHOWN)
    if hidden:
        lines.append(f"  ... and {hidden} more metadata values")
    lines += [
        "",
        f"  {'type':<10}{'tensors':>8}{'parameters':>12}{'size':>10}{'share':>8}{'bits/weight':>13}",
    ]
    for row in report["types"]:
        share = row["bytes"] / max(1, report["packed_bytes"])
        bits = 8 * row["bytes"] / max(1, row["parameters"])
        lines.append(
            f"  {row['type']:<10}{row['tensors']:>8}{_count(row['parameters']):>12}{_size(row['bytes']):>10}"
            f"{share:>8.1%}{bits:>13.2f}"
        )
    largest = sorted(report["tensors"], key=lambda tensor: -tensor["bytes"])[:_LARGEST_SHOWN]
    lines += ["", "  largest tensors"]
    for tensor in largest:
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        lines.append(
            _cut(f"  {_size(tensor['bytes']):>10}  {tensor['type']:<8}  {shape:<18}  {tensor['name']}")
        )
    problems = report["problems"]
    lines += ["", "  problems" if problems else "  no problems found"]
    lines += [f"  - {problem}" for problem in problems[:_PROBLEMS_SHOWN]]
    if len(problems) > _PROBLEMS_SHOWN:
        lines.append(f"  - ... and {len(problems) - _PROBLEMS_SHOWN} more")
    return "\n".join(lines)


def _cut(line: str) -> str:
    line = " ".join(line.splitlines())
    return line if len(line) <= _LINE_CHARACTERS else line[: _LINE_CHARACTERS - 3] + "..."


def _size(nbytes: int) -> str:
    """Binary units, as file managers and GPU tools count."""
    size, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _count(number: int) -> str:
    for unit, scale in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if number >= scale:
            hundredths = (number * 100 + scale // 2) // scale  # A damaged file's may be beyond any float.
            return f"{hundredths // 100}.{hundredths % 100:02} {unit}"
    return str(number)
