from collections import Counter

from vlbench.data.shapes.world import CLASS_NAMES, COLOURS, COMBOS, GROUPS, HELD_OUT, PARTS, SEEN, SHAPES, STREAMS


def test_classes_are_all_combinations_once():
    assert len(CLASS_NAMES) == len(set(CLASS_NAMES)) == 48
    assert {*SEEN} | {*HELD_OUT} == {*COMBOS}
    assert not {*SEEN} & {*HELD_OUT}


def test_held_out_combinations_spread_over_all_shapes_and_colours():
    assert len(HELD_OUT) == 12
    assert set(Counter(combo.colour for combo in HELD_OUT).values()) == {2}
    assert {combo.colour for combo in HELD_OUT} == set(COLOURS)
    assert set(Counter(combo.shape for combo in HELD_OUT).values()) <= {1, 2}
    assert {combo.shape for combo in HELD_OUT} == set(SHAPES)


def test_streams_never_share_their_random_numbers():
    assert len({stream.number for stream in STREAMS.values()}) == len(STREAMS)


def test_only_the_classification_sets_may_show_held_out_combinations():
    assert {name for name, stream in STREAMS.items() if stream.held_out} == {
        "classes/train",
        "classes/val",
        "classes/test",
    }


def test_every_part_is_in_one_group():
    assert sorted(PARTS) == sorted({part for parts in GROUPS.values() for part in parts})
    assert len(PARTS) == 11
