import contextlib

import torch
from backend.operations_bnb import functional_linear_4bits
from backend.operations_gguf import dequantize_tensor

stash = {}


def weights_manual_cast(
    layer, x, skip_weight_dtype=False, skip_bias_dtype=False, weight_fn=None, bias_fn=None
):
    weight = layer.weight.to(x.device, None if skip_weight_dtype else x.dtype)
    scale_weight = getattr(layer, "scale_weight", None)
    if scale_weight is not None:
        weight = weight * scale_weight.to(weight)
    return weight, None if layer.bias is None else layer.bias.to(x), None


@contextlib.contextmanager
def main_stream_worker(weight, bias, signal):
    yield


class ForgeOperations:
    class Linear(torch.nn.Module):
        def __init__(self, weight=None, bias=None, scale_weight=None):
            super().__init__()
            self.weight, self.bias, self.scale_weight = weight, bias, scale_weight
            self.parameters_manual_cast = True
            if weight is None:
                self.dummy = torch.nn.Parameter(torch.empty(1, dtype=torch.float16))

        def _load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        ):
            for name in ("weight", "bias"):
                if prefix + name in state_dict:
                    setattr(self, name, torch.nn.Parameter(state_dict[prefix + name].to(self.dummy)))
            del self.dummy

        def forward(self, x):
            weight, bias, signal = weights_manual_cast(self, x)
            with main_stream_worker(weight, bias, signal):
                return torch.nn.functional.linear(x, weight, bias)

    class Conv2d(torch.nn.Conv2d):
        parameters_manual_cast = False

        def forward(self, x):
            if self.parameters_manual_cast:
                weight, bias, signal = weights_manual_cast(self, x)
                with main_stream_worker(weight, bias, signal):
                    return self._conv_forward(x, weight, bias)
            return self._conv_forward(x, self.weight, self.bias)

    class Embedding(torch.nn.Embedding):
        parameters_manual_cast = False

        def forward(self, x):
            return super().forward(x)


class ForgeOperationsBNB4bits(ForgeOperations):
    class Linear(torch.nn.Module):
        def __init__(self, weight=None, bias=None):
            super().__init__()
            self.weight, self.bias = weight, bias
            self.parameters_manual_cast = False

        def forward(self, x):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return functional_linear_4bits(x, self.weight, bias)


bnb_avaliable = True  # sic


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
