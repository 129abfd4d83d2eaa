"""What Forge has of bitsandbytes, computed by its documented format (`bnb_checkpoint`)."""

import torch


class QuantState:
    def __init__(
        self,
        absmax,
        shape=None,
        code=None,
        blocksize=None,
        quant_type=None,
        dtype=None,
        offset=None,
        state2=None,
    ):
        self.absmax, self.shape, self.code, self.blocksize = absmax, shape, code, blocksize
        self.quant_type, self.dtype, self.offset, self.state2 = quant_type, dtype, offset, state2
        self.nested = state2 is not None

    def as_dict(self, packed=False):
        return {
            "absmax": self.absmax,
            "quant_map": self.code,
            f"quant_state.bitsandbytes__{self.quant_type}": torch.empty(0, dtype=torch.uint8),
        }


class ForgeParams4bit(torch.nn.Parameter):
    def __new__(cls, data, quant_state=None, bnb_quantized=True, blocksize=64, quant_type="nf4"):
        self = torch.Tensor._make_subclass(cls, data, False)
        self.quant_state, self.bnb_quantized = quant_state, bnb_quantized
        self.blocksize, self.quant_type = blocksize, quant_type
        return self


matmuls = 0  # how often bitsandbytes has multiplied, for the tests


def functional_linear_4bits(x, weight, bias):
    global matmuls
    matmuls += 1
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        inner = state.state2
        scales = inner.absmax.repeat_interleave(inner.blocksize)[: absmax.numel()]
        absmax = inner.code[absmax.int()] * scales + state.offset
    data = weight.t().reshape(-1)
    nibbles = torch.stack((data >> 4, data & 15), -1).view(-1).int()
    values = state.code[nibbles] * absmax.repeat_interleave(state.blocksize)[: len(nibbles)]
    unpacked = values.view(state.shape).to(state.dtype)
    return torch.nn.functional.linear(x, unpacked.to(x.dtype), bias)
