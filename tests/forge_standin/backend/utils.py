from backend.operations_gguf import ParameterGGUF


def load_torch_file(ckpt, safe_load=False, device=None):
    return {"weight": ParameterGGUF(ckpt)}
