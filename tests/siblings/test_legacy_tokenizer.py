"""The SentencePiece tokenizer of MiniCPM-V and VisualCLA, on small vocabularies in the original formats."""

import json

import pytest
from sibling_tokenizers import (
    MINICPM_VOCAB_SIZE,
    VISUALCLA_BASE_SIZE,
    write_minicpm_tokenizer,
    write_visualcla_tokenizer,
)
from transformers import AutoTokenizer

from viscpm_hf import LegacySentencePieceTokenizer


@pytest.fixture
def folder(whole_folders):
    return whole_folders["minicpmv-2.0"]


def test_special_pieces_keep_their_ids_and_text_gets_no_prefix(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(tokenizer) is LegacySentencePieceTokenizer
    assert len(tokenizer) == tokenizer.vocab_size == MINICPM_VOCAB_SIZE
    ids = tokenizer("<image></image><slice></slice>\n<box>", add_special_tokens=False)["input_ids"]
    assert ids == [101, 102, 111, 112, 5, 105]
    less, user, greater = tokenizer.convert_tokens_to_ids(["<", "用户", ">"])
    assert tokenizer("<用户>", add_special_tokens=False)["input_ids"] == [less, user, greater]
    assert tokenizer("<用户>")["input_ids"] == [1, less, user, greater]
    assert tokenizer.pad_token_id == 0 and tokenizer.padding_side == "left"


def test_version_1_knows_no_slices(whole_folders):
    tokenizer = AutoTokenizer.from_pretrained(whole_folders["minicpmv-1.0"])
    assert tokenizer("<image>", add_special_tokens=False)["input_ids"] == [101]
    assert 111 not in tokenizer("<slice>", add_special_tokens=False)["input_ids"]
    assert tokenizer.pad_token_id == 0


@pytest.mark.parametrize("text", ["What is the image?", " a  b ", "图片里有什么？龙🐉", "a\nb\n"])
@pytest.mark.parametrize("name", ["minicpmv-1.0", "minicpmv-2.0"])
def test_decoding_gives_the_text_back(whole_folders, name, text):
    tokenizer = AutoTokenizer.from_pretrained(whole_folders[name])
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("name", ["minicpmv-1.0", "minicpmv-2.0"])
def test_a_space_goes_before_text_that_a_special_token_follows(whole_folders, name):
    """As the transformers of the releases had it, golden answers show it."""
    tokenizer = AutoTokenizer.from_pretrained(whole_folders[name])
    for text, decoded in (
        ("<ref>x</ref>", "<ref> x</ref>"),
        ("a<ref>x</ref><box></box>b", " a<ref> x</ref><box></box>b"),
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == decoded


@pytest.mark.parametrize("name", ["minicpmv-1.0", "minicpmv-2.0", "visualcla"])
def test_a_saved_tokenizer_is_the_same(whole_folders, name, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(whole_folders[name])
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((whole_folders[name] / "config.json").read_text())
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<s>What \n<img><img_token></img>\n<slice>图片 </slice>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.padding_side, again.pad_token) == (tokenizer.padding_side, tokenizer.pad_token)


@pytest.mark.parametrize("plain", [False, True])
def test_added_tokens_take_white_space_as_their_file_says(plain, whole_folders, tmp_path):
    write_visualcla_tokenizer(tmp_path, plain=plain)
    (tmp_path / "config.json").write_text((whole_folders["visualcla"] / "config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    base = VISUALCLA_BASE_SIZE
    names = ["<img>", "</img>", "<pad>", "<img_token>"]
    assert tokenizer.convert_tokens_to_ids(names) == [base, base + 1, base + 2, base + 3]
    assert tokenizer.pad_token_id == base + 2
    tokens = tokenizer.tokenize("is: \n<img><img_token></img>\nis")
    line_break = "<0x0A>"
    begin, end = tokens[: tokens.index("<img>")], tokens[tokens.index("</img>") + 1 :]
    assert (line_break in begin, line_break in end) == (not plain, not plain)
    # A piece of text after a special token begins as a text does.
    assert end[0] == ("▁is" if plain else "▁")
    assert tokenizer.decode(tokenizer("is<img></img>")["input_ids"], skip_special_tokens=True) == "is"


def test_bad_files_are_one_sentence(folder, whole_folders, tmp_path):
    with pytest.raises(ValueError, match=r"no SentencePiece vocabulary at .*nothing"):
        LegacySentencePieceTokenizer(tmp_path / "nothing")
    write_minicpm_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "tokenizer.model").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="is no SentencePiece vocabulary"):
        AutoTokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(OSError, match="has no tokenizer.model"):
        AutoTokenizer.from_pretrained(tmp_path)
    write_visualcla_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text((whole_folders["visualcla"] / "config.json").read_text())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": VISUALCLA_BASE_SIZE}))
    with pytest.raises(OSError, match="added_tokens.json .* has no <img>, <img_token>, </img>"):
        AutoTokenizer.from_pretrained(tmp_path)
