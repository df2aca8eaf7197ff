"""Documents: segments, relations, extension tokens and batches, against the reference."""

import copy
import pickle
import re

import pytest
from support import Golden

from viscpm_hf.modeling.document_cpm_bee import (
    MAX_DOCUMENT_DEPTH,
    fill_document,
    flatten_document,
    segment_relations,
)


def test_equals_the_reference(golden, tokenizer):
    for case in golden.expected["encodings"]:
        encoded = tokenizer.encode_document(case["data"])
        num_segments = case["num_segments"]
        relations = [case["segment_rel"][row * num_segments :][:num_segments] for row in range(num_segments)]
        assert encoded.input_ids == case["input_ids"]
        assert encoded.sub_ids == case["input_id_subs"]
        assert [1 - kind for kind in encoded.token_type_ids] == case["context"]
        assert encoded.segment_ids == case["segment_ids"]
        assert encoded.segment_relations == relations
        assert encoded.image_bounds == [tuple(bounds) for bounds in case["image_bound"]]
        assert {str(index): string for index, string in encoded.extension_table.items()} == case["ext_table"]


def test_segments_are_depth_first():
    segments = flatten_document({"image": "x", "q": {"a": "1", "b": {"c": "2"}}, "<ans>": {"d": ""}})
    assert [(segment.text, segment.depth, segment.path) for segment in segments] == [
        ("<root>", 0, ()),
        ("image", 1, ("image",)),
        ("x", 2, ("image",)),
        ("q", 1, ("q",)),
        ("a", 2, ("q", "a")),
        ("1", 3, ("q", "a")),
        ("b", 2, ("q", "b")),
        ("c", 3, ("q", "b", "c")),
        ("2", 4, ("q", "b", "c")),
        ("<ans>", 1, ("<ans>",)),
        ("d", 2, ("<ans>", "d")),
        ("", 3, ("<ans>", "d")),
    ]
    assert [segment.text for segment in segments if segment.is_image] == ["x"]
    assert [segment.path for segment in segments if segment.is_answer] == [("<ans>", "d")]


def test_only_top_level_fields_are_special():
    segments = flatten_document({"q": {"image": "x", "<ans>": "y"}, "<ans>": {"image": "z"}})
    assert not any(segment.is_image for segment in segments)
    assert [segment.text for segment in segments if segment.is_answer] == ["z"]


def test_relations_far_apart_share_a_bucket():
    def nested(depth: int) -> dict:
        return {"k": nested(depth - 1)} if depth else {"v": ""}

    relations = segment_relations(flatten_document(nested(10)))
    assert relations[0][1:10] == [2, 3, 4, 5, 6, 7, 8, 8, 8]
    assert [row[0] for row in relations[:10]] == [0, 9, 17, 25, 33, 41, 49, 57, 57, 57]


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ("a string", "dict of strings or dicts, got str"),
        (None, "dict of strings or dicts, got NoneType"),
        ({}, "at least one key, got an empty dict"),
        ({"a": 1}, "strings or dicts, got int at a"),
        ({"a": {"b": None}}, "got NoneType at a > b"),
        ({"a": ["x"]}, "got list at a"),
        ({3: "x"}, "keys are strings, got int 3 at the top level"),
        ({"<ans>": {}}, "no answer slot at <ans>"),
        ({"<ans>": {"a": {}}}, "no answer slot at <ans> > a"),
        ({"a": "x < y"}, "text at a can't be encoded.*character 2 of 5"),
        ({"a": {"<": "x"}}, "text at a > < can't be encoded"),
        ({"a": "<nothing>"}, "'<nothing>' has no base: '<nothing>' is not in the vocabulary"),
        ({"a": "<nothing_3>"}, "'<nothing_3>' has no base: '<nothing>' is not in the vocabulary"),
    ],
)
def test_malformed_document_is_one_clear_error(document, complaint):
    from viscpm_hf import CpmBeeTokenizer

    with pytest.raises(ValueError, match=complaint):
        CpmBeeTokenizer(str(Golden("chat_a").vocab)).encode_document(document)


def test_document_without_end():
    document: dict = {}
    document["a"] = document
    with pytest.raises(ValueError, match=f"nested deeper than {MAX_DOCUMENT_DEPTH} levels"):
        flatten_document(document)


# ---------------------------------------------------------------------------------------------------- extension tokens


def test_numbers_count_within_a_base(tokenizer):
    encoded = tokenizer.encode_document({"a": "🙂a~<ans_5><unk_2>", "<ans_9>": "🙂"})
    unk, ans = tokenizer.unk_token_id, tokenizer.convert_tokens_to_ids("<ans>")
    assert encoded.extension_strings == {
        (unk, 0): "🙂",
        (unk, 1): "~",
        (ans, 0): "<ans_5>",
        (unk, 2): "<unk_2>",
        (ans, 1): "<ans_9>",
    }


def test_every_row_has_slots_of_its_own(tokenizer):
    documents = [tokenizer.encode_document({"a": text}) for text in ("🙂a~", "^a🙂a🙂🙂", "cat")]
    batch = tokenizer.collate(documents, return_tensors="pt")
    unk, known = tokenizer.unk_token_id, tokenizer.num_words
    one, two = (ord("🙂") + 1, 0), (ord("🙂") + 1, ord("🙂") + 1)
    assert batch["extension_table"].tolist() == [
        [[unk, 1, known, ord("~") + 1, 0], [unk, 0, unk, *one], [0] * 5],
        [[unk, 1, known, *one], [unk, 2, known + 1, *two], [unk, 0, unk, ord("^") + 1, 0]],
        [[0] * 5] * 3,
    ]
    assert batch.extension_strings == [{unk: "🙂", known: "~"}, {unk: "^", known: "🙂", known + 1: "🙂🙂"}, {}]
    for row, text in enumerate(("🙂a~", "^a🙂a🙂🙂", "cat")):
        decoded = tokenizer.decode(batch["input_ids"][row], extension_table=batch.extension_strings[row])
        assert decoded.endswith(f"<s>{text}</s>")


def test_with_labels_rows_share_their_slots(tokenizer):
    """As in the original's loss, which has a column for every extension token of the batch."""
    documents = [tokenizer.encode_document({"a": text}) for text in ("🙂a~", "^a🙂a🙂🙂", "cat")]
    batch = tokenizer.collate(documents, with_labels=True, return_tensors="pt")
    unk, known = tokenizer.unk_token_id, tokenizer.num_words
    assert batch["extension_table"][:, :2, :3].tolist() == [[[unk, 1, known], [unk, 2, known + 1]]] * 3
    assert batch.extension_strings == tokenizer.collate(documents).extension_strings
    assert batch["input_ids"].tolist() == tokenizer.collate(documents)["input_ids"]


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, lambda batch: pickle.loads(pickle.dumps(batch)), lambda batch: batch.to("cpu")],
    ids=["copy", "deepcopy", "pickle", "to"],
)
def test_strings_go_with_the_batch(tokenizer, copied):
    documents = [tokenizer.encode_document({"a": text}) for text in ("🙂a~", "cat")]
    batch = tokenizer.collate(documents, return_tensors="pt")
    assert copied(batch).extension_strings == [{1: "🙂", tokenizer.num_words: "~"}, {}]


def test_batch_without_extensions_has_an_empty_table(tokenizer):
    batch = tokenizer.collate([tokenizer.encode_document({"a": "cat"})] * 2, return_tensors="pt")
    assert batch["extension_table"].shape == (2, 0, 3)
    assert batch.extension_strings == [{}, {}]


# ------------------------------------------------------------------------------------------------- batches and prompts


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_row(tokenizer, side):
    documents = [
        tokenizer.encode_document({"a": text, "<ans>": "a cat"}, close_answers=True) for text in ("", "a cat")
    ]
    batch = tokenizer.collate(documents, padding_side=side, with_labels=True, pad_to_multiple_of=4)
    assert len(batch["input_ids"][0]) % 4 == 0
    for row, document in enumerate(documents):
        alone = tokenizer.collate([document], with_labels=True)
        kept = [place for place, is_token in enumerate(batch["attention_mask"][row]) if is_token]
        assert kept == list(range(kept[0], kept[0] + len(document)))
        assert (kept[0] == 0) is (side == "right")
        for name in ("input_ids", "token_type_ids", "segment_ids", "labels"):
            assert [batch[name][row][place] for place in kept] == alone[name][0]
        padding = set(range(len(batch["labels"][row]))) - set(kept)
        assert {batch["labels"][row][place] for place in padding} <= {-100}


def test_labels_are_the_answers_alone(tokenizer):
    document = tokenizer.encode_document({"q": "cat", "<ans>": {"x": "a", "y": "moon"}}, close_answers=True)
    batch = tokenizer.collate([document], with_labels=True)
    learned = [token for token in batch["labels"][0] if token != -100]
    assert tokenizer.decode(learned) == "a</s>moon</s>"
    assert batch["labels"][0].count(-100) + len(learned) == len(document)


def test_prompt_has_all_context_first(tokenizer):
    document = tokenizer.encode_document({"<ans>": {"x": "a", "y": "moon"}, "image": "<unk><unk>", "q": "cat"})
    context = document.prompt()
    assert tokenizer.decode(context.input_ids) == (
        "<s><root></s><s><ans></s><s>x</s><s>y</s><s>image</s><s><unk><unk></s><s>q</s><s>cat</s>"
    )
    assert set(context.token_type_ids) == {0}
    ((begin, end),) = context.image_bounds
    assert context.input_ids[begin:end] == [tokenizer.unk_token_id] * 2
    second = document.prompt(open_slot=1)
    assert tokenizer.decode(second.input_ids) == tokenizer.decode(context.input_ids) + "<s>a<s>"
    assert second.token_type_ids[-3:] == [1, 1, 1]
    slots = document.answer_slots
    assert second.segment_ids[-3:] == [slots[0].segment_id] * 2 + [slots[1].segment_id]


def test_fill_leaves_the_document_as_it_was():
    document = {"q": {"x": "1"}, "<ans>": {"a": "", "b": ""}}
    filled = fill_document(document, {("<ans>", "a"): "yes", ("<ans>", "b"): None})
    assert filled == {"q": {"x": "1"}, "<ans>": {"a": "yes", "b": None}}
    assert document == {"q": {"x": "1"}, "<ans>": {"a": "", "b": ""}}
    filled["q"]["x"] = "2"
    assert document["q"]["x"] == "1"


def test_error_names_the_place_once(tokenizer):
    with pytest.raises(ValueError) as caught:
        tokenizer.encode_document({"deep": {"er": "1 < 2"}})
    assert len(re.findall("deep > er", str(caught.value))) == 1
