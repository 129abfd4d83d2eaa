"""QSwap: run quantized diffusion models that do not fit into GPU memory, and see where every layer is.

The public API, loaded when it is first used (importing the package imports nothing else):

    open_gguf(path)      a .gguf file as a mapping from names to packed weights
    pack_state_dict(t)   the tensors of a safetensors file (NF4, FP4, scaled FP8), each weight packed
    PackedTensor         a quantized weight as a torch.Tensor: `.dequantize()`, `.ggml_type`, `.packed_nbytes`
    attach(module, ...)  swaps the weights of any nn.Module, packed or plain, and gives an `Attachment`
    GGUFError            what is wrong with a file: names the file, the tensor and the field
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lib_qswap.quant.gguf_file import GGUFError, open_gguf
    from lib_qswap.quant.packed import PackedTensor
    from lib_qswap.quant.state_dict import pack_state_dict
    from lib_qswap.swap.manager import attach

__version__ = "0.1.0"
__all__ = ["GGUFError", "PackedTensor", "__version__", "attach", "open_gguf", "pack_state_dict"]

_MODULE_OF = {
    "GGUFError": "lib_qswap.quant.gguf_file",
    "PackedTensor": "lib_qswap.quant.packed",
    "attach": "lib_qswap.swap.manager",
    "open_gguf": "lib_qswap.quant.gguf_file",
    "pack_state_dict": "lib_qswap.quant.state_dict",
}


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
