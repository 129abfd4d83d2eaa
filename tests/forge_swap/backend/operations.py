"""The weights of a layer on the device of its input, and the stand-in of Forge's GGUF layer."""

import contextlib

import torch
from backend import stream
from backend.operations_gguf import ParameterGGUF


def weights_manual_cast(
    layer, x, skip_weight_dtype=False, skip_bias_dtype=False, weight_fn=None, bias_fn=None
):
    with stream.stream_context()(stream.mover_stream if stream.stream_activated else stream.current_stream):
        weight = weight_fn(layer.weight.to(device=x.device))
        bias = None if layer.bias is None else layer.bias.to(x.device)
        return weight, bias, torch.simgpu.current_stream().record_event()


@contextlib.contextmanager
def main_stream_worker(weight, bias, signal):
    stream.current_stream.wait_event(signal)
    yield
    stream.current_stream.synchronize()


def cleanup_cache():
    pass


class ForgeOperationsGGUF:
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dummy = torch.nn.Parameter(torch.empty(1))
            self.weight = self.bias = None
            self.parameters_manual_cast = False

        def _apply(self, fn, recurse=True):
            for name, parameter in list(self.named_parameters(recurse=False)):
                moved = fn(parameter)
                if not isinstance(moved, ParameterGGUF):
                    moved = (
                        parameter.copy_with_data(moved)
                        if isinstance(parameter, ParameterGGUF)
                        else torch.nn.Parameter(moved, requires_grad=False)
                    )
                setattr(self, name, moved)
            return self
