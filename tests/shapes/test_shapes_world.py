"""The demo world: deterministic, unambiguous, and of disjoint splits."""

import numpy as np
import PIL.Image
import pytest

from viscpm_hf.shapes import COLOURS, KINDS, LANGUAGES, SPLITS, ShapesDataset, draw, make_scene
from viscpm_hf.tiny.scene import MARGIN, MAX_SIZES, MIN_SIZE, layout_split
from viscpm_hf.tiny.words import SHADES, language_of


SCENES = [make_scene("train", index) for index in range(150)]


def test_the_world_is_as_large_as_promised():
    assert {"circle", "square", "triangle", "star"} <= set(KINDS)
    assert len(COLOURS) >= 8 and set(SHADES) == set(COLOURS)
    for name in (*KINDS.values(), *COLOURS.values()):
        assert {language_of(word) for word in name.en} == {"en"}
        assert {language_of(word) for word in name.zh} == {"zh"}
    assert {len(scene.shapes) for scene in SCENES} == {1, 2, 3}
    assert {shape.kind for scene in SCENES for shape in scene.shapes} == set(KINDS)
    assert {shape.colour for scene in SCENES for shape in scene.shapes} == set(COLOURS)


def test_shapes_lie_apart_and_inside():
    for scene in SCENES:
        for number, shape in enumerate(scene.shapes):
            assert MIN_SIZE <= shape.size <= MAX_SIZES[len(scene.shapes)]
            xs, ys = zip(*shape.points, strict=True)
            assert max(max(xs) - min(xs), max(ys) - min(ys)) == pytest.approx(shape.size)
            assert min(*xs, *ys) >= MARGIN - 1e-9 and max(*xs, *ys) <= 1 - MARGIN + 1e-9
            for other in scene.shapes[:number]:
                assert (shape.kind, shape.colour) != (other.kind, other.colour)
                reach = (shape.size + other.size) / 2
                assert abs(shape.x - other.x) > reach or abs(shape.y - other.y) > reach


def test_an_index_is_always_the_same_picture():
    for split in SPLITS:
        first, second = (draw(make_scene(split, 3), 64) for _ in range(2))
        assert first.tobytes() == second.tobytes()
    assert make_scene("train", 0) != make_scene("train", 1)
    assert make_scene("train", 0) != make_scene("test", 0)


def test_no_layout_is_in_two_splits():
    for split in SPLITS:
        assert {layout_split(make_scene(split, index)) for index in range(20)} == {split}


@pytest.mark.parametrize("size", [48, 64, 225])
def test_a_picture_has_its_shapes_where_the_scene_says(size):
    for scene in SCENES[:40]:
        image = draw(scene, size)
        assert image.size == (size, size) and image.mode == "RGB"
        pixels = np.asarray(image, dtype=int)
        for shape in scene.shapes:
            xs, ys = zip(*shape.points, strict=True)
            row, column = int(sum(ys) / len(ys) * size), int(sum(xs) / len(xs) * size)
            assert np.abs(pixels[row, column] - shape.rgb).max() <= 2


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="splits are train, validation, test, got 'dev'"):
        make_scene("dev", 0)
    with pytest.raises(ValueError, match="at least 1 pixel"):
        draw(SCENES[0], 0)


def test_the_dataset_is_made_of_training_records():
    dataset = ShapesDataset("validation", 12, turns=2, image_size=40)
    assert len(dataset) == 12
    languages = set()
    for index in range(len(dataset)):
        record = dataset[index]
        assert isinstance(record["image"], PIL.Image.Image) and record["image"].size == (40, 40)
        speakers = [message["from"] for message in record["conversations"]]
        assert speakers == ["human", "gpt"] * (len(speakers) // 2) and len(speakers) >= 4
        assert record["conversations"] == dataset[index]["conversations"]
        languages.add(language_of(record["conversations"][-1]["value"]))
    assert languages == set(LANGUAGES)
    with pytest.raises(IndexError):
        dataset[12]
