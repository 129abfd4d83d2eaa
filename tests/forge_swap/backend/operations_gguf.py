"""A packed weight whose shape is that of the values."""

import torch


class ParameterGGUF(torch.nn.Parameter):
    def __new__(cls, tensor):
        return super().__new__(cls, torch.as_tensor(tensor.data), requires_grad=False)

    def __init__(self, tensor):
        super().__init__()
        self.tensor, self.real_shape = tensor, torch.Size(reversed(list(tensor.shape)))

    @property
    def shape(self):
        return self.real_shape

    def copy_with_data(self, data):
        copy = torch.Tensor._make_subclass(type(self), data, False)
        copy.tensor, copy.real_shape = self.tensor, self.real_shape
        return copy

    def to(self, *args, **kwargs):
        return self.copy_with_data(self.data.to(*args, **kwargs))
