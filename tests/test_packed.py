"""PackedTensor: what keeps a weight packed, what unpacks it, what is refused; inference mode or not."""

import copy
import errno
import gc
import io
import os
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from gguf_writer import Tensor, gguf_bytes
from swap_models import packed_bytes
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lib_qswap.quant.formats import FORMATS, scaled
from lib_qswap.quant.gguf_file import FileSlice, MappedFile, open_gguf
from lib_qswap.quant.packed import PackedTensor

ROWS, COLUMNS = 64, 512
BLOCKS_PER_ROW = COLUMNS // 32


def q8_0(rows=ROWS, columns=COLUMNS, seed=0):
    """Random Q8_0 bytes and their values: a block is an fp16 scale and 32 signed bytes."""
    generator = torch.Generator().manual_seed(seed)
    blocks = rows * columns // 32
    scales = (torch.rand(blocks, 1, generator=generator) * 0.01 + 0.001).half()
    quants = torch.randint(-127, 128, (blocks, 32), generator=generator, dtype=torch.int8)
    packed = torch.cat([scales.view(torch.uint8), quants.view(torch.uint8)], dim=1)
    return packed.view(-1), (scales.float() * quants.float()).view(rows, columns)


def make(dtype=torch.float16, shape=(ROWS, COLUMNS), **kwargs):
    packed, values = q8_0()
    return PackedTensor(packed, FORMATS["Q8_0"], shape, dtype, **kwargs), values.view(shape)


MODES = pytest.mark.parametrize(
    ("made_in", "used_in"),
    [(made, used) for made in ("normal", "inference") for used in ("normal", "inference", "no_grad")],
)


def mode(name):
    return torch.no_grad() if name == "no_grad" else torch.inference_mode(name == "inference")


@pytest.fixture
def no_unpacking(monkeypatch):
    """Whoever unpacks, fails."""

    def refuse(self, *_, **__):
        raise AssertionError(f"{self!r} was unpacked")

    monkeypatch.setattr(PackedTensor, "dequantize", refuse)


def assert_packed(tensor, like, shape=None, dtype=None):
    assert type(tensor) is PackedTensor
    assert tensor.format is like.format
    assert tuple(tensor.shape) == tuple(like.shape if shape is None else shape)
    assert tensor.dtype == (dtype or like.dtype)


# -- What it is ----------------------------------------------------------------------------------------------


def test_it_shows_the_logical_shape_and_dtype_and_holds_the_bytes():
    packed, _ = q8_0()
    tensor = PackedTensor(packed, FORMATS["Q8_0"], (ROWS, COLUMNS), torch.bfloat16)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((ROWS, COLUMNS), torch.bfloat16, "cpu")
    assert tensor.ggml_type == "Q8_0"
    assert tensor.packed_nbytes == packed.nbytes == ROWS * BLOCKS_PER_ROW * 34
    assert tensor.nelement() * tensor.element_size() == ROWS * COLUMNS * 2
    assert tensor.packed.shape == (ROWS, BLOCKS_PER_ROW * 34)
    assert tensor.packed.data_ptr() == packed.data_ptr()
    assert tensor.source is None
    assert is_traceable_wrapper_subclass(tensor)


def test_bytes_are_flat_where_a_row_is_no_whole_number_of_blocks():
    assert make(shape=(16, 16, 4, 32))[0].packed.shape == (1024, 34)
    assert make(shape=(1024, 8, 4))[0].packed.shape == (ROWS * BLOCKS_PER_ROW * 34,)
    scalar = PackedTensor(torch.zeros(4, dtype=torch.uint8), FORMATS["F32"], (), torch.float32)
    assert scalar.packed.shape == (4,)


@pytest.mark.parametrize(
    ("packed", "shape"),
    [
        (torch.zeros(34, dtype=torch.int8), (1, 32)),
        (torch.zeros(33, dtype=torch.uint8), (1, 32)),
        (torch.zeros(34, dtype=torch.uint8), (1, 33)),
        (torch.zeros(34, 2, dtype=torch.uint8)[:, 0], (1, 32)),
    ],
    ids=["another dtype", "too short", "no whole block", "strided"],
)
def test_bytes_that_are_not_the_shape_s_are_refused(packed, shape):
    with pytest.raises(ValueError, match=r"Q8_0|uint8"):
        PackedTensor(packed, FORMATS["Q8_0"], shape)


def test_it_unpacks_to_the_values_that_the_specification_gives():
    tensor, values = make()
    assert values.std() > 0.1
    assert torch.equal(tensor.dequantize(torch.float32), values)
    assert torch.equal(tensor.dequantize(), values.half())
    assert torch.equal(tensor.dequantize(torch.bfloat16), values.bfloat16())
    assert torch.equal(tensor.dequantize(torch.float64), values.double())
    assert type(tensor.dequantize()) is torch.Tensor


def test_it_unpacks_into_a_given_tensor_and_refuses_one_that_does_not_fit():
    tensor, values = make()
    out = torch.full((ROWS, COLUMNS), torch.nan)
    assert tensor.dequantize(out=out) is out
    assert torch.equal(out, values)
    for wrong in (torch.empty(ROWS, COLUMNS + 1), torch.empty(COLUMNS, ROWS).t()):
        with pytest.raises(ValueError, match="contiguous tensor of shape"):
            tensor.dequantize(out=wrong)
    with pytest.raises(ValueError, match="dtype"):
        tensor.dequantize(torch.float16, out=out)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"])
def test_plain_types_unpack_to_their_values_wherever_their_bytes_lie(name):
    dtype = FORMATS[name].dtype
    values = (torch.arange(64) - 30).to(dtype).view(4, 16)
    buffer = torch.empty(values.nbytes + 1, dtype=torch.uint8)
    for packed in (values.view(torch.uint8).flatten(), buffer[1:].copy_(values.view(torch.uint8).flatten())):
        if packed.storage_offset() and dtype.itemsize > 1:
            packed = torch.frombuffer(bytearray(b"x" + bytes(packed.tolist())), dtype=torch.uint8, offset=1)
        tensor = PackedTensor(packed, FORMATS[name], (4, 16), dtype)
        assert torch.equal(tensor.dequantize(), values)
        assert torch.equal(tensor.dequantize(torch.float32, arithmetic="like Forge"), values.float())


def test_a_type_that_cannot_be_unpacked_says_so():
    tensor = PackedTensor(torch.zeros(40, dtype=torch.uint8), FORMATS["Q8_1"], (1, 32))
    with pytest.raises(NotImplementedError, match="Q8_1"):
        tensor.dequantize()


def test_its_repr_is_one_short_line_and_unpacks_nothing(no_unpacking):
    tensor, _ = make()
    expected = "PackedTensor(Q8_0, shape=(64, 512), dtype=torch.float16, device=cpu, pinned=False)"
    assert repr(tensor) == str(tensor) == f"{tensor}" == expected
    assert repr(nn.Parameter(tensor, requires_grad=False)) == expected


def packed_parameter(format, shape, seed=0):
    packed = torch.frombuffer(bytearray(packed_bytes(format.name, shape, seed)), dtype=torch.uint8)
    return nn.Parameter(PackedTensor(packed, format, shape), requires_grad=False)


class Layers(nn.Module):
    """A linear layer, and rows of an embedding of another type and scale."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(8, 256, device="meta")
        self.linear = nn.Linear(256, 64, device="meta")
        for module, format, shape in (
            (self.embedding, scaled("F8_E4M3", 0.5), (8, 256)),
            (self.linear, FORMATS["Q4_K"], (64, 256)),
        ):
            module.weight = packed_parameter(format, shape)
        self.linear.bias = nn.Parameter(torch.linspace(-1, 1, 64).half(), requires_grad=False)

    def forward(self, indices):
        return self.linear(self.embedding(indices))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_model_with_packed_weights_can_be_compiled_in_one_graph():
    layers = Layers()
    first, second = torch.tensor([1, 5, 2]), torch.tensor([0, 7, 7])
    compiled = torch.compile(layers, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for indices in (first, second):
            expected = layers(indices)
            assert expected.isfinite().all()
            assert torch.equal(compiled(indices), expected)


def test_it_can_be_referenced_weakly_and_is_freed_by_reference_count():
    tensor, _ = make()
    gc.disable()
    try:
        references = [weakref.ref(tensor), weakref.ref(tensor.packed)]
        assert references[0]() is tensor
        del tensor
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


# -- What keeps it packed ------------------------------------------------------------------------------------


@MODES
def test_aliases_keep_class_bytes_and_source(made_in, used_in, no_unpacking):
    source = FileSlice(None, 128, ROWS * BLOCKS_PER_ROW * 34)
    with mode(made_in):
        tensor, _ = make(source=source)
    with mode(used_in):
        aliases = [
            tensor.detach(),
            tensor.data,
            tensor.to("cpu"),
            tensor.to(torch.float16),
            tensor.to("cpu", torch.float16),
            tensor.to(torch.empty(1, dtype=torch.float16)),
            tensor.cpu(),
            tensor.half(),
            tensor.contiguous(),
            tensor[:],
            tensor[...],
            tensor.with_dtype(torch.float16),
            nn.Parameter(tensor, requires_grad=False),
        ]
    for alias in aliases:
        assert_packed(alias, tensor)
        assert alias.packed.data_ptr() == tensor.packed.data_ptr()
        assert alias.source == source
    assert isinstance(aliases[-1], nn.Parameter)
    assert not aliases[-1].requires_grad


@MODES
def test_moving_to_the_same_place_gives_the_same_object(made_in, used_in):
    with mode(made_in):
        tensor, _ = make()
    with mode(used_in):
        assert tensor.to("cpu") is tensor
        assert tensor.to(torch.float16) is tensor
        assert tensor.to("cpu", torch.float16, non_blocking=True) is tensor


@MODES
def test_another_float_dtype_is_another_logical_dtype_of_the_same_bytes(made_in, used_in, no_unpacking):
    source = FileSlice(None, 0, ROWS * BLOCKS_PER_ROW * 34)
    with mode(made_in):
        tensor, _ = make(source=source)
    with mode(used_in):
        changed = {
            torch.bfloat16: [tensor.to(torch.bfloat16), tensor.bfloat16(), tensor.to("cpu", torch.bfloat16)],
            torch.float32: [tensor.float(), tensor.type(torch.float32), tensor.to(torch.empty(1))],
        }
    for dtype, results in changed.items():
        for result in results:
            assert_packed(result, tensor, dtype=dtype)
            assert result.packed.data_ptr() == tensor.packed.data_ptr()
            assert result.source == source


def test_an_integer_dtype_unpacks():
    tensor, values = make()
    assert torch.equal(tensor.to(torch.int32), values.half().to(torch.int32))


@MODES
def test_copies_have_bytes_of_their_own_and_no_source(made_in, used_in, no_unpacking, tmp_path):
    path = tmp_path / "other"
    path.write_bytes(bytes(1))
    with mode(made_in):
        tensor, _ = make(source=FileSlice(MappedFile(path), 0, 1))
    with mode(used_in):
        copies = [
            tensor.clone(),
            tensor.to("cpu", copy=True),
            copy.copy(tensor.clone()),
            copy.deepcopy(tensor),
        ]
    for duplicate in copies:
        assert_packed(duplicate, tensor)
        assert duplicate.packed.data_ptr() != tensor.packed.data_ptr()
        assert torch.equal(duplicate.packed, tensor.packed)
        assert duplicate.source is None


def test_deepcopy_keeps_a_parameter_a_parameter_and_what_others_have_set_on_it():
    parameter = nn.Parameter(make()[0], requires_grad=False)
    parameter.note = ["kept"]
    one, two = copy.deepcopy([parameter, parameter])
    assert one is two
    assert isinstance(one, nn.Parameter)
    assert isinstance(one, PackedTensor)
    assert one.note == ["kept"]
    assert one.note is not parameter.note
    assert one.format is parameter.format


@MODES
def test_rows_stay_packed_and_their_source_is_cut_to_fit(made_in, used_in, no_unpacking):
    row_bytes = BLOCKS_PER_ROW * 34
    with mode(made_in):
        tensor, _ = make(source=FileSlice(None, 1000, ROWS * row_bytes))
    with mode(used_in):
        results = [
            (tensor[3:7], 3, 4),
            (tensor[-2:], 62, 2),
            (tensor[60:1000], 60, 4),
            (tensor.narrow(0, 5, 6), 5, 6),
            (tensor[5:2], 5, 0),
            *zip(tensor.chunk(3), (0, 22, 44), (22, 22, 20), strict=True),
            *zip(tensor.split(30), (0, 30, 60), (30, 30, 4), strict=True),
            *zip(tensor.split([10, 54]), (0, 10), (10, 54), strict=True),
            *zip(torch.split_with_sizes(tensor, [0, 64]), (0, 0), (0, 64), strict=True),
        ]
    for part, first, count in results:
        assert_packed(part, tensor, (count, COLUMNS))
        assert torch.equal(part.packed.view(count, row_bytes), tensor.packed[first : first + count])
        assert part.source[1:] == (1000 + first * row_bytes, count * row_bytes)


@MODES
def test_one_row_is_a_packed_vector(made_in, used_in):
    with mode(made_in):
        tensor, values = make()
    with mode(used_in):
        for row, index in ((tensor[3], 3), (tensor[-1], 63), (tensor.select(0, 5), 5)):
            assert_packed(row, tensor, (COLUMNS,))
            assert torch.equal(row.dequantize(torch.float32), values[index])
        assert tensor.select(0, 0)[0] == values.half()[0, 0]


def test_rows_of_more_dimensions_stay_packed():
    tensor, values = make(shape=(16, 4, 512))
    assert_packed(tensor[2:5], tensor, (3, 4, 512))
    assert torch.equal(tensor[2:5].dequantize(torch.float32), values[2:5])
    assert torch.equal(tensor[7].dequantize(torch.float32), values[7])


def test_parts_that_begin_inside_of_a_block_are_unpacked():
    tensor, values = make(shape=(ROWS * COLUMNS // 8, 8))  # four rows to a block
    assert_packed(tensor[4:12], tensor, (8, 8))
    for unpacked, expected in ((tensor[2:6], values[2:6]), (tensor[1], values[1])):
        assert type(unpacked) is torch.Tensor
        assert torch.equal(unpacked, expected.half())
    parts = tensor.split([2, len(tensor) - 2])
    assert [type(part) for part in parts] == [torch.Tensor, torch.Tensor]
    assert torch.equal(torch.cat(parts), values.half())


@MODES
def test_rows_are_joined_packed(made_in, used_in, no_unpacking):
    with mode(made_in):
        tensor, _ = make()
        other = PackedTensor(q8_0(8, COLUMNS, 1)[0], FORMATS["Q8_0"], (8, COLUMNS))
    with mode(used_in):
        joined = torch.cat([tensor, other, tensor[:4]])
    assert_packed(joined, tensor, (ROWS + 8 + 4, COLUMNS))
    assert torch.equal(joined.packed, torch.cat([tensor.packed, other.packed, tensor.packed[:4]]))
    assert joined.source is None


def test_joining_what_differs_unpacks():
    tensor, values = make()
    plain = torch.ones(3, COLUMNS, dtype=torch.float16)
    half = values.half()
    f16 = PackedTensor(plain.view(torch.uint8).view(-1), FORMATS["F16"], (3, COLUMNS))
    for parts, expected in (
        ([tensor, plain], [half, plain]),
        ([plain, tensor], [plain, half]),
        ([tensor, f16], [half, plain]),
        ([tensor, tensor.float()], [half, values]),
    ):
        joined = torch.cat(parts)
        assert type(joined) is torch.Tensor
        assert torch.equal(joined, torch.cat(expected))
    assert torch.equal(torch.cat([tensor, tensor], dim=1), torch.cat([half, half], dim=1))


@MODES
def test_shapes_and_factories_need_no_bytes(made_in, used_in, no_unpacking):
    with mode(made_in):
        tensor, _ = make()
    with mode(used_in):
        assert tensor.is_floating_point()
        assert not torch.is_complex(tensor)
        assert tensor.is_same_size(tensor)
        assert torch.result_type(tensor, torch.ones(1)) == torch.float32
        assert (tensor.size(0), len(tensor), tensor.dim(), tensor.numel()) == (64, 64, 2, 64 * 512)
        assert tensor.is_contiguous()
        assert not tensor.is_pinned()
        for made in (torch.zeros_like(tensor), tensor.new_zeros(tensor.shape), torch.empty_like(tensor)):
            assert type(made) is torch.Tensor
            assert (made.shape, made.dtype, made.device.type) == (tensor.shape, torch.float16, "cpu")
        assert torch.zeros_like(tensor, dtype=torch.float32).dtype == torch.float32


# -- In modules ----------------------------------------------------------------------------------------------


def linear():
    tensor, values = make()
    layer = nn.Linear(COLUMNS, ROWS, bias=False)
    layer.weight = nn.Parameter(tensor, requires_grad=False)
    return layer, values


@MODES
def test_modules_convert_move_and_copy_without_unpacking(made_in, used_in, no_unpacking):
    with mode(made_in):
        layer, _ = linear()
    bytes_before = layer.weight.packed.clone()
    with mode(used_in):
        modules = [
            (copy.deepcopy(layer).to(torch.bfloat16), torch.bfloat16, "cpu"),
            (copy.deepcopy(layer).half(), torch.float16, "cpu"),
            (copy.deepcopy(layer).to("cpu"), torch.float16, "cpu"),
            (copy.deepcopy(layer)._apply(lambda tensor: tensor.clone()), torch.float16, "cpu"),
            (copy.deepcopy(layer).to("meta"), torch.float16, "meta"),
        ]
    for module, dtype, device in modules:
        assert_packed(module.weight, layer.weight, dtype=dtype)
        assert isinstance(module.weight, nn.Parameter)
        assert module.weight.device.type == module.weight.packed.device.type == device
        if device == "cpu":
            assert torch.equal(module.weight.packed, bytes_before)


def test_converting_a_module_keeps_the_bytes_in_the_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes([Tensor("weight", (ROWS, COLUMNS), "Q8_0", bytes(q8_0()[0].tolist()))]))
    tensor = open_gguf(path)["weight"]
    layer = nn.Linear(COLUMNS, ROWS, bias=False)
    layer.load_state_dict({"weight": tensor}, assign=True)
    layer = layer.to("cpu").to(torch.bfloat16)
    assert layer.weight.packed.data_ptr() == tensor.packed.data_ptr()
    assert layer.weight.source == tensor.source


@MODES
def test_state_dicts_carry_packed_weights(made_in, used_in, no_unpacking):
    with mode(made_in):
        layer, _ = linear()
    other = nn.Linear(COLUMNS, ROWS, bias=False)
    other.weight.requires_grad_(False)
    with mode(used_in):
        state = layer.state_dict()
        other.load_state_dict(state, assign=True)
    for weight in (state["weight"], other.weight):
        assert_packed(weight, layer.weight)
        assert weight.packed.data_ptr() == layer.weight.packed.data_ptr()
    assert isinstance(other.weight, nn.Parameter)


def test_a_state_dict_is_unpacked_into_plain_weights_that_copy_it():
    layer, values = linear()
    other = nn.Linear(COLUMNS, ROWS, bias=False)
    other.load_state_dict(layer.state_dict())
    assert type(other.weight) is nn.Parameter
    assert torch.equal(other.weight, values)  # rounded once, to the dtype that it is copied to
    assert other.weight.requires_grad


def test_loading_into_a_packed_weight_without_assign_says_what_to_do():
    layer, _ = linear()
    with pytest.raises(RuntimeError, match="assign=True"):
        layer.load_state_dict(nn.Linear(COLUMNS, ROWS, bias=False).state_dict())


def test_assigning_data_moves_the_bytes_too():
    parameter = nn.Parameter(make()[0], requires_grad=False)
    replacement = make()[0].to(torch.bfloat16)
    parameter.data = replacement
    assert parameter.dtype == torch.bfloat16
    assert parameter.packed is replacement.packed
    with pytest.raises(TypeError, match="plain tensor"):
        parameter.data = torch.zeros(ROWS, COLUMNS)


def test_a_subclass_stays_one():
    class HostTensor(PackedTensor):
        baked = True

    packed, _ = q8_0()
    tensor = HostTensor(packed, FORMATS["Q8_0"], (ROWS, COLUMNS))
    parameter = nn.Parameter(tensor, requires_grad=False)
    for result in (
        parameter,
        tensor.clone(),
        tensor[2:4],
        tensor.to(torch.float32),
        torch.cat([tensor, tensor]),
        copy.deepcopy(parameter),
    ):
        assert type(result) is HostTensor
        assert result.baked


# -- What unpacks it -----------------------------------------------------------------------------------------


@MODES
def test_anything_else_computes_with_the_unpacked_values(made_in, used_in):
    with mode(made_in):
        tensor, values = make(torch.float32)
        parameter = nn.Parameter(tensor, requires_grad=False)
    x = torch.randn(3, COLUMNS)
    with mode(used_in):
        for result, expected in (
            (F.linear(x, parameter), F.linear(x, values)),
            (x @ parameter.t(), x @ values.t()),
            (parameter.T, values.T),
            (parameter + 1, values + 1),
            (1 - parameter, 1 - values),
            (parameter.view(-1), values.view(-1)),
            (parameter.reshape(COLUMNS, ROWS), values.reshape(COLUMNS, ROWS)),
            (parameter[:, 3:9], values[:, 3:9]),
            (parameter[::2], values[::2]),
            (parameter[None], values[None]),
            (parameter.permute(1, 0), values.permute(1, 0)),
            (F.embedding(torch.tensor([1, 5]), parameter), values[[1, 5]]),
            (parameter.sum(), values.sum()),
            (torch.stack([parameter, values]), torch.stack([values, values])),
        ):
            assert type(result) is torch.Tensor
            assert result.isfinite().all()
            assert torch.equal(result, expected)
        assert torch.equal(parameter, values)


@MODES
def test_a_packed_tensor_is_copied_into_a_plain_one_unpacked(made_in, used_in):
    with mode(made_in):
        tensor, values = make()
    with mode(used_in):
        plain = torch.zeros(ROWS, COLUMNS)
        plain.copy_(tensor)
        plain[0] += tensor[0]
        assert torch.equal(plain[1:], values[1:])  # rounded once, to the dtype of where it goes
        assert torch.equal(plain[0], values[0] + values.half().float()[0])


def test_results_can_be_written_to_and_do_not_change_the_weight():
    with torch.inference_mode():
        tensor, values = make()
    product = F.linear(torch.ones(1, COLUMNS, dtype=torch.float16), tensor)
    product += 1  # an inference tensor would refuse this
    tensor.dequantize().zero_()
    assert torch.equal(tensor.dequantize(torch.float32), values)


def test_gradients_flow_through_a_packed_weight_to_the_input():
    tensor, values = make(torch.float32)
    x = torch.randn(2, COLUMNS, requires_grad=True)
    F.linear(x, nn.Parameter(tensor, requires_grad=False)).sum().backward()
    assert torch.allclose(x.grad, values.sum(0).expand(2, -1))


# -- What is refused -----------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize(
    "write",
    [
        lambda tensor: tensor.mul_(2),
        lambda tensor: tensor.zero_(),
        lambda tensor: tensor.copy_(torch.zeros(ROWS, COLUMNS)),
        lambda tensor: tensor.copy_(tensor.clone()),
        lambda tensor: tensor.__setitem__(0, 1.0),
        lambda tensor: tensor.__setitem__((0, slice(2, 5)), 1.0),
        lambda tensor: tensor[3].fill_(1),
        lambda tensor: tensor.__iadd__(1),
        lambda tensor: tensor.resize_(3),
        lambda tensor: tensor.set_(),
        lambda tensor: torch.add(torch.ones(ROWS, COLUMNS), 1, out=tensor),
        lambda tensor: torch._foreach_mul_([tensor], 2.0),
        lambda tensor: nn.init.normal_(tensor),
    ],
)
def test_writing_into_it_raises_and_changes_nothing(made_in, used_in, write):
    with mode(made_in):
        tensor, _ = make()
    before = tensor.packed.clone()
    with mode(used_in), pytest.raises(RuntimeError, match=r"immutable") as caught:
        write(tensor)
    assert "dequantize()" in str(caught.value)
    assert torch.equal(tensor.packed, before)


def test_shared_memory_is_refused_with_a_reason():
    with pytest.raises(RuntimeError, match="open the same file in the other process"):
        linear()[0].share_memory()


# -- Saving --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_pickling_keeps_class_type_and_bytes(protocol):
    parameter = nn.Parameter(make(torch.bfloat16)[0], requires_grad=False)
    restored = pickle.loads(pickle.dumps(parameter, protocol))
    assert_packed(restored, parameter)
    assert isinstance(restored, nn.Parameter)
    assert torch.equal(restored.packed, parameter.packed)
    assert not isinstance(pickle.loads(pickle.dumps(parameter[2:4], protocol)), nn.Parameter)


def test_saving_a_state_dict_round_trips_with_the_default_settings_of_torch_load():
    layer, _ = linear()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    restored = torch.load(file)["weight"]
    assert_packed(restored, layer.weight)
    assert torch.equal(restored.packed, layer.weight.packed)


def test_a_part_is_saved_without_the_arena_that_it_lies_in():
    tensor, _ = make()
    assert len(pickle.dumps(tensor[:1])) < tensor.packed_nbytes / 10


def test_flattening_and_unflattening_gives_the_same_tensor():
    tensor, values = make(torch.bfloat16)
    names, context = tensor.__tensor_flatten__()
    inner = {name: getattr(tensor, name) for name in names}
    restored = PackedTensor.__tensor_unflatten__(inner, context, tensor.size(), tensor.stride())
    assert_packed(restored, tensor)
    assert torch.equal(restored.dequantize(torch.float32), values)


# -- On a device ---------------------------------------------------------------------------------------------


@pytest.mark.simgpu
@MODES
def test_the_pin_is_kept_by_everything_that_stays_on_the_host(sim, made_in, used_in, no_unpacking):
    with mode(made_in):
        tensor, _ = make()
        parameter = nn.Parameter(tensor, requires_grad=False)
    with mode(used_in):
        assert not parameter.is_pinned()
        pinned = nn.Parameter(parameter.pin_memory(), requires_grad=False)
        assert pinned.is_pinned()
        assert pinned.packed.is_pinned()
        assert "pinned=True" in repr(pinned)
        assert not parameter.is_pinned()
        layer = nn.Linear(COLUMNS, ROWS, bias=False)
        layer.weight = pinned
        for result in (
            pinned.pin_memory(),
            pinned.detach(),
            pinned.data,
            pinned.to("cpu"),
            pinned.to(torch.bfloat16),
            pinned.clone(),
            pinned[3:5],
            copy.deepcopy(pinned),
            layer.state_dict()["weight"],
            copy.deepcopy(layer).weight,
            copy.deepcopy(layer).to(torch.bfloat16).weight,
        ):
            assert type(result) is PackedTensor
            assert result.is_pinned()
        assert torch.equal(pinned.packed, tensor.packed)


@pytest.mark.simgpu
@MODES
def test_only_the_packed_bytes_travel_to_a_device(sim, made_in, used_in):
    with mode(made_in):
        layer, values = linear()
    with mode(used_in):
        weight = layer.weight.pin_memory()
        sim.reset_stats()
        moved = weight.to("simgpu", non_blocking=True)
        sim.synchronize()
        assert sim.stats()["h2d_pinned_bytes"] == weight.packed_nbytes
        assert_packed(moved, weight)
        assert moved.device.type == moved.packed.device.type == "simgpu"
        assert moved.to("simgpu") is moved
        assert moved.to(torch.device("simgpu:0")) is moved
        assert_packed(moved.to("simgpu", torch.bfloat16), weight, dtype=torch.bfloat16)
        assert torch.equal(moved.cpu().packed, weight.packed)
        assert torch.equal(moved.dequantize(torch.float32).cpu(), values)
        assert torch.zeros_like(moved).device.type == "simgpu"
        assert_packed(layer.to("simgpu").weight, weight)
        x = torch.randn(2, COLUMNS, dtype=torch.float16)
        assert torch.allclose(layer(x.to("simgpu")).cpu(), F.linear(x, values.half()), atol=0.05)


@pytest.mark.simgpu
def test_a_stream_is_recorded_on_the_bytes(sim):
    moved = make()[0].to("simgpu")
    stream = torch.simgpu.Stream()
    moved.record_stream(stream)
    stream.synchronize()


# -- Bytes in a file -----------------------------------------------------------------------------------------


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    """A weight that aliases the map of its file, and is read in pieces."""

    def of(format_name: str, rows: int = 33, columns: int = 1024) -> PackedTensor:
        monkeypatch.setattr("lib_qswap.quant.packed_bytes._PIECE_ELEMENTS", 4096)
        monkeypatch.setattr("lib_qswap.quant.packed_bytes._PIECE_BYTES", 1000)
        path = tmp_path / "model.gguf"
        data = packed_bytes(format_name, (rows, columns), 0)
        path.write_bytes(gguf_bytes([Tensor("weight", (rows, columns), FORMATS[format_name].ggml_id, data)]))
        monkeypatch.setattr("lib_qswap.quant.gguf_file.COPIED_BELOW_BYTES", 0)
        weight = open_gguf(path)["weight"]
        assert weight.is_mapped
        return weight

    return of


@pytest.mark.parametrize("format_name", ["Q4_K", "Q8_0", "IQ3_S", "F16", "BF16", "F32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_a_weight_in_a_file_has_the_values_of_its_bytes_in_memory(mapped, format_name, dtype):
    weight = mapped(format_name)
    in_memory = weight.clone()
    assert not in_memory.is_mapped
    assert in_memory.source is None
    assert torch.equal(in_memory.packed, weight.packed)
    assert torch.equal(weight.dequantize(dtype), in_memory.dequantize(dtype))
    part = weight[5:30]
    assert part.is_mapped
    assert torch.equal(part.dequantize(dtype), in_memory.dequantize(dtype)[5:30])


@pytest.mark.simgpu
def test_a_weight_in_a_file_comes_to_a_device_with_all_of_its_bytes(simgpu, mapped):
    weight = mapped("Q4_K")
    for moved in (weight.to("simgpu"), weight.bfloat16().to("simgpu", torch.float32)):
        assert moved.source is None
        assert torch.equal(moved.packed.cpu(), weight.packed)


def test_operations_on_a_weight_in_a_file_read_the_file(mapped, monkeypatch):
    weight = mapped("Q4_K")
    expected = weight.clone()
    read = []
    original = FileSlice.read_into
    monkeypatch.setattr(FileSlice, "read_into", lambda *args: read.append(args) or original(*args))
    for operation in (
        lambda tensor: tensor.dequantize(),
        lambda tensor: tensor.clone(),
        lambda tensor: torch.cat((tensor, tensor)),
        lambda tensor: copy.deepcopy(tensor),
        lambda tensor: pickle.loads(pickle.dumps(tensor)),
        lambda tensor: F.linear(torch.ones(2, 1024, dtype=tensor.dtype), tensor),
    ):
        read.clear()
        result, wanted = operation(weight), operation(expected)
        assert read
        assert torch.equal(*(x.packed if isinstance(x, PackedTensor) else x for x in (result, wanted)))


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(mapped, monkeypatch):
    def fails(file, offset, buffer):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    weight = mapped("Q4_K")
    monkeypatch.setattr(MappedFile, "_read_once", fails)
    for operation in (weight.dequantize, weight.clone):
        with pytest.raises(OSError, match=r"model\.gguf"):
            operation()
