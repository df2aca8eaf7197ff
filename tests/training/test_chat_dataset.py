"""Which samples are trained, what is said of the others, and in which order they are drawn."""

import io
from collections import Counter
from pathlib import Path

import PIL.Image
import pytest
from chat_training_support import colour_rows, conversation, half_a_picture, write_rows

from viscpm_hf.training.chat_dataset import (
    MAX_REPORTED_ROWS,
    ChatDataset,
    Draws,
    MixtureSampler,
    SampleLimits,
    sample_length,
)
from viscpm_hf.training.data_files import DataPart
from viscpm_hf.training.records import BadRowError


def dataset_of(processor, *data, images=None, max_length=512, min_side=2, bad_rows="skip") -> ChatDataset:
    parts = [DataPart.open(str(name)) for name in data]
    return ChatDataset(parts, processor, SampleLimits(max_length, min_side, bad_rows), images)


def test_one_sample_for_every_answered_turn(golden, processor, tmp_path):
    rows = colour_rows(4)
    dataset = dataset_of(processor, write_rows(tmp_path / "d.json", rows), images=golden.folder)
    assert len(dataset) == 8 and dataset.skipped.total == 0
    answers = [dataset[index].answer for index in range(8)]
    assert answers == [turn["value"] for row in rows for turn in row["conversations"][1::2]]
    assert dataset[3].source.endswith("d.json line 2")
    assert dataset[3].images == (golden.image(1),)
    assert list(dataset.lengths) == [sample_length(processor, dataset[index]) for index in range(8)]


def test_images_lie_beside_the_data(golden, processor, tmp_path):
    PIL.Image.open(golden.image(0)).save(tmp_path / "here.png")
    dataset = dataset_of(processor, write_rows(tmp_path / "d.jsonl", [conversation("here.png", ("q", "a"))]))
    assert dataset[0].images == (tmp_path / "here.png",)


def test_bad_rows_are_reported_with_their_line_and_skipped(golden, processor, tmp_path, caplog):
    rows = [
        *colour_rows(1),
        conversation("missing.png", ("q", "a")),
        conversation("vocab.txt", ("q", "a")),
        {"conversations": "nothing"},
        conversation(
            "image_0.png",
            (
                "q",
                "<unpaired \n",
            ),
        )
        | {"conversations": [{"from": "human"}]},
        *colour_rows(1),
    ]
    path = write_rows(tmp_path / "d.jsonl", rows)
    Path(path).write_text(Path(path).read_text() + "\n{broken\n")
    dataset = dataset_of(processor, path, images=golden.folder)
    assert len(dataset) == 4
    assert dataset.skipped.bad == 5
    for line, reason in (
        (2, "no image file"),
        (3, "not an image file"),
        (4, "list of turns"),
        (5, "'value'"),
        (7, "JSON"),
    ):
        assert any(f"line {line}: " in report and reason in report for report in dataset.skipped.reports), line
    assert "line 2" in caplog.text
    with pytest.raises(BadRowError, match="line 2: .*missing.png"):
        dataset_of(processor, path, images=golden.folder, bad_rows="fail")


def test_reports_end_but_counts_go_on(golden, processor, tmp_path):
    rows = [*colour_rows(1), *[{"no": "row"}] * (MAX_REPORTED_ROWS + 30)]
    dataset = dataset_of(processor, write_rows(tmp_path / "d.jsonl", rows), images=golden.folder)
    assert dataset.skipped.bad == MAX_REPORTED_ROWS + 30
    assert len(dataset.skipped.reports) == MAX_REPORTED_ROWS + 1


def test_too_long_samples_are_skipped_and_counted(golden, processor, tmp_path):
    rows = [conversation("image_0.png", ("q", "a"), ("q2", "z" * 300), ("q3", "a")), *colour_rows(1)]
    path = write_rows(tmp_path / "d.json", rows)
    dataset = dataset_of(processor, path, images=golden.folder, max_length=120)
    assert dataset.skipped.too_long == 1  # and the turn after it, which has it in its context, isn't there either
    assert "turn 2" in dataset.skipped.reports[0] and "more than max_length 120" in dataset.skipped.reports[0]
    assert [dataset[index].answer for index in range(len(dataset))][0] == "a"
    assert len(dataset) == 3 and max(dataset.lengths) <= 120


def test_small_pictures_are_skipped_and_counted(golden, processor, tmp_path):
    for side in (40, 41):
        PIL.Image.new("RGB", (50, side)).save(tmp_path / f"{side}.png")
    rows = [conversation(image, ("q", "a"), ("q", "a")) for image in ("40.png", "41.png", None)]
    path = write_rows(tmp_path / "d.json", rows)
    assert dataset_of(processor, path, min_side=40).skipped.total == 0
    dataset = dataset_of(processor, path, min_side=41)
    assert dataset.skipped.too_small == 1 and len(dataset) == 4
    assert "line 1: a picture of 50x40 pixels is smaller than min_image_side 41" in dataset.skipped.reports[0]


@pytest.fixture
def parquet(golden, tmp_path) -> Path:
    """A good picture, one that is too small, one that is none, and one that breaks off."""
    import datasets

    small = io.BytesIO()
    PIL.Image.new("RGB", (9, 40)).save(small, "PNG")
    pictures = (golden.image(0).read_bytes(), small.getvalue(), b"no picture", half_a_picture())
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    rows = [{"image": {"bytes": picture, "path": None}, "caption": "a circle"} for picture in pictures]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "rows.parquet")
    return tmp_path / "rows.parquet"


def test_pictures_in_tables_are_measured_as_those_in_files(processor, parquet):
    dataset = dataset_of(processor, parquet, min_side=10)
    assert (len(dataset), dataset.skipped.bad, dataset.skipped.too_small) == (1, 2, 1)
    small, none, half = dataset.skipped.reports
    assert "row 2: a picture of 9x40 pixels" in small and "row 3: " in none
    assert "row 4: " in half and "truncated" in half
    with pytest.raises(BadRowError, match="row 3: "):
        dataset_of(processor, parquet, bad_rows="fail")


def test_pictures_that_break_off_are_known_in_the_beginning(processor, tmp_path):
    (tmp_path / "half.jpg").write_bytes(half_a_picture())
    path = write_rows(tmp_path / "d.json", [conversation("half.jpg", ("q", "a")), conversation(None, ("q", "a"))])
    dataset = dataset_of(processor, path)
    assert len(dataset) == 1 and dataset.skipped.bad == 1 and "truncated" in dataset.skipped.reports[0]


def test_decompression_bombs_are_bad_rows(golden, processor, tmp_path, monkeypatch):
    monkeypatch.setattr(type(processor.image_processor), "max_image_pixels", 100)
    processor.image_processor.max_image_pixels = 100
    try:
        path = write_rows(tmp_path / "d.json", [*colour_rows(1), conversation(None, ("q", "a"))])
        dataset = dataset_of(processor, path, images=golden.folder)
    finally:
        del processor.image_processor.max_image_pixels
    assert dataset.skipped.bad == 1 and "at most 100 are accepted" in dataset.skipped.reports[0]


@pytest.mark.parametrize(
    ("rows", "message"), [([], "has no rows"), ([{"no": "row"}], "of 1 rows, 1 bad.*first: .*line 1: neither")]
)
def test_nothing_left_is_an_error(golden, processor, tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        dataset_of(processor, write_rows(tmp_path / "d.json", rows))


def test_items_of_other_datasets(processor):
    class Pictures:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 2:
                return {"image": None}
            return conversation(PIL.Image.new("RGB", (32, 32)), ("q", "a"), ("q2", f"a{index}"))

    draws = Draws(Pictures(), seed=1)
    assert [sample.answer for sample in draws[1].samples] == ["a", "a1"]
    assert draws[1].seed != draws[1 + 3].seed  # the same item on the next pass
    assert draws[2].samples == ()
    with pytest.raises(BadRowError, match="item 2"):
        Draws(Pictures(), seed=1, bad_rows="fail")[2]


# ------------------------------------------------------------------------------------------------------------- order


def epochs(sampler: MixtureSampler, count: int) -> list[list[int]]:
    drawn = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        drawn.append(list(sampler))
    return drawn


def test_order_is_a_function_of_seed_and_epoch():
    first, again = (epochs(MixtureSampler([50], [1.0], seed=3), 2) for _ in range(2))
    assert first == again
    assert first != epochs(MixtureSampler([50], [1.0], seed=4), 2)
    assert [number % 50 for number in first[0]] != [number % 50 for number in first[1]]
    for epoch, numbers in enumerate(first):
        assert sorted(numbers) == list(range(epoch * 50, (epoch + 1) * 50))  # all items, on pass `epoch`


def test_weights_are_shares_of_an_epoch():
    sampler = MixtureSampler([10, 20, 5], [2.0, 0.5, 1.0], seed=0)
    drawn = epochs(sampler, 2)
    for numbers in drawn:
        assert len(numbers) == len(sampler) == 20 + 10 + 5
        counts = Counter(number % 35 for number in numbers)
        assert all(counts[index] == 2 for index in range(10))
        assert sum(counts[index] for index in range(10, 30)) == 10
        assert all(counts[index] == 1 for index in range(30, 35))
    # The half that the first epoch left out comes in the second.
    halves = [{number % 35 for number in numbers if 10 <= number % 35 < 30} for numbers in drawn]
    assert halves[0] | halves[1] == set(range(10, 30))


def test_a_part_so_small_that_its_share_is_less_than_one_item():
    assert len(list(MixtureSampler([3], [0.01], seed=0))) == 1


def test_groups_of_like_length():
    lengths = [(index * 37) % 100 for index in range(103)]
    sampler = MixtureSampler([103], [1.0], seed=0, lengths=lengths, group_size=4)
    numbers = list(sampler)
    assert sorted(numbers) == list(range(103))
    groups = [[lengths[number] for number in numbers[place : place + 4]] for place in range(0, 100, 4)]
    assert sum(max(group) - min(group) for group in groups) / len(groups) < 12  # 60 by chance
    firsts = [group[0] for group in groups]
    assert firsts != sorted(firsts, reverse=True)  # no walk from long to short
