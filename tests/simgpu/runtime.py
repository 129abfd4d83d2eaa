"""torch.simgpu: what torch.cuda offers to code that moves weights around, for the simulated device."""

from __future__ import annotations

import contextlib
import types

import torch

from .build import load_extension

native = load_extension()
native.init()
torch.utils.rename_privateuse1_backend("simgpu")
_DEVICE_TYPE = int(torch._C._autograd.DeviceType.PrivateUse1)


class Stream(torch.Stream):
    """As torch.cuda.Stream: a new stream (a queue with a thread), or, with stream_id, a name for one."""

    def __new__(cls, device=None, priority=0, **kwargs):
        if "stream_id" in kwargs:
            return super().__new__(
                cls, stream_id=kwargs["stream_id"], device_index=0, device_type=_DEVICE_TYPE
            )
        return super().__new__(cls, device="simgpu:0", priority=priority)

    def record_event(self, event=None):
        """Records the event (a new one by default) after the work queued so far, and returns it."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_stream(self, stream):
        """Work queued here from now on runs after everything queued on the other stream so far."""
        mine = isinstance(stream, Stream)
        self.wait_event(stream.record_event() if mine else torch.Stream.record_event(stream))

    def __repr__(self):
        return f"<torch.simgpu.Stream id={self.stream_id}>"


class Event(torch.Event):
    """As torch.cuda.Event."""

    def __new__(cls, enable_timing=False, blocking=False, interprocess=False):
        return super().__new__(
            cls,
            device="simgpu:0",
            enable_timing=enable_timing,
            blocking=blocking,
            interprocess=interprocess,
        )

    def record(self, stream=None):
        """Records after what is queued on the stream (the current one by default)."""
        super().record(current_stream() if stream is None else stream)

    def wait(self, stream=None):
        """Makes the stream (the current one by default) wait for this event."""
        super().wait(current_stream() if stream is None else stream)

    def elapsed_time(self, end_event):
        """Milliseconds between two recorded and completed events."""
        return native.elapsed_ms(self.event_id, end_event.event_id)


def current_stream(device=None):
    """The stream that this thread's work goes to."""
    return Stream(stream_id=native.current_stream_id())


def default_stream(device=None):
    """The device's stream 0, where work runs at once unless async_compute is on."""
    return Stream(stream_id=0)


def set_stream(stream):
    """Makes the stream this thread's current one; None changes nothing."""
    if stream is not None:
        torch._C._accelerator_setStream(stream)


@contextlib.contextmanager
def stream(stream):
    """As torch.cuda.stream: the current stream of this thread inside the block; None changes nothing."""
    if stream is None:
        yield
        return
    old = current_stream()
    set_stream(stream)
    try:
        yield stream
    finally:
        set_stream(old)


def mem_get_info(device=None):
    """(free, total) bytes of device memory."""
    free, total = native.mem_get_info()
    return int(free), int(total)


def memory_allocated(device=None):
    """Bytes of device memory in tensors."""
    return int(native.memory()["allocated"])


def max_memory_allocated(device=None):
    """The most bytes in tensors since reset_peak_memory_stats()."""
    return int(native.memory()["peak_allocated"])


def memory_stats(device=None):
    """As torch.cuda.memory_stats, the keys that PyTorch fills for any accelerator."""
    return torch.accelerator.memory_stats()


def memory_reserved(device=None):
    """Bytes in tensors and, with cache_counts, in freed blocks kept for reuse."""
    return memory_stats().get("reserved_bytes.all.current", 0)


def max_memory_reserved(device=None):
    """The most bytes that memory_reserved() has been."""
    return memory_stats().get("reserved_bytes.all.peak", 0)


def reset_peak_memory_stats(device=None):
    """Peaks start anew from what is allocated now."""
    native.reset_peak()


def empty_cache():
    """Gives freed blocks that are kept for reuse back."""
    native.empty_cache()


def synchronize(device=None):
    """Waits for all streams; raises an error that queued work ended with."""
    native.synchronize()


def get_device_properties(device=None):
    """Name, total_memory and the other fields that programs read off a CUDA device."""
    return types.SimpleNamespace(
        name="Simulated GPU",
        total_memory=mem_get_info()[1],
        major=8,
        minor=9,
        multi_processor_count=1,
        warp_size=32,
        type="simgpu",
    )


class _Cudart:
    """The two calls of torch.cuda.cudart() that page-lock existing memory; they return CUDA's error codes. As
    there, a failure also leaves an error behind, which somebody else's work reports unless it is cleared."""

    _CODES = (("already", 712), ("registered", 713), ("out of memory", 2))
    _UNKNOWN = 1

    @classmethod
    def _code(cls, call, *arguments):
        try:
            call(*arguments)
        except RuntimeError as error:
            native.leave_error(str(error))
            by_text = (code for text, code in cls._CODES if text in str(error))
            return getattr(error, "error_code", 0) or next(by_text, cls._UNKNOWN)
        return 0

    @classmethod
    def cudaHostRegister(cls, pointer, nbytes, flags=0):
        return cls._code(native.host_register, int(pointer), int(nbytes))

    @classmethod
    def cudaHostUnregister(cls, pointer):
        return cls._code(native.host_unregister, int(pointer))


def _device_module() -> types.ModuleType:
    """torch.simgpu: the functions above and what else torch.cuda's callers expect to find."""
    module = types.ModuleType("torch.simgpu", "the simulated accelerator, as torch.cuda")
    generator = native.default_generator()
    vars(module).update(
        Event=Event,
        OutOfMemoryError=torch.OutOfMemoryError,
        Stream=Stream,
        _is_in_bad_fork=lambda: False,
        _lazy_init=lambda: None,
        cudart=_Cudart,
        current_device=lambda: 0,
        current_stream=current_stream,
        default_generators=(generator,),
        default_stream=default_stream,
        device=lambda device=None: contextlib.nullcontext(),
        device_count=lambda: 1,
        empty_cache=empty_cache,
        get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
        get_device_capability=lambda device=None: (8, 9),
        get_device_name=lambda device=None: "Simulated GPU",
        get_device_properties=get_device_properties,
        get_rng_state=lambda *device: generator.get_state(),
        init=lambda: None,
        initial_seed=generator.initial_seed,
        ipc_collect=lambda: None,
        is_available=lambda: True,
        is_bf16_supported=lambda *including_emulation: True,
        is_initialized=lambda: True,
        manual_seed=generator.manual_seed,
        manual_seed_all=generator.manual_seed,
        max_memory_allocated=max_memory_allocated,
        max_memory_reserved=max_memory_reserved,
        mem_get_info=mem_get_info,
        memory=module,  # the names of torch.cuda.memory
        memory_allocated=memory_allocated,
        memory_reserved=memory_reserved,
        memory_stats=memory_stats,
        reset_max_memory_allocated=reset_peak_memory_stats,
        reset_peak_memory_stats=reset_peak_memory_stats,
        seed=generator.seed,
        seed_all=generator.seed,
        set_device=lambda device: None,
        set_rng_state=lambda state, *device: generator.set_state(state),
        set_stream=set_stream,
        stream=stream,
        synchronize=synchronize,
    )
    return module


torch._register_device_module("simgpu", _device_module())
torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)

# Until torch has initialized an accelerator, is_pinned() says no to everything, host_register'ed memory too.
torch.empty(1).pin_memory()
