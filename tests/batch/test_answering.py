"""`VisCPMChat.ask_batch`: a batch answers as its questions do alone."""

import PIL.Image
import pytest
import torch

from viscpm_hf import ChatRequest, UnsafeImageError
from viscpm_hf.chat.turns import REFUSAL


LENGTH = 8
QUESTIONS = (
    ("图片是什么颜色？", 0),
    ("describe the picture 🙂 and ~ and 😀", 1),
    ("^", None),
    ("a literal <unk>, <image> and << in a much longer question 😀🙂 ~ than the others", 0),
    ("</s><s><ans></s><s>", 2),
)


@pytest.fixture
def requests(golden, chat) -> list[ChatRequest]:
    """Of all kinds: pictures twice and none, unknown strings, a second turn."""
    first = chat.ask(golden.image(1), "月", max_new_tokens=LENGTH)
    return [
        *(ChatRequest(None if index is None else golden.image(index), question) for question, index in QUESTIONS),
        ChatRequest(golden.image(1), "红?", first.context),
        ChatRequest(None, "蓝", first.context, first.vision_hidden_states),
    ]


def alone(chat, request, **options):
    return chat.ask(request.image, request.question, request.context, request.vision_hidden_states, **options)


def texts(turns) -> list[tuple[str, str, int]]:
    return [(turn.answer, turn.context, turn.num_tokens) for turn in turns]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "reference"},
        {"mode": "reference", "num_beams": 2, "length_penalty": 1.0},
        {"mode": "generate"},
        {"mode": "generate", "num_beams": 3},
        {"mode": "generate", "do_sample": True, "temperature": 3.0, "seed": 5},
        {
            "mode": "generate",
            "do_sample": True,
            "temperature": 2.0,
            "top_p": 0.9,
            "repetition_penalty": 1.2,
            "seed": 1,
        },
    ],
    ids=["reference", "reference 2", "greedy", "beams", "sampling", "top-p"],
)
def test_batch_is_its_questions(chat, requests, options):
    options = {"max_new_tokens": LENGTH, **options}
    together = chat.ask_batch(requests, **options)
    expected = [alone(chat, request, **options) for request in requests]
    assert texts(together) == texts(expected)
    assert len({turn.answer for turn in together}) > 2
    for turn, other in zip(together, expected, strict=True):
        assert (turn.vision_hidden_states is None) == (other.vision_hidden_states is None)
        if other.vision_hidden_states is not None:
            torch.testing.assert_close(turn.vision_hidden_states, other.vision_hidden_states, atol=1e-5, rtol=1e-5)


def test_draws_are_a_rows_own(chat, requests):
    """Neither the order nor the rest of the batch matters, and every row can have its seed."""
    options = {"mode": "generate", "do_sample": True, "temperature": 3.0, "max_new_tokens": LENGTH}
    seeds = list(range(len(requests)))
    together = texts(chat.ask_batch(requests, seed=seeds, **options))
    assert together == texts(chat.ask_batch(requests[::-1], seed=seeds[::-1], **options))[::-1]
    expected = [alone(chat, request, seed=seed, **options) for request, seed in zip(requests, seeds, strict=True)]
    assert together == texts(expected)
    some = chat.ask_batch(requests[2:4], seed=[2, None], **options)
    assert texts(some)[0] == together[2]
    state = torch.get_rng_state()
    chat.ask_batch(requests, seed=3, **options)
    assert torch.equal(state, torch.get_rng_state())


def test_pictures_are_encoded_once(golden, chat):
    """Two paths, one picture object twice, bytes twice: four pictures in one pass."""
    picture, content = PIL.Image.open(golden.image(2)), golden.image(2).read_bytes()
    images = [golden.image(0), str(golden.image(0)), golden.image(1), picture, picture, content, bytes(content)]
    shapes = []
    hook = chat.model.model.vision_tower.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    try:
        turns = chat.ask_batch([ChatRequest(image, "月") for image in images], max_new_tokens=2)
    finally:
        hook.remove()
    assert [shape[0] for shape in shapes] == [4]
    assert turns[3].answer == turns[4].answer == turns[5].answer


def test_no_questions(chat):
    assert chat.ask_batch([]) == []


# ----------------------------------------------------------------------------------------------------------- bad input


def test_bad_questions_leave_the_others(golden, chat, tmp_path):
    (tmp_path / "broken.png").write_bytes(golden.image(0).read_bytes()[:100])
    good = ChatRequest(golden.image(0), "月")
    bad = {
        "truncated or damaged": ChatRequest(tmp_path / "broken.png", "月"),
        "There is no image file": ChatRequest(tmp_path / "none.png", "月"),
        "A question is a str, got int": ChatRequest(None, 3),
        "more than the limit of 3,000": ChatRequest(None, "a" * 4000),
        "opens a special token": ChatRequest(None, "月", "a < b"),
        "vision_hidden_states has shape": ChatRequest(None, "月", "", torch.zeros(1, 2, 3)),
        "Expected an image": ChatRequest(7, "月"),
    }
    requests = [good, *bad.values(), good]
    turns = chat.ask_batch(requests, max_new_tokens=LENGTH, return_exceptions=True)
    expected = chat.ask(golden.image(0), "月", max_new_tokens=LENGTH)
    assert texts([turns[0], turns[-1]]) == texts([expected] * 2)
    for message, error in zip(bad, turns[1:-1], strict=True):
        assert isinstance(error, (ValueError, OSError)) and message in str(error), (message, error)
    with pytest.raises(ValueError, match="There is no image file"):
        chat.ask_batch([good, bad["There is no image file"]], max_new_tokens=LENGTH)


def test_bad_arguments(chat):
    requests = [ChatRequest(None, "月")] * 2
    with pytest.raises(ValueError, match="3 seeds for 2 requests"):
        chat.ask_batch(requests, seed=[1, 2, 3])
    with pytest.raises(ValueError, match="mode is one of"):
        chat.ask_batch(requests, mode="best")
    with pytest.raises(ValueError, match="no parameter top_p"):
        chat.ask_batch(requests, top_p=0.5)
    with pytest.raises(ValueError, match="max_new_tokens"):
        chat.ask_batch(requests, mode="generate", max_new_tokens=0)


def test_flagged_pictures(own_chat, golden):
    flagged = golden.image(0)
    own_chat.image_safety_checker = lambda picture: picture.filename == str(flagged)
    requests = [ChatRequest(flagged, "月"), ChatRequest(golden.image(1), "月"), ChatRequest(flagged, "红")]
    own_chat.image_safety_policy = "refuse"
    turns = own_chat.ask_batch(requests, max_new_tokens=LENGTH)
    assert [turn.answer == REFUSAL for turn in turns] == [True, False, True]
    assert turns[1].answer == own_chat.ask(golden.image(1), "月", max_new_tokens=LENGTH).answer
    own_chat.image_safety_policy = "raise"
    turns = own_chat.ask_batch(requests, max_new_tokens=LENGTH, return_exceptions=True)
    assert [isinstance(turn, UnsafeImageError) for turn in turns] == [True, False, True]
    with pytest.raises(UnsafeImageError):
        own_chat.ask_batch(requests)
