"""Captions from files of every kind, and the cache of what is encoded."""

import io
import json

import PIL.Image
import pytest
import torch
from paint_training_support import CAPTIONS, write_captions, write_rows

from viscpm_hf.training.paint_cache import SHARD_BYTES, TensorCache, files_fingerprint
from viscpm_hf.training.paint_data import CaptionDataset, load_square, open_part
from viscpm_hf.training.records import BadRowError


def read(path, **options) -> list[tuple[str, tuple[int, int]]]:
    dataset = CaptionDataset([open_part(str(path))], **options)
    return [(item.caption, load_square(item.image, 8).getpixel((4, 4))) for item in dataset]


def test_every_kind_of_file_gives_the_same_rows(tmp_path):
    folder = tmp_path / "data"
    jsonl = write_captions(folder, 3)
    rows = [json.loads(line) for line in open(jsonl, encoding="utf-8")]
    expected = read(jsonl)
    assert [caption for caption, _ in expected] == list(CAPTIONS[:3])
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
    write_rows(folder / "metadata.jsonl", [{"file_name": row["image"], "text": row["caption"]} for row in rows])
    (tmp_path / "elsewhere.json").write_text(json.dumps(rows), "utf-8")
    assert read(folder / "rows.json") == read(folder) == expected
    assert read(tmp_path / "elsewhere.json", images=folder) == expected

    datasets = pytest.importorskip("datasets")
    encoded = []
    for row in rows:
        buffer = io.BytesIO()
        PIL.Image.open(folder / row["image"]).save(buffer, "PNG")
        encoded.append({"image": {"bytes": buffer.getvalue(), "path": None}, "text": row["caption"]})
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_list(encoded, features=features).to_parquet(str(tmp_path / "rows.parquet"))
    assert read(tmp_path / "rows.parquet") == expected


def test_one_of_several_captions_is_drawn_always_the_same_one(tmp_path):
    write_captions(tmp_path, 1)
    data = write_rows(tmp_path / "rows.jsonl", [{"image": "0.png", "caption": ["a", "b", "c"]}] * 20)
    first = [caption for caption, _ in read(data)]
    assert set(first) == {"a", "b", "c"} and first == [caption for caption, _ in read(data)]


def test_pictures_outside_the_given_folder_are_refused(tmp_path):
    write_captions(tmp_path / "data", 1)
    data = write_rows(tmp_path / "rows.jsonl", [{"image": "../secret.png", "caption": "x"}])
    with pytest.raises(BadRowError, match="outside the images folder"):
        read(data, images=tmp_path / "data", bad_rows="fail")


def test_pictures_become_squares_of_their_middle():
    picture = PIL.Image.new("RGBA", (30, 10), (0, 0, 255, 255))
    picture.paste((255, 0, 0, 255), (10, 0, 20, 10))
    square = load_square(picture, 16)
    assert square.size == (16, 16) and square.mode == "RGB"
    assert square.getpixel((8, 8)) == (255, 0, 0)


# --------------------------------------------------------------------------------------------------------------- cache


def test_cache_keeps_what_was_written_and_mends_what_was_not(tmp_path):
    cache = TensorCache(tmp_path, "things", {"size": 1})
    for index in range(3):
        cache.add(f"key {index}", torch.full((2, index + 1), float(index)))
        cache.flush()
    files = sorted(cache.folder.glob("*.safetensors"))
    files[0].write_bytes(b"cut off")
    (cache.folder / "x.partial").write_bytes(b"cut off")
    again = TensorCache(tmp_path, "things", {"size": 1})
    kept = [f"key {index}" for index in range(3) if f"key {index}" in again]
    assert len(kept) == 2
    for key in kept:
        assert torch.equal(again[key], torch.full((2, int(key[-1]) + 1), float(key[-1])))
    assert "key 0" not in TensorCache(tmp_path, "things", {"size": 2})


def test_cache_writes_when_enough_has_come_together(tmp_path):
    cache = TensorCache(tmp_path, "things", {})
    half = torch.zeros(SHARD_BYTES // 8)
    cache.add("a", half)
    assert not list(cache.folder.glob("*.safetensors"))
    cache.add("b", half)
    assert len(list(cache.folder.glob("*.safetensors"))) == 1 and cache["b"].shape == half.shape


def test_processes_share_a_cache(tmp_path):
    first, second = (TensorCache(tmp_path, "things", {}) for _ in range(2))
    first.add("a", torch.ones(1))
    first.flush()
    assert "a" not in second
    second.reload()
    assert torch.equal(second["a"], torch.ones(1))


def test_fingerprints_tell_weights_apart(tmp_path):
    path = tmp_path / "weights"
    content = bytearray(3 << 20)
    path.write_bytes(content)
    before = files_fingerprint([path])
    assert before == files_fingerprint([path])
    content[-1] = 1  # trained further: all blocks change; one that is looked at is enough
    content[(1 << 20)] = 1
    path.write_bytes(content)
    assert before != files_fingerprint([path])
