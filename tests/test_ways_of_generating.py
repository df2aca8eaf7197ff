"""However a model of ours is decoded and by whichever release of transformers, it answers the same."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import ways_of_generating
from transformers import DynamicCache, StaticCache
from ways_of_generating import LENGTH, NAMES, answers, make_inputs, make_model


@pytest.fixture(scope="module", params=NAMES)
def named_model(request):
    model = make_model(request.param)
    return request.param, model, make_inputs(request.param, model)


def greedy(model, inputs) -> list[int]:
    """Token by token, with nothing of `generate`: the whole prompt is read again for every token."""
    inputs, answer = dict(inputs), []
    for _ in range(LENGTH):
        with torch.no_grad():
            answer.append(int(model(**inputs, use_cache=False).logits[0, -1].argmax()))
        more = {"input_ids": answer[-1], "attention_mask": 1, "token_type_ids": 1, "segment_ids": 2}
        for name, following in more.items():
            if name in inputs:
                inputs[name] = torch.cat([inputs[name], torch.tensor([[following]])], dim=1)
    return answer


def test_every_way_is_greedy(named_model):
    _, model, inputs = named_model
    expected = greedy(model, inputs)
    assert len(set(expected)) > 4 and min(expected) > 9  # an answer that could go wrong
    assert answers(model, inputs) == dict.fromkeys(answers(model, inputs), expected)


def test_an_assistant_sees_the_image(named_model):
    """A draft that is the model itself is always right, if it is shown the same."""
    _, model, inputs = named_model
    draft, passes = copy.deepcopy(model), []
    draft.generation_config.update(num_assistant_tokens=3, num_assistant_tokens_schedule="constant")
    draft.generation_config.assistant_confidence_threshold = 0.0
    hook = model.register_forward_pre_hook(lambda *_: passes.append(1))
    model.generate(**inputs, assistant_model=draft, max_new_tokens=LENGTH, eos_token_id=None, do_sample=False)
    hook.remove()
    assert len(passes) == LENGTH // 4


def test_exported_folders_answer_the_same(tmp_path):
    folders = [ways_of_generating.write(name, tmp_path / name) for name in NAMES]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    program = Path(ways_of_generating.__file__)
    done = subprocess.run(
        [sys.executable, program, *folders], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name in NAMES:
        model = make_model(name)
        assert found[name] == dict.fromkeys(found[name], greedy(model, make_inputs(name, model))), name


# ------------------------------------------------------------------------------------------------ arguments of forward


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("argument", ["cache", "past_key_values"])
def test_a_cache_goes_by_the_name_of_either_release(named_model, argument, kind):
    name, model, inputs = named_model
    expected = greedy(model, inputs)[:2]
    config = model.config.get_text_config(decoder=True)
    given = {argument: kind(config=config, **({"max_cache_len": 64} if kind is StaticCache else {}))}
    with torch.no_grad():
        first = model(**inputs, **given, use_cache=True)
        following = {key: inputs[key] for key in ("segment_ids", "segment_relations") if key in inputs}
        token, mask = first.logits[:, -1:].argmax(-1), torch.ones(1, inputs["input_ids"].shape[1] + 1).long()
        second = model(input_ids=token, attention_mask=mask, **following, **given, use_cache=True)
    assert [int(token), int(second.logits[0, -1].argmax())] == expected


@pytest.mark.parametrize(
    "argument", ["position_idz", "cache_position", "past_key_value", "decoder_attention_mask", "head_mask"]
)
def test_an_unknown_argument_is_refused_by_name(named_model, argument):
    _, model, inputs = named_model
    with pytest.raises(TypeError, match=f"got an unexpected argument '{argument}', which it would have ignored"):
        model(**inputs, **{argument: torch.zeros(1, 1).long()})
    model(**inputs, **{argument: None})  # as good as not given


def test_positions_and_causality_are_not_for_cpm_bee(named_model):
    """Its document says who sees whom and where; the siblings' language models take both."""
    name, model, inputs = named_model
    given = {"position_ids": torch.arange(inputs["input_ids"].shape[1])[None]}
    if name not in ("cpm-bee", "viscpm-chat"):
        torch.testing.assert_close(model(**inputs, **given).logits, model(**inputs).logits)
        return
    for argument in (given, {"is_causal": True}, {"cu_seq_lens_q": torch.tensor([0, 4])}):
        with pytest.raises(TypeError, match="unexpected argument"):
            model(**inputs, **argument)


def test_what_transformers_hands_on_passes(named_model):
    _, model, inputs = named_model
    outputs = model(
        **inputs, labels=inputs["attention_mask"], num_items_in_batch=torch.tensor(3), output_hidden_states=True,
        return_dict=False, tokenizer=object(),
    )  # fmt: skip
    assert isinstance(outputs, tuple)


def test_vision_towers_and_encoders_refuse_too(named_model):
    name, model, inputs = named_model
    if name == "cpm-bee":
        pytest.skip("takes no images")
    with pytest.raises(TypeError, match="unexpected argument 'bool_masked_pos'"):
        model.get_image_features(inputs["pixel_values"], bool_masked_pos=torch.ones(1, 4))


def test_two_caches_are_one_too_many(named_model):
    _, model, inputs = named_model
    with pytest.raises(TypeError, match="twice, as cache and as past_key_values"):
        model(**inputs, cache=DynamicCache(), past_key_values=DynamicCache())


def test_image_outputs(named_model):
    name, model, inputs = named_model
    if name == "cpm-bee":
        pytest.skip("takes no images")
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
        encoded = model.get_image_features(inputs["pixel_values"])
    torch.testing.assert_close(outputs.image_outputs.pooler_output, encoded.pooler_output)
    assert outputs.image_hidden_states is outputs.image_outputs.pooler_output
    assert outputs.image_outputs.hidden_states is not None
    without = model(input_ids=torch.tensor([[11, 12]]))
    assert without.image_outputs is None and without.image_hidden_states is None
