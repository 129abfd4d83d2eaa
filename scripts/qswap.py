from lib_qswap.forge.script import QSwapScript, register

__all__ = ["QSwapScript"]  # Forge looks for script classes among this module's names

register()
