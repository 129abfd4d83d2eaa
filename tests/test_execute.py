"""Layers computed in ways other than one forward without gradients: by themselves, with a backward pass, on
several streams, by a parent that does not call them."""

from __future__ import annotations

import copy
import threading

import pytest
import swap_models as sm
import torch

from lib_qswap.quant.packed import PackedTensor
from lib_qswap.swap.manager import attached

pytestmark = pytest.mark.usefixtures("engine")

GPU = "simgpu"
F32 = {"compute_dtype": torch.float32}
X = torch.linspace(-1, 1, 512).view(2, 256)
LATE_S = 20.0


class Decoder(torch.nn.Module):
    """Computes in a method that is not its forward as well."""

    def __init__(self, count=4, seed=0, *, packed=True):
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(256, 256, bias=False, device="meta") for _ in range(count)
        )
        for i, layer in enumerate(self.layers):
            weight = sm.packed_weight("Q8_0", (256, 256), seed * 100 + i)
            weight = weight if packed else weight.dequantize(torch.float32)
            layer.weight = torch.nn.Parameter(weight, requires_grad=False)

    def decode(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x) * 0.05) + x
        return x

    def forward(self, x):
        return self.decode(x)


def dense(model):
    """The same with weights of its own, plain."""
    weights = [layer.weight.detach() for layer in model.layers]
    weights = [one.dequantize(torch.float32) if isinstance(one, PackedTensor) else one for one in weights]

    def compute(x):
        for weight in weights:
            x = torch.tanh(torch.nn.functional.linear(x, weight) * 0.05) + x
        return x

    return compute


def test_a_method_that_is_no_forward_takes_turns_with_another_threads_forwards():
    decoder, network = Decoder(seed=1), Decoder(seed=2)
    decoded, expected = dense(decoder)(X), dense(network)(X)
    options = {"device": "cpu", "location": "cpu", "budget_bytes": 0, **F32}
    stop = threading.Event()
    wrong = []

    def decode():
        with torch.inference_mode():
            while not stop.is_set():
                wrong.extend([1] if not torch.equal(decoder.decode(X), decoded) else [])

    with attached(decoder, **options), attached(network, **options):
        thread = threading.Thread(target=decode, daemon=True)
        thread.start()
        with torch.inference_mode():
            for _ in range(300):
                assert torch.equal(network(X), expected)
        stop.set()
        thread.join(LATE_S)
    assert not wrong


def test_layers_used_outside_of_any_forward_are_not_recorded_for_ever():
    decoder = Decoder()
    with attached(decoder, device="cpu", location="cpu", budget_bytes=0, **F32) as attachment:
        with torch.inference_mode():
            for _ in range(5):
                decoder.decode(X)
        assert not attachment.state.streamer.order._recorded


@pytest.mark.parametrize("packed", [True, False])
def test_a_backward_pass_reads_the_weights_of_its_forward(packed):
    model = Decoder(packed=packed)
    compute = dense(model)
    own, ours = (X.clone().requires_grad_(True) for _ in range(2))
    compute(own).sum().backward()
    with attached(model, device="cpu", location="cpu", budget_bytes=0, **F32) as attachment:
        assert not attachment.resident_bytes
        model(ours).sum().backward()
    assert own.grad.std() > 0.01
    assert torch.equal(ours.grad, own.grad)


@pytest.mark.simgpu
def test_models_on_several_streams_read_what_is_theirs(sim, compute_mode):
    model, other = Decoder(seed=1), Decoder(seed=2)
    expected, others = dense(model)(X), dense(other)(X)
    options = {"device": GPU, "location": "shared", "budget_bytes": 600_000, **F32}
    with attached(model, **options) as attachment, attached(other, **options), torch.inference_mode():
        assert attachment.resident_bytes
        x = X.to(GPU)
        stream = torch.simgpu.Stream()
        stream.wait_stream(torch.simgpu.current_stream())
        for _ in range(6):
            results = [model(x)]
            with torch.simgpu.stream(stream):
                results += [other(x), model.decode(x)]
            torch.simgpu.synchronize()
            for result, right in zip(results, (expected, others, expected), strict=True):
                assert torch.equal(result.cpu(), right)


@pytest.mark.simgpu
@pytest.mark.parametrize(
    "parent",
    [
        lambda: torch.nn.MultiheadAttention(512, 8, batch_first=True),
        lambda: torch.nn.TransformerEncoderLayer(512, 8, 1024, batch_first=True),
    ],
    ids=["attention", "encoder layer"],
)
def test_layers_whose_parents_read_their_weights_stay_on_the_device(parent, sim):
    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.before, self.parent = torch.nn.Linear(512, 512), parent()

        def forward(self, x):
            x = self.before(x)
            return self.parent(x, x, x)[0] if hasattr(self.parent, "out_proj") else self.parent(x)

    torch.manual_seed(0)
    model = Pooled().eval().requires_grad_(False)
    x = torch.randn(1, 5, 512)
    with torch.inference_mode():
        expected = model(x)
        with attached(model, device=GPU, location="shared", budget_bytes=0, **F32) as attachment:
            assert [layer.name for layer in attachment.layers] == ["before"]
            assert torch.allclose(model(x.to(GPU)).cpu(), expected, atol=1e-5)


class Scaled(torch.nn.Linear):
    def forward(self, scale, x):
        return super().forward(x) * scale


class Int8(torch.nn.Linear):
    """Weights that are whole numbers, which its own forward scales."""

    def __init__(self, width):
        super().__init__(width, width, bias=False, device="meta")
        self.weight = torch.nn.Parameter(
            torch.randint(-128, 128, (width, width), dtype=torch.int8), requires_grad=False
        )

    def forward(self, x):
        assert self.weight.dtype == torch.int8
        return torch.nn.functional.linear(x, self.weight.to(x.dtype) / 128)


@pytest.mark.parametrize("budget_bytes", [0, 1 << 30])
def test_layers_with_forwards_of_their_own_get_what_they_expect(budget_bytes, sim):
    layers = torch.nn.ModuleList([Scaled(512, 512), Int8(512)])
    layers.requires_grad_(False)
    x = torch.randn(2, 512)
    expected = [layers[0](2, x), layers[1](x)]
    with attached(layers, device="simgpu", location="shared", budget_bytes=budget_bytes) as attachment:
        assert len(attachment.layers) == 2
        assert torch.equal(layers[0](2, x.to("simgpu")).cpu(), expected[0])
        assert torch.equal(layers[0](scale=2, x=x.to("simgpu")).cpu(), expected[0])
        assert torch.equal(layers[1](x.to("simgpu")).cpu(), expected[1])


class Precise(torch.nn.Linear):
    """Computes in the dtype of its weight, whatever its input has."""

    def forward(self, x):
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


@pytest.mark.parametrize("budget_bytes", [0, 1 << 30])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_a_layer_that_computes_in_its_weights_dtype_does_so_unless_another_is_asked_for(
    budget_bytes, compute_dtype, sim
):
    layers = torch.nn.ModuleList([Precise(512, 512)]).requires_grad_(False)
    x = torch.randn(2, 512).to(torch.bfloat16)
    expected = layers[0](x) if compute_dtype is None else copy.deepcopy(layers[0]).to(compute_dtype)(x)
    options = {"location": "shared", "budget_bytes": budget_bytes, "compute_dtype": compute_dtype}
    with attached(layers, device="simgpu", **options):
        assert torch.equal(layers[0](x.to("simgpu")).cpu(), expected)


class Own(torch.nn.Linear):
    """Torch's forward, but not torch's."""

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight, self.bias)


@pytest.mark.parametrize("kind", [torch.nn.Linear, Own])
def test_a_backward_pass_reads_the_weights_of_its_own_layers(kind, sim):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(kind(256, 256) for _ in range(8))).requires_grad_(False)
    x = torch.randn(4, 256)

    def gradient(device):
        own = x.clone().requires_grad_()
        model(own.to(device)).square().sum().backward()
        return own.grad

    expected = gradient("cpu")
    layer_bytes = 257 * 256 * 4
    with attached(model, device="simgpu", location="shared", budget_bytes=3 * layer_bytes) as attachment:
        assert sum(layer.resident is None for layer in attachment.layers) >= 5
        for _ in range(2):
            torch.testing.assert_close(gradient("simgpu"), expected, rtol=1e-4, atol=1e-6)
