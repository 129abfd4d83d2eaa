from backend.operations_gguf import ParameterGGUF


def load_torch_file(ckpt, safe_load=False, device=None):
    return {"weight": ParameterGGUF(ckpt)}


def get_state_dict_after_quant(model, prefix=""):
    return {prefix + name: tensor.clone() for name, tensor in model.state_dict().items()}
