"""Which web UI is this, and is everything there that QSwap replaces?

The answer comes from features, never from version strings. One table, `HOOK_POINTS`, and one set of family
rules serve both questions: `probe()` asks the running web UI, `inspect_webui()` asks the source files of a
folder without importing any of them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Literal, Protocol

Family = Literal["F1", "F1b", "F2", "F3", "F4", "unknown"]

FAMILIES: dict[Family, str] = {
    "F1": "Forge (lllyasviel) or one of its clones",
    "F1b": "Forge Neo before its memory manager was replaced, or a fork of it",
    "F2": "ersatzForge",
    "F3": "Forge Neo",
    "F4": "a web UI without Forge's backend (AUTOMATIC1111, reForge, Forge Classic)",
    "unknown": "unknown",
}

_MEMORY = "backend.memory_management"
_OPERATIONS = "backend.operations"
_PATCHER = "backend.patcher.base"


_LOAD = (
    "self",
    "state_dict",
    "prefix",
    "local_metadata",
    "strict",
    "missing_keys",
    "unexpected_keys",
    "error_msgs",
)


@dataclass(frozen=True, slots=True)
class HookPoint:
    """One name that QSwap replaces or relies on. `parameters` are the names it is called with; None: it only
    has to exist."""

    module: str
    name: str
    parameters: tuple[str, ...] | None = None


HOOK_POINTS: tuple[HookPoint, ...] = (
    HookPoint(_MEMORY, "current_loaded_models"),
    HookPoint(_MEMORY, "minimum_inference_memory", ()),
    HookPoint(_MEMORY, "get_free_memory", ("dev", "torch_free_too")),
    HookPoint(_MEMORY, "soft_empty_cache", ("force",)),
    HookPoint(_MEMORY, "unload_all_models", ()),
    HookPoint(_MEMORY, "module_size", ("module", "exclude_device", "include_device", "return_split")),
    HookPoint(_MEMORY, "LoadedModel.__init__", ("self", "model")),
    HookPoint(_MEMORY, "LoadedModel.model_load", ("self", "model_gpu_memory_when_using_cpu_swap")),
    HookPoint(_MEMORY, "LoadedModel.model_unload", ("self", "avoid_model_moving")),
    HookPoint(_MEMORY, "free_memory", ("memory_required", "device", "keep_loaded", "free_all")),
    HookPoint(_MEMORY, "load_models_gpu", ("models", "memory_required", "hard_memory_preservation")),
    HookPoint(_MEMORY, "bake_gguf_model", ("model",)),
    HookPoint(_MEMORY, "unet_inital_load_device", ("parameters", "dtype")),
    HookPoint(_MEMORY, "get_computation_dtype", ("inference_device", "parameters", "supported_dtypes")),
    HookPoint(_OPERATIONS, "stash"),
    HookPoint(
        _OPERATIONS,
        "weights_manual_cast",
        ("layer", "x", "skip_weight_dtype", "skip_bias_dtype", "weight_fn", "bias_fn"),
    ),
    HookPoint(_OPERATIONS, "main_stream_worker", ("weight", "bias", "signal")),
    HookPoint(_OPERATIONS, "ForgeOperations.Embedding.forward", ("self", "x")),
    HookPoint(_OPERATIONS, "ForgeOperations.Conv2d.forward", ("self", "x")),
    HookPoint(_OPERATIONS, "ForgeOperations.Linear._load_from_state_dict", _LOAD),
    HookPoint(_OPERATIONS, "ForgeOperationsGGUF.Linear.forward", ("self", "x")),
    HookPoint(_OPERATIONS, "ForgeOperationsGGUF.Linear._load_from_state_dict", _LOAD),
    HookPoint(
        "backend.operations_gguf", "ParameterGGUF.__init__", ("self", "tensor", "requires_grad", "no_init")
    ),
    HookPoint("backend.operations_gguf", "dequantize_tensor", ("tensor",)),
    HookPoint("backend.utils", "ParameterGGUF"),
    HookPoint("backend.utils", "load_torch_file", ("ckpt", "safe_load", "device")),
    HookPoint(
        _PATCHER,
        "ModelPatcher.add_patches",
        ("self", "filename", "patches", "strength_patch", "strength_model", "online_mode"),
    ),
    HookPoint(_PATCHER, "ModelPatcher.refresh_loras", ("self",)),
    HookPoint("backend.patcher.lora", "LoraLoader.refresh", ("self", "lora_patches", "offload_device")),
    HookPoint("backend.patcher.lora", "merge_lora_to_weight", ("patches", "weight")),
    HookPoint("backend.patcher.controlnet", "weights_manual_cast"),
    HookPoint("backend.patcher.controlnet", "main_stream_worker"),
    HookPoint("modules.processing", "need_global_unload"),
    HookPoint("modules.sd_models", "model_data"),
    HookPoint("modules.call_queue", "queue_lock"),
    HookPoint(
        "modules_forge.main_entry",
        "refresh_memory_management_settings",
        ("async_loading", "inference_memory", "pin_shared_memory", "model_memory"),
    ),
)


@dataclass(frozen=True, slots=True)
class HookStatus:
    """A hook point as it was met. `found` is None where the name is missing, otherwise its signature (or the
    word "value")."""

    name: str
    expected: str
    found: str | None
    ok: bool


@dataclass(frozen=True, slots=True)
class ProbeResult:
    family: Family
    supported: bool
    reason: str
    hooks: tuple[HookStatus, ...]

    def as_dict(self) -> dict:
        """The same as plain data, for JSON."""
        return {**asdict(self), "family_name": FAMILIES[self.family]}


class Parameters(tuple[str, ...]):
    """The parameter names of a callable; `anything` for one that takes `*args` and `**kwargs`, as another
    extension's wrapper does."""

    anything = False


class Surface(Protocol):
    """What the names of a web UI look like, whether it runs or lies on the disk."""

    def has_module(self, module: str) -> bool: ...

    def find(self, module: str, name: str) -> Parameters | Literal["value"] | None:
        """The parameters of the function `name` (dotted below the module), "value" for anything else, None
        where it is missing."""
        ...


def probe() -> ProbeResult:
    """Looks at the web UI that this process runs."""
    return _judge(RunningSurface())


def inspect_webui(path: str | Path) -> dict:
    """Looks at the web UI in a folder; imports and runs nothing. Raises ValueError where there is no web
    UI."""
    root = Path(path)
    if not (root / "modules").is_dir():
        raise ValueError(f"{root} is not the folder of a Stable Diffusion web UI: it has no `modules` folder")
    return {"webui": str(root), **_judge(SourceSurface(root)).as_dict()}


def family_of(surface: Surface) -> Family:
    """The family by its features: first what only the younger families have, then the argument that tells the
    older ones apart."""
    if not surface.has_module(_MEMORY):
        return "F4"
    if surface.find(_PATCHER, "ModelPatcher.partially_load") and surface.find(
        _MEMORY, "PINNING_ALLOWED_TYPES"
    ):
        return "F3"
    load = surface.find(_MEMORY, "LoadedModel.model_load")
    arguments = load if isinstance(load, Parameters) else ()
    if surface.find(_MEMORY, "Partial") or "partial" in arguments:
        return "F2"
    if surface.find(_MEMORY, "build_module_profile"):
        if "cpu_swap_memory" in arguments:
            return "F1b"
        # A wrapper that takes anything hides the argument's name; the name of the budget function is as
        # telling.
        if "model_gpu_memory_when_using_cpu_swap" in arguments or surface.find(
            _MEMORY, "compute_model_gpu_memory_when_using_cpu_swap"
        ):
            return "F1"
    return "unknown"


def _judge(surface: Surface) -> ProbeResult:
    family = family_of(surface)
    if family == "unknown":
        reason = "QSwap does not know this web UI's memory manager and leaves it alone"
        return ProbeResult(family, False, reason, _statuses(surface))
    if family != "F1":
        reason = f"this is {FAMILIES[family]}, which QSwap does not support yet and leaves alone"
        return ProbeResult(family, False, reason, ())
    hooks = _statuses(surface)
    missing = [hook for hook in hooks if not hook.ok]
    if missing:
        first = missing[0]
        met = f"{first.found} instead of {first.expected}" if first.found else "missing"
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        reason = f"{first.name} is {met}{more}: not the Forge that QSwap knows, so QSwap leaves it alone"
        return ProbeResult(family, False, reason, hooks)
    return ProbeResult(family, True, f"{FAMILIES[family]}: all {len(hooks)} hook points found", hooks)


def _statuses(surface: Surface) -> tuple[HookStatus, ...]:
    return tuple(_status(surface, point) for point in HOOK_POINTS)


def _status(surface: Surface, point: HookPoint) -> HookStatus:
    found = surface.find(point.module, point.name)
    wanted = point.parameters
    if wanted is None:
        ok = found is not None
    else:
        # More parameters than expected are no obstacle as long as ours are where they were.
        ok = isinstance(found, Parameters) and (found.anything or found[: len(wanted)] == wanted)
    return HookStatus(
        f"{point.module}.{point.name}", _words(wanted), None if found is None else _words(found), ok
    )


def _words(parameters: tuple[str, ...] | str | None) -> str:
    if parameters is None or isinstance(parameters, str):
        return parameters or "anything"
    if isinstance(parameters, Parameters) and parameters.anything:
        return "(*args, **kwargs)"
    return f"({', '.join(parameters)})"


class RunningSurface:
    """The modules of this process. Modules that are not imported yet are imported, as the web UI would do a
    moment later."""

    def has_module(self, module: str) -> bool:
        try:
            return importlib.util.find_spec(module) is not None
        except (ImportError, ValueError):
            return False

    def find(self, module: str, name: str) -> Parameters | Literal["value"] | None:
        try:
            target: object = importlib.import_module(module)
        except Exception:  # a module that fails to import is a missing hook point, whatever its reason
            return None
        for part in name.split("."):
            try:
                target = getattr(target, part)
            except AttributeError:
                return None
        if isinstance(target, (type, ModuleType)) or not callable(target):
            return "value"
        try:
            signature = inspect.signature(target)
        except (TypeError, ValueError):
            return "value"
        kinds = {parameter.kind for parameter in signature.parameters.values()}
        found = Parameters(
            parameter.name
            for parameter in signature.parameters.values()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        )
        found.anything = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD} <= kinds
        return found


class SourceSurface:
    """The `.py` files below a folder, parsed and never run. Conditional definitions (`try`, `if`, `with`)
    count as present."""

    def __init__(self, root: Path):
        self._root = root
        self._names = cache(self._parse)

    def has_module(self, module: str) -> bool:
        return self._file(module) is not None

    def find(self, module: str, name: str) -> Parameters | Literal["value"] | None:
        return self._find(module, name, depth=0)

    def _find(self, module: str, name: str, depth: int) -> Parameters | Literal["value"] | None:
        node: ast.AST | None = None
        names = self._names(module)
        first, *rest = name.split(".")
        node = names.get(first)
        if isinstance(node, ast.ImportFrom) and node.module and depth < 4:
            original = next(
                (alias.name for alias in node.names if (alias.asname or alias.name) == first), first
            )
            return self._find(node.module, ".".join([original, *rest]), depth + 1) or (
                "value" if not rest else None
            )
        for part in rest:
            if not isinstance(node, ast.ClassDef):
                return None
            node = _definitions(node.body).get(part)
        if node is None:
            return None
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return _parameters(node.args)
        return "value"

    def _file(self, module: str) -> Path | None:
        stem = self._root.joinpath(*module.split("."))
        return next(
            (file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None
        )

    def _parse(self, module: str) -> dict[str, ast.AST]:
        file = self._file(module)
        if file is None:
            return {}
        try:
            return _definitions(ast.parse(file.read_text(encoding="utf-8", errors="replace")).body)
        except (OSError, SyntaxError, ValueError):
            return {}


def _parameters(arguments: ast.arguments) -> Parameters:
    found = Parameters(a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs))
    found.anything = arguments.vararg is not None and arguments.kwarg is not None
    return found


def _definitions(body: list[ast.stmt]) -> dict[str, ast.AST]:
    """Every name that these statements bind, the statements inside `if`, `try` and `with` included; the last
    one wins."""
    names: dict[str, ast.AST] = {}
    for statement in body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names[statement.name] = statement
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            names.update({alias.asname or alias.name: statement for alias in statement.names})
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names.update(
                {t.id: statement for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)}
            )
        else:
            for field in ("body", "orelse", "finalbody"):
                names.update(_definitions(getattr(statement, field, [])))
    return names
