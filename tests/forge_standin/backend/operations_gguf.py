import torch


class ParameterGGUF(torch.nn.Parameter):
    def __init__(self, tensor=None, requires_grad=False, no_init=False):
        super().__init__()

    def __new__(cls, tensor=None, requires_grad=False, no_init=False):
        return super().__new__(cls, torch.as_tensor(tensor), requires_grad=requires_grad)


def dequantize_tensor(tensor):
    return tensor
