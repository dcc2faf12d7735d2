import math
from collections import Counter

import numpy as np
import pytest

from vlbench.data.shapes.scene import relation, sample_scene
from vlbench.data.shapes.world import COMBOS, HELD_OUT, OPPOSITE, SEEN, STREAMS


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(0, "pairs", index) for index in range(800)]


def test_scene_depends_on_its_three_arguments_only():
    once, again = sample_scene(3, "pairs", 17), sample_scene(3, "pairs", 17)
    assert once == again
    others = [sample_scene(4, "pairs", 17), sample_scene(3, "labels", 17), sample_scene(3, "pairs", 18)]
    assert all(other.objects != once.objects for other in others)


def test_scene_sampling_leaves_the_global_random_state_alone():
    before = np.random.get_state()[1].copy()
    sample_scene(0, "pairs", 1)
    assert (np.random.get_state()[1] == before).all()


@pytest.mark.parametrize("stream", [name for name, rules in STREAMS.items() if not rules.held_out])
def test_training_scenes_hold_no_held_out_combination_at_all(stream):
    shown = {item.combo for index in range(600) for item in sample_scene(0, stream, index).objects}
    assert not shown & set(HELD_OUT)
    assert shown == set(SEEN)


def test_classification_scenes_show_every_combination_in_turn():
    mains = [sample_scene(0, "classes/test", index).main.combo for index in range(2 * len(COMBOS))]
    assert mains == [*COMBOS, *COMBOS]


def test_main_object_is_the_largest_and_in_front(scenes):
    for scene in scenes:
        assert all(other.radius < 0.7 * scene.main.radius for other in scene.others)
        assert all(other.depth < scene.main.depth for other in scene.others)


def test_objects_lie_inside_and_differ(scenes):
    for scene in scenes:
        for item in scene.objects:
            assert item.radius <= item.x <= 1 - item.radius
            assert item.radius <= item.y <= 1 - item.radius
        assert len({item.combo for item in scene.objects}) == len(scene.objects)


def test_scenes_hold_one_to_three_objects(scenes):
    counts = Counter(len(scene.objects) for scene in scenes)
    assert set(counts) == {1, 2, 3}
    assert min(counts.values()) > 100


def test_relations_of_the_main_object_are_plain_to_see(scenes):
    for scene in scenes:
        for place, other in enumerate(scene.others, start=1):
            dx, dy = abs(scene.main.x - other.x), abs(scene.main.y - other.y)
            assert min(dx, dy) < max(dx, dy) * math.tan(math.radians(28))
            assert scene.relation(place, 0) == OPPOSITE[scene.relation(0, place)]


def test_relation_reads_y_downwards(scenes):
    scene = next(scene for scene in scenes if len(scene.objects) == 3)
    for (i, j), name in scene.relations().items():
        first, second = scene.objects[i], scene.objects[j]
        assert relation(first, second) == name
        if name == "above":
            assert first.y < second.y
        if name == "left of":
            assert first.x < second.x
