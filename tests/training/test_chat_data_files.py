"""Files of rows: found by position, read one at a time, faults with their line."""

import codecs
import io
import json

import PIL.Image
import pytest
from chat_training_support import conversation, write_rows

from viscpm_hf.training import data_files
from viscpm_hf.training.data_files import DataPart, JsonSource, TableSource, open_source
from viscpm_hf.training.records import BadRowError, read_record


ROWS = [conversation("a.png", (f"问题 {index} 🙂", "答" * index), note="x\ny") for index in range(1, 30)]


@pytest.fixture(params=[1, 7, 64, 1 << 20])
def chunk(request, monkeypatch):
    """Windows that cut rows, characters and the space between them anywhere."""
    monkeypatch.setattr(data_files, "CHUNK", request.param)


@pytest.mark.parametrize("style", ["lines", "array", "indented array", "array with a byte order mark", "no newline"])
def test_rows_and_lines(tmp_path, chunk, style):
    path = tmp_path / ("data.jsonl" if style == "lines" else "data.json")
    text = {
        "lines": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n",
        "indented array": json.dumps(ROWS, indent=2, ensure_ascii=False),
        "array": " \n[\n" + ",\n".join(json.dumps(row) for row in ROWS) + "\n]\n",
        "no newline": json.dumps(ROWS),
        "array with a byte order mark": json.dumps(ROWS, ensure_ascii=False),
    }[style]
    path.write_bytes((codecs.BOM_UTF8 if "mark" in style else b"") + text.encode())
    source = JsonSource(path)
    assert [row for _, row in source.scan()] == ROWS
    for index in (28, 0, 13, 13):  # in any order
        assert source.row(index) == ROWS[index]
    if style == "lines":
        assert source.where(3) == f"{path} line 7"
    if style == "array":
        assert source.where(3) == f"{path} line 6"
    if style == "no newline":
        assert source.where(0) == f"{path} row 1 (index 0), line 1"
        assert source.where(3) == f"{path} row 4 (index 3), line 1"


def test_lines_in_a_json_file(tmp_path):
    path = tmp_path / "data.json"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    assert [row for _, row in JsonSource(path).scan()] == ROWS


def test_bad_lines_are_rows_of_their_own(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"caption": "a"}\n{"caption": \n\xff\xfe\n' + b"[" * 100_000 + b'\n{"caption": "b"}\n')
    rows = [row for _, row in JsonSource(path).scan()]
    assert rows[0] == {"caption": "a"} and rows[4] == {"caption": "b"}
    for line, row in zip((2, 3, 4), rows[1:4], strict=True):
        assert isinstance(row, BadRowError)
        assert f"{path} line {line}: no JSON" in str(row)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'[{"a": 1},\n{"a": 2}', "line 2: the file ends before its array does"),
        (b'[{"a": 1}\n{"a": 2}]', "line 2: no JSON"),
        (b'[{"a": 1},\n\n{"a" 2}]', "line 3: no JSON"),
        (b'[{"a": 1},\n{"a": "\xff"}]', "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1,]", "no JSON"),
        (b'[{"a": 1},\n{"a": 2}]\n[{"a": 3}]', "line 3: something follows the end of its array"),
        (b"[1] x", "line 1: something follows"),
    ],
)
def test_a_broken_array_is_an_error_with_its_line(tmp_path, text, message):
    path = tmp_path / "data.json"
    path.write_bytes(text)
    with pytest.raises(ValueError, match=message):
        list(JsonSource(path).scan())


def test_a_long_array_stays_on_the_disk(tmp_path):
    path = tmp_path / "data.json"
    with open(path, "w") as file:
        file.write("[" + ",".join(json.dumps({"caption": str(index), "pad": "x" * 500}) for index in range(20_000)))
        file.write("]")
    window = data_files._Text(path)
    source = JsonSource(path)
    longest = 0

    class Watched(type(window)):
        def read_more(self):
            nonlocal longest
            longest = max(longest, len(self.buffer))
            return super().read_more()

    original, data_files._Text = data_files._Text, Watched
    try:
        assert sum(1 for _ in source.scan()) == 20_000
    finally:
        data_files._Text = original
    assert longest < 4 * data_files.CHUNK < path.stat().st_size
    assert source.row(19_999)["caption"] == "19999"


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
    """As `openbmb/llava_zh`: pictures as structs with their bytes."""
    import datasets

    def encoded(colour):
        file = io.BytesIO()
        PIL.Image.new("RGB", (40, 40), colour).save(file, "PNG")
        return {"bytes": file.getvalue(), "path": None}

    rows = [conversation(None, ("q", colour), id=colour) for colour in ("red", "blue", "none")]
    for row in rows:
        row["image"] = None if row["id"] == "none" else encoded(row["id"])
    folder = tmp_path_factory.mktemp("parquet")
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "id": datasets.Value("string"),
            "conversations": [{"from": datasets.Value("string"), "value": datasets.Value("string")}],
        }
    )
    datasets.Dataset.from_list(rows, features=features).to_parquet(folder / "train-0.parquet")
    return folder


def test_lists_of_pictures_in_parquet(tmp_path):
    """`images`, still encoded as `image` is; a mark without a picture is a bad row there too."""
    import datasets

    file = io.BytesIO()
    PIL.Image.new("RGB", (40, 40), "red").save(file, "PNG")
    entry = {"bytes": file.getvalue(), "path": None}
    features = datasets.Features(
        {
            "images": [datasets.Image()],
            "messages": [{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        }
    )
    messages = [{"role": "user", "content": "<image>q"}, {"role": "assistant", "content": "a"}]
    rows = [{"images": images, "messages": messages} for images in ([entry], [], [entry, entry])]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
    source = open_source(str(tmp_path / "train.parquet"))
    (_, good), *bad = source.scan()
    assert read_record(good).images == (file.getvalue(),)
    for (index, row), count in zip(bad, (0, 2), strict=True):
        with pytest.raises(BadRowError, match=f"row {index + 1}: 1 <image> marks .* but {count} pictures"):
            read_record(row, source=source.where(index))


@pytest.mark.parametrize("way", ["folder", "file"])
def test_parquet(parquet, way, tmp_path, monkeypatch):
    source = open_source(str(parquet if way == "folder" else parquet / "train-0.parquet"))
    assert isinstance(source, TableSource)
    scanned = [row for _, row in source.scan()]
    assert [row["id"] for row in scanned] == ["red", "blue", "none"]
    assert [row["image"] and PIL.Image.open(io.BytesIO(row["image"]["bytes"])).size for row in scanned] == [
        (40, 40), (40, 40), None,
    ]  # fmt: skip
    row = source.row(1)
    assert PIL.Image.open(io.BytesIO(row["image"]["bytes"])).getpixel((0, 0)) == (0, 0, 255)
    assert source.where(1).endswith("row 2")


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [("d.json", "d.json", 1.0), ("d.json:2.5", "d.json", 2.5), ("C:/d.json", "C:/d.json", 1.0)],
)
def test_weights(text, name, weight):
    assert data_files.split_weight(text) == (name, weight)


def test_a_file_with_a_colon_in_its_name(tmp_path):
    path = tmp_path / "d:2"
    path.write_text("")
    assert data_files.split_weight(str(path)) == (str(path), 1.0)


@pytest.mark.parametrize("weight", ["0", "-1", "inf", "nan"])
def test_weights_outside_their_range(weight):
    with pytest.raises(ValueError, match="above 0"):
        DataPart.open(f"d.json:{weight}")


def test_what_is_no_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="no training data at"):
        open_source(str(tmp_path / "nothing.json"))
    with pytest.raises(FileNotFoundError, match="no training data at data/train.json"):
        open_source("data/train.json")
    with pytest.raises(ValueError, match=r"no \.parquet file"):
        open_source(str(tmp_path))
    (tmp_path / "d.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"none of \.json"):
        open_source(str(tmp_path / "d.csv"))


def test_written_rows_come_back(tmp_path):
    for name in ("d.json", "d.jsonl"):
        source = open_source(write_rows(tmp_path / name, ROWS))
        assert [row for _, row in source.scan()] == ROWS
