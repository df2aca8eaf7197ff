"""Prompts and answers as the originals' own code wrote them (`tests/golden/siblings`: tokenizers made for it, and
conversations with their token ids, placeholders of pictures left out)."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor

from viscpm_hf.checkpoints.errors import OriginalCheckpointError
from viscpm_hf.checkpoints.original import load_state_dict
from viscpm_hf.modeling.chat_processing import AnswerText
from viscpm_hf.training.encoding import ConversationEncoding
from viscpm_hf.training.records import ChatSample


GOLDEN = Path(__file__).parents[1] / "golden" / "siblings"
NAMES = sorted(folder.name for folder in GOLDEN.iterdir())
CASES = {name: json.loads((GOLDEN / name / "cases.json").read_text("utf-8")) for name in NAMES}


@pytest.fixture(scope="module")
def processors():
    return {name: AutoProcessor.from_pretrained(GOLDEN / name) for name in NAMES}


@pytest.mark.parametrize(("name", "case"), [(name, case) for name in NAMES for case in CASES[name]])
def test_prompts_and_answers(processors, name, case):
    processor = processors[name]
    messages, grids, views = [dict(message) for message in case["messages"]], [], 0
    if case["image"] is not None:
        rows, columns = processor.grid_of(tuple(case["image"]))
        grids, views = [(rows, columns)], 1 + rows * columns
        messages[0]["content"] = [{"type": "image"}, {"type": "text", "text": messages[0]["content"]}]
    ids = processor.encode_chat(messages, grids)
    assert [token for token in ids if token != processor.image_token_id] == case["prompt_ids"]
    assert ids.count(processor.image_token_id) == views * processor.num_query_tokens
    assert processor.answer_text(case["answer_ids"]) == case["answer"]


@pytest.mark.parametrize("name", NAMES)
def test_pieces_of_a_streamed_answer_are_the_answer(processors, name, monkeypatch):
    """Bytes, blanks and special tokens in any order, and no token is decoded again and again."""
    processor, draw = processors[name], random.Random(0)
    tokenizer = processor.tokenizer
    groups = [list(range(3, 259)), tokenizer.all_special_ids[3:], range(259, len(tokenizer)), [tokenizer.unk_token_id]]
    groups.append([token for token in groups[2] if tokenizer.convert_ids_to_tokens(token).startswith("▁")])
    answers = [[token for token in case["answer_ids"] if token not in (1, 2)] for case in CASES[name]]
    for _ in range(50):
        kinds = draw.choices([group for group in groups if group], k=20)
        answers.append([token for kind in kinds for token in draw.choices(kind, k=draw.randint(1, 3))])
    num_decoded, decode = [], tokenizer.decode
    monkeypatch.setattr(
        tokenizer, "decode", lambda ids, **kwargs: num_decoded.append(len(ids)) or decode(ids, **kwargs)
    )
    for ids in [*answers, sum(answers, [])]:
        num_decoded.clear()
        text = AnswerText(processor)
        pieces = [text.new_text(ids[: end + 1]) for end in range(len(ids))]
        pieces.append(text.new_text([*ids, tokenizer.eos_token_id, *ids]))
        assert sum(num_decoded) <= 5 * len(ids)
        assert "".join(pieces) == processor.answer_text(ids) and text.new_text(ids, is_last=True) == ""


@pytest.mark.parametrize("name", [name for name in NAMES if "minicpmv" in name])
class TestGroundingTokens:
    """`<ref>` and `<box>`, which MiniCPM-V writes."""

    ANSWER = "<ref> 狗</ref><box> 12 3 45 6</box>"

    def test_they_stay_tokens_in_answers_and_text_in_questions(self, processors, name):
        processor = processors[name]
        ids = {token: processor.tokenizer.convert_tokens_to_ids(token) for token in ("<ref>", "</ref>", "<box>")}
        assert list(ids.values()) == [103, 104, 105]
        turns = [("user", self.ANSWER), ("assistant", self.ANSWER), ("user", "?")]
        found = processor.encode_chat([{"role": role, "content": text} for role, text in turns])
        assert [found.count(token) for token in ids.values()] == [1, 1, 1]
        parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
        assert processor.encode_chat(parts) == found
        answer = processor.tokenizer(self.ANSWER, add_special_tokens=False)["input_ids"]
        assert any(found[place : place + len(answer)] == answer for place in range(len(found)))
        said = processor.tokenizer(self.ANSWER.replace("> ", ">"), add_special_tokens=False)["input_ids"]
        assert processor.answer_text(said) == self.ANSWER

    @pytest.mark.parametrize("token", ["<image>", "</image>", "<slice>", "<unk>", "</s>"])
    def test_others_are_text_everywhere(self, processors, name, token):
        processor = processors[name]
        token_id = processor.tokenizer.convert_tokens_to_ids(token)
        turns = [("user", "?"), ("assistant", f"a{token}b"), ("user", f"a{token}b")]
        found = processor.encode_chat([{"role": role, "content": text} for role, text in turns])
        assert token_id not in found

    def test_they_are_learned_as_tokens(self, processors, name):
        encoded = ConversationEncoding(processors[name]).encode(ChatSample("狗在哪里？", self.ANSWER))
        answer = processors[name].tokenizer(self.ANSWER, add_special_tokens=False)["input_ids"]
        assert encoded.ids[encoded.prompt_length :] == [*answer, 2]


@pytest.mark.parametrize("name", NAMES)
class TestFragments:
    """The processor tokenises what it is given."""

    def test_special_tokens_only_where_they_are_wanted(self, processors, name):
        processor = processors[name]
        plain = processor.tokenizer("the dog", add_special_tokens=False)["input_ids"]
        assert processor(text="the dog", add_special_tokens=False)["input_ids"] == [plain]
        assert processor(text=["the dog"])["input_ids"] == [[1, *plain]]

    @pytest.mark.parametrize("text", ["a < b", "<ref>狗</ref>", "<image></s>", "abc"])
    def test_a_final_message_is_continued(self, processors, name, text):
        """Its tokens are those of the whole message, its end aside."""
        processor = processors[name]
        conversation = [{"role": "user", "content": "<image> \ufdd1ref>?"}, {"role": "assistant", "content": text}]
        prompt = processor.apply_chat_template(conversation, continue_final_message=True)
        whole = processor.apply_chat_template(conversation)
        assert whole.startswith(prompt) and whole.removeprefix(prompt).strip() in ("", "</s>")
        parts = [conversation[0], {"role": "assistant", "content": [{"type": "text", "text": text}]}]
        assert processor.apply_chat_template([parts, parts], continue_final_message=True) == [prompt, prompt]
        for given in (conversation, parts):
            inputs = processor.apply_chat_template(given, tokenize=True, return_dict=True, continue_final_message=True)
            assert inputs["input_ids"] == [processor.encode(prompt)]
        own_tokens = [token for token in processor.answer_tokens if token in text]
        ids = processor.encode(prompt)
        assert all(ids.count(processor.tokenizer.convert_tokens_to_ids(token)) == 1 for token in own_tokens)
        assert conversation[1]["content"] == text

    def test_masks_of_answers_are_refused(self, processors, name):
        conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "a"}]
        with pytest.raises(ValueError, match="return_assistant_tokens_mask isn't there for this model"):
            processors[name].apply_chat_template(
                conversation, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )

    def test_rare_characters_come_back(self, processors, name):
        processor = processors[name]
        ids = processor.tokenizer(["🦄 ❤ 龘"], add_special_tokens=False)["input_ids"]
        assert processor.decode(ids[0]) == processor.batch_decode(ids)[0] == "🦄 ❤ 龘"
        assert processor.post_process_image_text_to_text(ids) == ["🦄 ❤ 龘"]


def test_answers_of_visualcla_keep_their_white_space(processors):
    text = "the dog \n\n"
    for name, expected in (("visualcla", text), ("omnilmm", text.strip())):
        processor = processors[name]
        ids = processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert processor.answer_text([*ids, processor.tokenizer.eos_token_id]) == expected


def test_a_tied_head_is_no_damage(tmp_path):
    """The original's script of VisualCLA saves embedding and head as one tensor of two names."""
    table, path = torch.randn(4, 3), tmp_path / "pytorch_model.bin"
    tied = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    torch.save(tied, path)
    loaded = load_state_dict(path)
    assert all(torch.equal(loaded[name], table) for name in tied)
    for other in (table[1:], table.T):
        torch.save({**tied, "lm_head.weight": other}, path)
        with pytest.raises(OriginalCheckpointError, match="share"):
            load_state_dict(path)
    torch.save({**tied, "model.norm.weight": table}, path)
    with pytest.raises(OriginalCheckpointError, match="share"):
        load_state_dict(path)
