"""Run by the web UI before it starts. QSwap brings no packages: all it needs is what Forge itself needs, and
Forge's versions stay as they are."""

from importlib.util import find_spec

missing = [name for name in ("torch", "numpy", "gradio", "fastapi") if find_spec(name) is None]
if missing:
    names = ", ".join(missing)
    print(f"[QSwap] missing: {names}. Start the web UI without --skip-install once.")
