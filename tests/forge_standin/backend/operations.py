import contextlib

import torch
from backend.operations_gguf import dequantize_tensor

stash = {}


def weights_manual_cast(
    layer, x, skip_weight_dtype=False, skip_bias_dtype=False, weight_fn=None, bias_fn=None
):
    return layer.weight.to(x), None if layer.bias is None else layer.bias.to(x), None


@contextlib.contextmanager
def main_stream_worker(weight, bias, signal):
    yield


class ForgeOperations:
    class Embedding(torch.nn.Embedding):
        parameters_manual_cast = False

        def forward(self, x):
            return super().forward(x)


class ForgeOperationsGGUF(ForgeOperations):
    class Linear(torch.nn.Module):
        def __init__(self, *args, **kwargs):
            super().__init__()
            self.weight = self.bias = None

        def _load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        ):
            self.weight = state_dict.get(prefix + "weight")
            self.bias = state_dict.get(prefix + "bias")

        def forward(self, x):
            weight, bias, signal = weights_manual_cast(
                self, x, weight_fn=dequantize_tensor, skip_bias_dtype=True
            )
            with main_stream_worker(weight, bias, signal):
                return torch.nn.functional.linear(x, weight, bias)
