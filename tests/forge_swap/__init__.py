"""Stands for the folder of a Forge web UI in tests of benchmarks/step_forge.py: a memory manager, a patcher
and a GGUF layer with Forge's names, reduced to what is called of them."""
