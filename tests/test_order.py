"""What the order of execution predicts: traced in one cycle, confirmed in the next."""

from lib_qswap.swap.order import Order


def play(order, root, layers):
    """One forward; returns how many uses were not predicted."""
    order.begin(root)
    missed = 0
    for layer in layers:
        missed += order.ahead(0, wrap=False) != layer
        order.use(layer)
    return missed


def upcoming(order, count, *, wrap):
    return [order.ahead(i, wrap=wrap) for i in range(count)]


def test_the_expected_order_is_predicted_in_the_first_forward():
    order = Order()
    order.expect("unet", "abc")
    order.begin("unet")
    assert upcoming(order, 4, wrap=False) == ["a", "b", "c", None]
    assert play(order, "unet", "abc") == 0


def test_an_order_other_than_expected_is_learnt_in_one_forward():
    order = Order()
    order.expect("unet", "abc")
    assert play(order, "unet", "cab") > 0
    assert play(order, "unet", "cab") == 0
    assert play(order, "unet", "cab") == 0


def test_layers_that_were_overtaken_are_still_expected_next():
    order = Order()
    order.expect("unet", "abcdef")
    order.begin("unet")
    assert all(order.use(layer) for layer in "ad")
    assert upcoming(order, 5, wrap=False) == ["b", "c", "e", "f", None]
    assert all(order.use(layer) for layer in "bc")
    assert upcoming(order, 3, wrap=False) == ["e", "f", None]


def test_two_streams_of_blocks_that_were_defined_one_after_the_other_cost_one_miss_for_each_change():
    order = Order()
    order.expect("flux", ["im", "iq", "ip", "i0", "i2", "tm", "tq", "tp", "t0", "t2", "next"])
    ran = ["im", "tm", "iq", "tq", "ip", "i0", "i2", "tp", "t0", "t2", "next"]
    order.begin("flux")
    for layer in ran:
        assert order.use(layer), "what had been fetched is dropped"
    assert play(order, "flux", ran) == 0


def test_layers_that_are_not_used_at_their_turn_nor_after_the_next_one_are_skipped():
    order = Order()
    order.expect("unet", "abcdef")
    order.begin("unet")
    assert order.use("a")
    assert order.use("d")
    assert not order.use("e"), "b and c may have been fetched, and are not expected any more"
    assert upcoming(order, 2, wrap=False) == ["f", None]


def test_an_order_that_was_only_seen_in_part_keeps_what_was_not_seen():
    order = Order()
    order.expect("unet", "abcdef")
    play(order, "unet", "cab")  # raised
    order.begin("unet")
    assert upcoming(order, 7, wrap=False) == ["c", "a", "b", "d", "e", "f", None]


def test_with_wrap_the_next_cycle_follows_up_to_one_whole_cycle():
    order = Order()
    order.expect("unet", "abcd")
    order.begin("unet")
    order.use("a")
    order.use("b")
    assert upcoming(order, 6, wrap=True) == ["c", "d", "a", "b", None, None]
    assert upcoming(order, 4, wrap=False) == ["c", "d", None, None]


def test_a_forward_in_the_known_order_confirms_what_was_fetched_ahead():
    order = Order()
    order.expect("unet", "abc")
    play(order, "unet", "abc")
    assert order.begin("unet")


def test_a_forward_that_went_another_way_invalidates_what_was_fetched_ahead():
    order = Order()
    order.expect("unet", "abc")
    play(order, "unet", "abac")
    assert not order.begin("unet")


def test_a_layer_used_twice_in_a_forward_is_predicted_twice():
    order = Order()
    order.expect("unet", "abc")
    play(order, "unet", "abab")
    assert play(order, "unet", "abab") == 0
    order.begin("unet")
    assert upcoming(order, 4, wrap=False) == list("abab")


def test_a_skipped_layer_costs_two_misses_and_the_rest_is_predicted():
    order = Order()
    order.expect("unet", "abcdef")
    assert play(order, "unet", "abdef") == 2
    assert play(order, "unet", "abdef") == 0


def test_an_unknown_layer_costs_one_miss_and_the_rest_is_predicted():
    order = Order()
    order.expect("unet", "abc")
    assert play(order, "unet", "axbc") == 1


def test_models_that_alternate_make_one_cycle():
    order = Order()
    order.expect("control", "xy")
    order.expect("unet", "abc")
    misses = [play(order, "control", "xy") + play(order, "unet", "abc") for _ in range(4)]
    assert misses[2:] == [0, 0]
    order.begin("control")
    order.use("x")
    assert upcoming(order, 5, wrap=True) == ["y", "a", "b", "c", "x"]


def test_the_first_cycle_of_alternating_models_is_predicted_as_far_as_each_is_known():
    order = Order()
    order.expect("control", "xy")
    order.expect("unet", "abc")
    assert play(order, "control", "xy") == 0
    assert play(order, "unet", "abc") == 0


def test_a_text_encoder_before_the_loop_does_not_disturb_the_loop_for_long():
    order = Order()
    order.expect("text", "tuv")
    order.expect("unet", "abc")
    for _generation in range(2):
        play(order, "text", "tuv")
        misses = [play(order, "unet", "abc") for _ in range(5)]
        assert misses[2:] == [0, 0, 0]


def test_a_cycle_repeats_only_after_the_same_model_ran_twice_in_a_row():
    order = Order()
    order.expect("text", "tuv")
    order.begin("text")
    assert not order.repeats
    play(order, "text", "tuv")
    assert order.repeats


def test_the_layers_of_a_forgotten_model_are_in_nobodys_cycle():
    order = Order()
    order.expect("control", "xy")
    order.expect("unet", "abc")
    for _ in range(3):
        play(order, "unet", "abc")
        play(order, "control", "xy")
    order.forget("control")
    order.begin("unet")
    assert upcoming(order, 6, wrap=True) == ["a", "b", "c", None, None, None]
    play(order, "unet", "abc")
    assert play(order, "unet", "abc") == 0


def test_layers_that_a_model_no_longer_swaps_are_in_nobodys_cycle():
    order = Order()
    order.expect("control", "xy")
    order.expect("unet", "abc")
    for _ in range(3):
        play(order, "control", "xy")
        play(order, "unet", "abc")
    order.expect("unet", "ac")  # b has become resident
    order.begin("control")
    assert upcoming(order, 5, wrap=True) == ["x", "y", "a", "c", None]
    assert play(order, "control", "xy") + play(order, "unet", "ac") == 0


def test_a_forward_that_broke_off_does_not_shorten_what_is_known():
    order = Order()
    order.expect("unet", "abcdef")
    play(order, "unet", "abcdef")
    play(order, "unet", "ab")  # raised
    assert play(order, "unet", "abcdef") == 0


def test_a_cycle_that_has_become_shorter_is_learnt_when_it_comes_again():
    order = Order()
    order.expect("unet", "abcdef")
    for _ in range(3):
        play(order, "unet", "abc")
    order.begin("unet")
    assert upcoming(order, 4, wrap=False) == ["a", "b", "c", None]


def test_a_text_encoder_for_the_next_image_does_not_become_part_of_the_loop():
    order = Order()
    order.expect("text", "tuv")
    order.expect("unet", "abc")
    for _ in range(3):
        play(order, "unet", "abc")
    play(order, "text", "tuv")
    play(order, "unet", "abc")
    order.begin("unet")
    assert upcoming(order, 4, wrap=False) == ["a", "b", "c", None]


def test_a_model_that_joins_a_running_loop_is_learnt_in_one_cycle():
    order = Order()
    order.expect("control", "xy")
    order.expect("unet", "abc")
    for _ in range(3):
        play(order, "unet", "abc")
    misses = [play(order, "control", "xy") + play(order, "unet", "abc") for _ in range(3)]
    assert misses[1:] == [0, 0]
    assert order.repeats
    misses = [play(order, "unet", "abc") for _ in range(3)]  # and leaves it again
    assert misses[1:] == [0, 0]
