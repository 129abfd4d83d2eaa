"""The ring's bookkeeping: slots never overlap or wrap, and are written again only behind their readers."""

import random

import pytest

from lib_qswap.swap.ring import Ring


def test_slots_are_taken_in_order_and_reused_from_the_start_when_the_oldest_is_released():
    ring = Ring(100)
    first, second = ring.take(40), ring.take(40)
    assert (first.offset, second.offset) == (0, 40)
    assert ring.take(40) is None
    ring.release(first, "first read")
    third = ring.take(40)  # 20 bytes before the buffer's end are too short and are skipped
    assert third.offset == 0
    assert ring.wait_for(third) == ["first read"]


def test_a_slot_that_is_released_early_does_not_make_room_before_older_ones_are():
    ring = Ring(100)
    first, second = ring.take(50), ring.take(50)
    ring.release(second, "second read")
    assert ring.take(10) is None
    ring.release(first, "first read")
    third = ring.take(100)
    assert third.offset == 0
    assert sorted(ring.wait_for(third)) == ["first read", "second read"]


def test_a_payload_of_exactly_the_ring_fits_and_a_larger_one_does_not():
    ring = Ring(64)
    assert ring.take(65) is None
    slot = ring.take(64)
    assert (slot.offset, slot.end - slot.start) == (0, 64)
    assert ring.take(1) is None


def test_a_ring_of_no_bytes_gives_no_slots():
    assert Ring(0).take(1) is None


def test_the_newest_slot_is_discarded_as_if_it_had_never_been():
    ring = Ring(100)
    first, second = ring.take(10), ring.take(10)
    ring.discard(second)
    assert ring.take(90).offset == 10
    assert ring.take(1) is None
    assert first.offset == 0


def test_a_slot_discarded_before_others_is_free_once_those_before_it_are():
    ring = Ring(100)
    first, second, third = ring.take(30), ring.take(30), ring.take(30)
    ring.discard(second)
    assert ring.take(40) is None
    ring.release(first, "first read")
    again = ring.take(40)
    assert again.offset == 0
    assert ring.wait_for(again) == ["first read"], "nobody has read the second"
    ring.release(third, "third read")


def test_discarding_a_slot_that_had_skipped_the_end_gives_the_skipped_bytes_back():
    ring = Ring(100)
    first = ring.take(70)
    ring.release(first, "first read")
    skipped = ring.take(60)
    assert skipped.offset == 0
    ring.discard(skipped)
    assert ring.take(30).offset == 70


@pytest.mark.parametrize("seed", range(20))
def test_whatever_the_order_of_use_a_slot_waits_for_everyone_who_read_its_bytes_before(seed):
    pick = random.Random(seed)
    capacity = pick.choice([97, 256, 1000])
    ring = Ring(capacity)
    live: list[tuple] = []  # (slot, serial), oldest first
    last_reader: list[set[int]] = [set() for _ in range(capacity)]  # since it was last waited for
    waited: set[int] = set()
    taken = 0
    for serial in range(400):
        action = pick.random()
        if action < 0.55:
            nbytes = pick.randint(1, capacity // pick.choice([1, 3, 8]))
            slot = ring.take(nbytes)
            if slot is None:
                assert live, "an empty ring refused a slot"
                continue
            taken += 1
            place = range(slot.offset, slot.offset + nbytes)
            assert place.start >= 0
            assert place.stop <= capacity
            for other, _ in live:
                span = range(other.offset, other.offset + other.end - other.start)
                assert place.stop <= span.start or span.stop <= place.start, "two live slots overlap"
            waited.update(ring.wait_for(slot))  # the copy stream works in order: waited for once is enough
            assert set().union(*(last_reader[byte] for byte in place)) <= waited
            live.append((slot, serial))
        elif action < 0.65 and live:
            slot, _ = live.pop(-1 if action < 0.6 else pick.randrange(len(live)))
            ring.discard(slot)
        elif live:
            slot, owner = live.pop(pick.randrange(len(live)))
            ring.release(slot, owner)
            for byte in range(slot.offset, slot.offset + slot.end - slot.start):
                last_reader[byte].add(owner)
    assert taken > 50


def test_events_that_were_waited_for_are_not_kept():
    ring = Ring(100)
    for serial in range(1000):
        slot = ring.take(40)
        ring.wait_for(slot)
        ring.release(slot, serial)
    assert len(ring._retired) <= 3
