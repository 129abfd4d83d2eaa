"""The controls of the simulation: settings, counters, hazards and failures on demand."""

from __future__ import annotations

import atexit
import contextlib

from .runtime import native


def config(**changes):
    """Changes settings, and returns all of them. README.md lists them; bytes, bytes/s and seconds."""
    for key, value in changes.items():
        native.set_config(key, float(value))
    return native.get_config()


@contextlib.contextmanager
def settings(**changes):
    """config(), undone at the end of the block."""
    old = native.get_config()
    config(**changes)
    try:
        yield
    finally:
        config(**{key: old[key] for key in changes})


def set_total(nbytes):
    """The device's memory capacity."""
    config(total=nbytes)


def set_pin_limit(nbytes=None):
    """The most page-locked bytes; None: no limit."""
    config(pin_limit=-1 if nbytes is None else nbytes)


def set_bandwidth(h2d=None, pageable=None, d2h=None, latency=None):
    """bytes/s (0 = as fast as memcpy) and seconds; None leaves a value as it is."""
    given = {"h2d": h2d, "pageable": pageable, "d2h": d2h, "latency": latency}
    config(**{key: value for key, value in given.items() if value is not None})


def set_poison(byte=0xC5):
    """What free and fresh device memory is filled with; None: it is left as it is."""
    config(poison=-1 if byte is None else byte)


def set_compute(op_seconds=0.0, op_factor=1.0):
    """What every compute operator takes on top of its CPU time, and what that time is multiplied by."""
    config(op_seconds=op_seconds, op_factor=op_factor)


def set_async_compute(on):
    """True: the default stream is a queue too: the caller launches compute and does not wait for it."""
    config(async_compute=bool(on))


def set_virtual_time(on):
    """True: nothing sleeps. Device and host have clocks that transfers, `busy` and `op_seconds` move on, so
    that times do not depend on the machine."""
    config(virtual_time=bool(on))


def now():
    """The calling thread's clock in seconds: the machine's, or with virtual time its own."""
    return native.now()


def busy(seconds):
    """The current stream computes that long (the default one: this thread does, without the GIL)."""
    native.busy(float(seconds))


def _counters(values):
    return {key: value if key.endswith("_s") else int(value) for key, value in values.items()}


def stats():
    """Counters since reset_stats(): copies by kind (h2d_pinned_n, h2d_pinned_bytes, ...), engine and waiting
    times in seconds, memory in bytes; ["streams"][id] has those of one stream."""
    result = _counters(native.stats())
    result["streams"] = {key: _counters(value) for key, value in native.stream_stats().items()}
    return result


def reset_stats():
    """Forgets counters and peaks."""
    native.reset_stats()


def hazards():
    """How often each kind of hazard was seen since reset_hazards(); README.md says what each means."""
    return native.hazards()


def hazard_log():
    """The latest hazards in words."""
    return native.hazard_log()


def reset_hazards():
    """Forgets the hazards seen so far."""
    native.reset_hazards()


def not_deferred():
    """{operator: (how often, why)}: what could not be queued on a stream, and was run by the caller."""
    return native.not_deferred()


def host_register(pointer, nbytes):
    """As cudaHostRegister: page-locks existing memory. RuntimeError beyond the pin limit or on overlap."""
    native.host_register(int(pointer), int(nbytes))


def host_unregister(pointer):
    """As cudaHostUnregister. RuntimeError where nothing is registered."""
    native.host_unregister(int(pointer))


def fail_next_pinned(k=1):
    """The k-th page-locked allocation (or host_register) from now fails; 0 cancels."""
    native.fail("pinned", k)


def fail_next_device(k=1):
    """The k-th device allocation from now raises torch.OutOfMemoryError; 0 cancels."""
    native.fail("device", k)


def fail_next_copy(k=1):
    """The k-th host<->device copy from now raises, at the call; 0 cancels."""
    native.fail("copy", k)


def reset():
    """Synchronises, then forgets counters, hazards and injected failures (settings stay)."""
    for kind in ("pinned", "device", "copy"):
        native.fail(kind, 0)
    try:
        native.synchronize()
    finally:
        native.reset_stats()
        native.reset_hazards()


@atexit.register
def _finish_queued_work():
    with contextlib.suppress(RuntimeError):  # an error in queued work that nobody asked for
        native.synchronize()
