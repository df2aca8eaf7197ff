"""CPM-Bee's tokenizer against the reference, and as an ordinary tokenizer of transformers."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import Golden
from transformers import AutoTokenizer

from viscpm_hf import CpmBeeConfig, CpmBeeTokenizer
from viscpm_hf.modeling.token_ids_cpm_bee import num_extension_slots, padded_vocab_size
from viscpm_hf.modeling.tokenization_cpm_bee import IMAGE_TOKEN, SLOT_NAME, SPECIAL_TOKENS, LongestMatch, load_vocab


RELEASED_VOCABULARY = Path(__file__).parents[3] / "shared" / "golden" / "vocab"

VOCAB_LINES = Golden("chat_a").vocab.read_text("utf-8").split("\n")
# Made of the vocabulary's own words and of what it lacks, so that matches, near matches and unknown runs all occur.
PIECES = st.sampled_from(
    [*(line for line in VOCAB_LINES if line[0] != "<" or len(line) == 1), "🙂", "~", "\0", " ", "\n"]
)
TEXTS = st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=3))).map("".join))


@pytest.fixture(scope="module")
def small_tokenizer() -> CpmBeeTokenizer:
    return CpmBeeTokenizer(str(Golden("chat_a").vocab))


def test_equals_the_reference(golden, tokenizer):
    for case in golden.expected["tokenize"]:
        if "error" in case:
            with pytest.raises(ValueError, match="In document syntax '<' opens a special token"):
                tokenizer.encode_text(case["text"])
            continue
        ids, table = tokenizer.encode_text(case["text"])
        assert (case["text"], ids) == (case["text"], case["ids"])
        assert {str(index): string for index, string in table.items()} == case["ext_table"]
        assert tokenizer.tokenize(case["text"]) == case["tokens"]
        assert tokenizer.decode(ids, extension_table=table) == case["decoded"]


@pytest.mark.skipif(not RELEASED_VOCABULARY.is_dir(), reason=f"no {RELEASED_VOCABULARY}, which is not ours to ship")
def test_released_vocabulary_equals_the_reference():
    tokenizer = CpmBeeTokenizer(str(RELEASED_VOCABULARY / "vocab.txt"))
    assert tokenizer.num_words == 86_583
    assert len(tokenizer) == tokenizer.vocab_size == CpmBeeConfig().vocab_size == 87_040
    assert not {IMAGE_TOKEN, SLOT_NAME.format(0)} & set(tokenizer.vocab)
    cases = json.loads((RELEASED_VOCABULARY / "encoded.json").read_text("utf-8"))
    assert len(cases) == 109
    for case in cases:
        ids, table = tokenizer.encode_text(case["text"])
        assert (case["text"], ids) == (case["text"], case["ids"])
        assert {str(index): string for index, string in table.items()} == case["ext_table"]
        assert tokenizer.decode(ids, extension_table=table) == case["text"]


# ---------------------------------------------------------------------------------------------------------- properties


@given(TEXTS)
def test_escaped_text_survives_encoding_and_decoding(small_tokenizer, text):
    ids, table = small_tokenizer.encode_text(small_tokenizer.escape(text))
    decoded = small_tokenizer.decode(ids, extension_table=table)
    assert decoded == small_tokenizer.escape(text)
    assert small_tokenizer.unescape(decoded) == text
    assert small_tokenizer.decode(ids, extension_table=table, skip_special_tokens=True) == text


@given(TEXTS)
def test_tokens_joined_are_the_text(small_tokenizer, text):
    assert "".join(small_tokenizer.tokenize(small_tokenizer.escape(text))) == text


@given(st.lists(st.one_of(PIECES.map(CpmBeeTokenizer.escape), st.sampled_from(SPECIAL_TOKENS), st.just("<ans_12>"))))
def test_document_syntax_survives_encoding_and_decoding(small_tokenizer, pieces):
    text = "".join(pieces)
    ids, table = small_tokenizer.encode_text(text)
    assert small_tokenizer.decode(ids, extension_table=table) == text


def greedy_matches(words: set[str], text: str) -> list[str]:
    """The definition: the longest word at every place, and unknown characters gathered into runs."""
    longest = max(map(len, words))
    pieces, unknown = [], ""
    while text:
        match = next((text[:size] for size in range(longest, 0, -1) if text[:size] in words), None)
        if match is None:
            unknown += text[0]
            text = text[1:]
            continue
        pieces += [unknown, match] if unknown else [match]
        unknown = ""
        text = text[len(match) :]
    return [*pieces, unknown] if unknown else pieces


@given(st.sets(st.text("abc", min_size=1, max_size=5), min_size=1), st.text("abcd", max_size=40))
@settings(max_examples=300)
def test_longest_match_is_greedy(words, text):
    assert LongestMatch(words).split(text) == greedy_matches(words, text)


def test_words_that_share_a_beginning():
    """After a long word that fails at its last character, matching goes back to the longest word before it."""
    assert LongestMatch({"a", "ab", "abcde"}).split("abcdabcdex") == ["ab", "cd", "abcde", "x"]
    assert LongestMatch({"abc"}).split("ababcab") == ["ab", "abc", "ab"]
    assert LongestMatch({"", "ab"}).split("abc") == ["ab", "c"]  # an empty line of vocab.txt


# ------------------------------------------------------------------------------------------------------- special cases


def test_unknown_strings_are_numbered_by_first_use(tokenizer):
    known = tokenizer.num_words
    ids, table = tokenizer.encode_text("🙂a~a🙂<mask_1>")
    a = tokenizer.convert_tokens_to_ids("a")
    assert ids == [known, a, known + 1, a, known, known + 2]
    assert table == {known: "🙂", known + 1: "~", known + 2: "<mask_1>"}
    more, extended = tokenizer.encode_text("~^", table)
    assert more == [known + 3]  # one run is one string, whatever was met before
    assert extended == table | {known + 3: "~^"}
    assert len(table) == 3


@pytest.mark.parametrize(
    ("text", "position"), [("bad <", 4), ("a < b", 2), ("<ans", 0), ("<a<b>", 0), ("<<<", 2), ("<<<<<x", 4)]
)
def test_unpaired_bracket_is_one_clear_error(tokenizer, text, position):
    with pytest.raises(ValueError, match=rf"at character {position} of {len(text)}: .*write '<<'"):
        tokenizer.encode_text(text)


def test_too_many_unknown_strings(tokenizer):
    slots = num_extension_slots(tokenizer.num_words)
    strings = [chr(0x20000 + index) for index in range(slots + 1)]
    tokenizer.encode_text("a".join(strings[:-1]))
    with pytest.raises(ValueError, match=f"{slots + 1} different strings without a token, more than the {slots} "):
        tokenizer.encode_text("a".join(strings))


def test_ids_behind_the_words(tokenizer):
    """Slots and placeholder are tokens as any other, but no text is tokenised to a slot."""
    first, image = tokenizer.num_words, tokenizer.image_token_id
    names = tokenizer.convert_ids_to_tokens(list(range(first, len(tokenizer))))
    assert names == [*(SLOT_NAME.format(slot) for slot in range(image - first)), IMAGE_TOKEN]
    assert tokenizer.convert_tokens_to_ids(names) == list(range(first, len(tokenizer)))
    assert len(tokenizer) == padded_vocab_size(first) == len(tokenizer.get_vocab())
    assert max(tokenizer(SLOT_NAME.format(3)).input_ids) < first
    assert tokenizer.decode([first, image]) == "<unk><image>"
    assert tokenizer.decode([first, image], skip_special_tokens=True) == ""


def test_unknown_tokens_alone_are_unk(tokenizer):
    assert tokenizer("🙂").input_ids == [tokenizer.unk_token_id]
    for index in (tokenizer.num_words, len(tokenizer) + 5):
        assert tokenizer.decode([index]) == "<unk>"


def test_whitespace_has_tokens_of_its_own(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["\n", " "]) == [4, 5]
    for name in ("</n>", "</_>"):
        assert name not in tokenizer.get_vocab()


def test_special_ids(tokenizer):
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    assert [ids[name] for name in ("<pad>", "<unk>", "<mask>", "<sep>", "<s>", "</s>", "<root>", "<ans>")] == [
        0, 1, 2, 3, 6, 7, 8, 9,
    ]  # fmt: skip
    assert set(ids.values()) <= set(tokenizer.all_special_ids)
    assert set(tokenizer.all_special_ids) | {tokenizer.image_token_id} == tokenizer.special_ids


def test_specials_never_match_plain_text(tokenizer):
    assert "<ans>" not in tokenizer.tokenize("<<ans>")
    assert "".join(tokenizer.tokenize("<<ans>")) == "<ans>"


def test_skipping_special_tokens_leaves_plain_text(tokenizer):
    ids, table = tokenizer.encode_text("<s>a<<b🙂<ans_3></s>")
    assert tokenizer.decode(ids, extension_table=table) == "<s>a<<b🙂<ans_3></s>"
    assert tokenizer.decode(ids, extension_table=table, skip_special_tokens=True) == "a<b🙂"


# ---------------------------------------------------------------------------------------------- as any other tokenizer


def test_save_and_load(golden, tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "vocab.txt").read_bytes() == golden.vocab.read_bytes() + b"\n"
    for loaded in (CpmBeeTokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)):
        assert type(loaded) is CpmBeeTokenizer
        assert loaded.get_vocab() == tokenizer.get_vocab()
        for case in golden.expected["tokenize"]:
            if "error" not in case:
                assert loaded.tokenize(case["text"]) == case["tokens"]


def test_added_tokens(golden):
    tokenizer = CpmBeeTokenizer(str(golden.vocab))
    assert tokenizer.add_tokens(["🙂🙂🙂"]) == 1
    ids, table = tokenizer.encode_text("🙂🙂🙂a🙂🙂")
    assert ids[0] == padded_vocab_size(golden.llm_config["vocab_size"])
    assert table == {golden.llm_config["vocab_size"]: "🙂🙂"}
    assert tokenizer.decode(ids, extension_table=table) == "🙂🙂🙂a🙂🙂"


def test_padding(tokenizer):
    batch = tokenizer(["a", "a cat"], padding=True)
    assert batch.attention_mask == [[0, 0, 1], [1, 1, 1]]
    assert batch.input_ids[0][:2] == [tokenizer.pad_token_id] * 2


# ---------------------------------------------------------------------------------------------------- bad vocabularies


@pytest.mark.parametrize("end", [b"", b"\r\n"])
def test_vocabulary_with_windows_line_ends(golden, tmp_path, end):
    path = tmp_path / "vocab.txt"
    path.write_bytes(golden.vocab.read_bytes().replace(b"\n", b"\r\n") + end)
    assert load_vocab(path) == load_vocab(golden.vocab)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", r"has 0 lines and lacks '<pad>'"),
        (b"hello\nworld\n", r"has 2 lines and lacks '<pad>'"),
        (b"\xff\xfe\x00", "is not a CPM-Bee vocabulary"),
        ("\n".join([*VOCAB_LINES, "cat"]).encode(), "repeats a token: 298 lines, 297 different tokens"),
        ("\n".join(line for line in VOCAB_LINES if line != "<eod>").encode(), "has 296 lines and lacks '<eod>'"),
    ],
)
def test_bad_vocabulary_is_one_clear_error(tmp_path, content, complaint):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        CpmBeeTokenizer(str(path))
