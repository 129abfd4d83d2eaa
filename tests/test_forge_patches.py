"""Replacing attributes of a host and putting back exactly what was there."""

from __future__ import annotations

import types

import pytest

from lib_qswap.forge.patches import Patch, PatchTable


def double(original, *args, **kwargs):
    return 2 * original(*args, **kwargs)


@pytest.fixture
def host():
    module = types.ModuleType("host")

    class Base:
        def inherited(self):
            return 1

    class Loaded(Base):
        size = 10

        def method(self, add=0):
            return self.size + add

        @staticmethod
        def static(x):
            return x

        @classmethod
        def made(cls, x):
            return cls.size + x

    def function(x, *, y=1):
        """What it does."""
        return x * y

    module.function, module.Loaded, module.Base = function, Loaded, Base
    return module


def test_a_module_function_is_replaced_and_receives_the_original(host):
    patch = Patch(host, "function", double)
    patch.apply()
    assert host.function(3, y=2) == 12
    assert host.function.__doc__ == "What it does."


def test_restoring_puts_the_same_object_back(host):
    before = host.function
    patch = Patch(host, "function", double)
    patch.apply()
    assert patch.original is before
    patch.restore()
    assert host.function is before
    assert not patch.active


@pytest.mark.parametrize(("name", "call"), [("method", (1,)), ("static", (4,)), ("made", (5,))])
def test_methods_keep_their_kind_of_descriptor(host, name, call):
    raw = vars(host.Loaded)[name]
    expected = getattr(host.Loaded(), name)(*call)
    patch = Patch(host.Loaded, name, double)
    patch.apply()
    assert type(vars(host.Loaded)[name]) is type(raw)
    assert getattr(host.Loaded(), name)(*call) == 2 * expected
    patch.restore()
    assert vars(host.Loaded)[name] is raw


def test_an_inherited_method_is_deleted_again(host):
    patch = Patch(host.Loaded, "inherited", double)
    patch.apply()
    assert (host.Loaded().inherited(), host.Base().inherited()) == (2, 1)
    patch.restore()
    assert "inherited" not in vars(host.Loaded)
    assert host.Loaded().inherited() == 1


def test_an_instance_can_be_the_owner(host):
    loaded = host.Loaded()
    patch = Patch(loaded, "method", double)
    patch.apply()
    assert (loaded.method(1), host.Loaded().method(1)) == (22, 11)
    patch.restore()
    assert vars(loaded) == {}


def test_a_replaced_class_still_works_as_a_class(host):
    original = host.Loaded
    made = []
    patch = Patch(host, "Loaded", lambda original, *args: made.append(args) or original(*args))
    patch.apply()
    instance = host.Loaded()

    class Child(host.Loaded):
        pass

    assert made == [()]
    assert isinstance(instance, host.Loaded)
    assert issubclass(Child, host.Loaded)
    assert host.Loaded.made(1) == 11
    patch.restore()
    assert host.Loaded is original


def test_applying_twice_replaces_once(host):
    table = PatchTable([Patch(host, "function", double)])
    before = host.function
    table.apply()
    table.apply()
    assert host.function(1) == 2
    table.restore()
    table.restore()
    assert host.function is before


def test_a_failure_midway_restores_what_was_applied_in_reverse_order(host):
    order = []

    class Recording(types.ModuleType):
        def __setattr__(self, name, value):
            order.append(name)
            super().__setattr__(name, value)

    recording = Recording("recording")
    vars(recording).update(one=lambda: 1, two=lambda: 2)
    before = dict(vars(recording))
    table = PatchTable(
        [Patch(recording, "one", double), Patch(recording, "two", double), Patch(recording, "three", double)]
    )
    with pytest.raises(AttributeError, match="three"):
        table.apply()
    assert order == ["one", "two", "two", "one"]
    assert dict(vars(recording)) == before
    assert not table.applied


def test_what_cannot_be_called_is_not_replaced(host):
    host.flag = 3
    with pytest.raises(TypeError, match="flag"):
        PatchTable([Patch(host, "function", double), Patch(host, "flag", double)]).apply()
    assert host.function(1) == 1


def test_the_same_attribute_twice_is_refused(host):
    with pytest.raises(ValueError, match=r"host\.function is to be replaced twice"):
        PatchTable([Patch(host, "function", double), Patch(host, "function", double)])


def wrap(host, plus):
    """What another extension does: a wrapper around whatever it finds."""
    inner = host.function

    def wrapper(x, **kwargs):
        return inner(x, **kwargs) + plus

    host.function = wrapper
    return wrapper


def test_a_wrapper_of_another_extension_stays_and_ours_passes_through(host):
    table = PatchTable([Patch(host, "function", double)])
    table.apply()
    wrapper = wrap(host, 100)
    assert host.function(3) == 106
    left = table.restore()
    assert host.function is wrapper
    assert host.function(3) == 103
    assert [str(patch) for patch in left] == ["host.function"]


def test_switching_on_again_below_a_wrapper_replaces_once(host):
    table = PatchTable([Patch(host, "function", double)])
    table.apply()
    wrapper = wrap(host, 100)
    for _ in range(3):
        table.restore()
        assert host.function(3) == 103
        table.apply()
        assert host.function is wrapper
        assert host.function(3) == 106


def test_a_second_wrapper_put_on_while_off_does_not_lead_to_replacing_twice(host):
    table = PatchTable([Patch(host, "function", double)])
    table.apply()
    wrap(host, 100)
    table.restore()
    wrap(host, 1000)
    table.apply()
    assert host.function(3) == 2 * (3 + 100 + 1000)


def test_when_the_other_extension_takes_its_wrapper_off_nothing_of_ours_stays(host):
    before = host.function
    table = PatchTable([Patch(host, "function", double)])
    table.apply()
    ours = host.function
    wrap(host, 100)
    table.restore()
    host.function = ours  # what a wrapper puts back when it goes
    table.restore()
    assert host.function is before


def test_a_wrapper_from_before_is_the_original_that_comes_back(host):
    wrapper = wrap(host, 100)
    table = PatchTable([Patch(host, "function", double)])
    table.apply()
    assert host.function(3) == 206
    table.restore()
    assert host.function is wrapper
