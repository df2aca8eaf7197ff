"""What `generate` does with the siblings."""

import pytest
import torch
import transformers
from packaging.version import Version
from sibling_inputs import model_inputs, sample
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor, TextIteratorStreamer, TextStreamer


LENGTH = 8
GREEDY = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None}


def new_ids(model, inputs, **options) -> list[list[int]]:
    length = inputs["input_ids"].shape[1]
    return model.generate(**inputs, **{**GREEDY, **options})[:, length:].tolist()


@pytest.mark.parametrize(
    "penalties", [{}, {"repetition_penalty": 1.5}, {"no_repeat_ngram_size": 2}, {"no_repeat_ngram_size": 1}]
)
def test_answers_are_the_references(system, sibling, penalties):
    """The reference's penalties see new tokens only; the prompt has the tokens that they would have to punish."""
    prompt = sample(system, 2)
    likely = system.greedy(prompt.ids, prompt.views, 1)[0]
    prompt.ids.extend([likely, likely, 7])
    answer = new_ids(sibling, model_inputs([prompt]), **penalties)
    assert answer == [system.greedy(prompt.ids, prompt.views, LENGTH, **penalties)]


def test_a_processor_of_ones_own_sees_the_prompt(system, sibling):
    prompt = sample(system, 1)
    (first,) = new_ids(sibling, model_inputs([prompt]), max_new_tokens=1)[0]
    prompt.ids.append(first)
    inputs = model_inputs([prompt])
    own = LogitsProcessorList([NoRepeatNGramLogitsProcessor(1)])
    assert not set(new_ids(sibling, inputs, logits_processor=own)[0]) & set(prompt.ids)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 3, "repetition_penalty": 1.2}])
def test_batch_is_its_items_alone_with_other_numbers_of_views(system, sibling, options):
    samples = [sample(system, 3, 4), sample(system, 0, 9, seed=1), sample(system, 1, 2, seed=2)]
    alone = [new_ids(sibling, model_inputs([one]), **options)[0] for one in samples]
    assert new_ids(sibling, model_inputs(samples), **options) == alone


def test_samples_of_one_prompt(system, sibling):
    torch.manual_seed(0)
    inputs = model_inputs([sample(system, 2), sample(system, 1, seed=1)])
    answers = new_ids(sibling, inputs, do_sample=True, num_return_sequences=2)
    assert len(answers) == 4


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}])
def test_cache_changes_nothing(system, sibling, options):
    inputs = model_inputs([sample(system, 2), sample(system, 0, seed=1)])
    static = {"disable_compile": True} if "cache_implementation" in options else {}
    assert new_ids(sibling, inputs, **options, **static) == new_ids(sibling, inputs)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers before 5.23 gives every piece of a prompt the features of all its images",
)
def test_prompt_in_pieces(system, sibling):
    inputs = model_inputs([sample(system, 3)])
    assert new_ids(sibling, inputs, prefill_chunk_size=5) == new_ids(sibling, inputs)


def test_generation_from_embeddings(system, sibling):
    """As the originals did it: only new tokens come back."""
    prompt = sample(system, 2)
    inputs = model_inputs([prompt])
    answer = new_ids(sibling, inputs, repetition_penalty=1.5)
    embeddings = system.embeddings(prompt.ids, prompt.views)[None]
    assert sibling.generate(inputs_embeds=embeddings, repetition_penalty=1.5, **GREEDY).tolist() == answer


class Numbers:
    """A tokenizer that writes ids."""

    def decode(self, ids, **kwargs) -> str:
        return "".join(f"{token} " for token in ids)


def test_streamed_is_returned(system, sibling):
    inputs = model_inputs([sample(system, 2)])
    streamer = TextIteratorStreamer(Numbers(), skip_prompt=True)
    assert isinstance(streamer, TextStreamer)
    (answer,) = new_ids(sibling, inputs, streamer=streamer)
    assert [int(word) for word in "".join(streamer).split()] == answer


def test_end_of_text_is_known(system, sibling):
    assert sibling.generation_config.eos_token_id == 2
    assert sibling.generation_config.bos_token_id == 1
