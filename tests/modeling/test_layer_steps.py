"""Steps of all layers by one call of a kernel: what the modules compute, where nothing else is wanted."""

import copy
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers.generation import BaseStreamer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from viscpm_hf import CpmBeeConfig, CpmBeeForCausalLM
from viscpm_hf.modeling import modeling_cpm_bee
from viscpm_hf.modeling.compatibility import CACHE, cache_of
from viscpm_hf.modeling.layer_steps_cpm_bee import LayerSteps, layer_steps, step_kernel
from viscpm_hf.modeling.packed_linear import PackedConfig
from viscpm_hf.modeling.row_products import has_packed_products, kernel, use_row_products


pytestmark = pytest.mark.skipif(step_kernel() is None, reason="needs a C++ compiler on Linux")

PROMPT, WORDS = 20, 600
# Attention of the second layer and MLP of the third are gone.
PRUNED = {"mask_modules": [(False, False), (True, False), (False, True)]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    def make(pruned: bool):
        name = tmp_path_factory.getbasetemp() / f"layer_steps_{pruned}"
        if not name.exists():
            torch.manual_seed(0)
            sizes = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 3, "head_dim": 64}
            config = CpmBeeConfig(
                num_words=WORDS, num_hidden_layers=3, eos_token_id=None, **sizes, **(PRUNED if pruned else {})
            )
            model = CpmBeeForCausalLM(config)
            for parameter in model.parameters():
                parameter.data.normal_(std=0.15)
            model.save_pretrained(name)
        return name

    return make


def load(folder, dtype: torch.dtype = torch.float32, bits: int | None = None, pruned: bool = False, needs_kernel=True):
    if needs_kernel and bits and not has_packed_products(kernel()):
        pytest.skip("needs VNNI and VBMI")
    options = {} if bits is None else {"quantization_config": PackedConfig(bits, ["lm_head"])}
    model = CpmBeeForCausalLM.from_pretrained(folder(pruned), dtype=dtype, **options).eval()
    use_row_products(model)
    return model


@pytest.fixture
def calls(monkeypatch):
    """Rows of the steps that the kernel took."""
    taken = []
    stock = LayerSteps.__call__

    def call(steps, hidden_states, *given):
        found = stock(steps, hidden_states, *given)
        if found is not None:
            taken.append(hidden_states.shape[0] * hidden_states.shape[1])
        return found

    monkeypatch.setattr(LayerSteps, "__call__", call)
    return taken


@torch.no_grad()
def decode(model, batch: int, queries: int, steps: int = 3, **options):
    """Hidden states of steps after prompts of unequal lengths, and the cache."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(7, WORDS, (batch, PROMPT + queries * steps), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    outputs = model.model(ids[:, :PROMPT], attention_mask=mask[:, :PROMPT], use_cache=True)
    found, cache = [], cache_of(outputs)
    for end in range(PROMPT + queries, ids.shape[1] + 1, queries):
        bias = None
        if queries > 1:  # as beams have it: each sees itself and all before
            bias = torch.zeros(batch, 3, queries, end)
            bias[..., end - queries :] = torch.where(torch.eye(queries, dtype=torch.bool), 0, -1e38)
            bias = (bias + torch.linspace(-2, 2, end)).to(model.dtype)
        given = {"position_bias": bias, "attention_mask": mask[:, :end], **{CACHE: cache}, **options}
        found.append(model.model(ids[:, end - queries : end], use_cache=True, **given))
    return found, cache


@pytest.fixture
def no_compiler(monkeypatch):
    """As on a machine without one, where nothing is compiled yet."""
    kernels = (kernel, step_kernel)
    for made in kernels:
        made.cache_clear()
    monkeypatch.setenv("CXX", "no-such-compiler")
    yield
    for made in kernels:
        made.cache_clear()


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_any_number_of_threads_gives_the_same(folder, calls, bits):
    model, given = load(folder, bits=bits), torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 8):  # fewer than cores, or more
            torch.set_num_threads(threads)
            steps, _ = decode(model, 2, 1, steps=20)
            found.append(torch.cat([step.last_hidden_state for step in steps]))
    finally:
        torch.set_num_threads(given)
    assert calls == [2] * 60
    for others in found[1:]:
        torch.testing.assert_close(others, found[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_without_a_compiler_the_modules_compute(folder, calls, no_compiler, bits):
    model = load(folder, bits=bits, needs_kernel=False)
    found, _ = decode(model, 1, 1)
    assert step_kernel() is None and calls == []
    assert all(torch.isfinite(step.last_hidden_state).all() for step in found)
    assert model.generate(torch.tensor([[7, 8, 9]]), max_new_tokens=3).shape == (1, 6)


@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (3, 1), (1, 3), (2, 2), (7, 1)])
@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("bits", [None, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_the_modules(folder, calls, monkeypatch, dtype, bits, pruned, batch, queries):
    model = load(folder, dtype, bits, pruned)
    ours, cache = decode(model, batch, queries)
    assert calls == ([batch * queries] * 3 if bits or batch * queries <= 4 else [])
    monkeypatch.setattr(modeling_cpm_bee, "step_layers", lambda *given: None)
    theirs, other = decode(model, batch, queries)
    error = 2e-2 if dtype == torch.bfloat16 else 1e-3 if bits else 1e-5
    for mine, expected in zip(ours, theirs, strict=True):
        mine, expected = mine.last_hidden_state.float(), expected.last_hidden_state.float()
        assert (mine - expected).norm() <= error * expected.norm()
    for mine, expected in zip(cache.layers, other.layers, strict=True):
        assert mine.get_seq_length() == expected.get_seq_length() == PROMPT + 3 * queries
        for name in ("keys", "values"):
            mine_states, states = (getattr(it, name).float() for it in (mine, expected))
            assert (mine_states - states).norm() <= error * states.norm()


def narrow(mlp: nn.Module) -> None:
    """Leaves half of an MLP, as structured pruning does."""
    half = mlp.up_proj.weight.shape[0] // 2
    for name in ("gate_proj", "up_proj"):
        getattr(mlp, name).weight.data = getattr(mlp, name).weight.data[:half].clone()
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :half].clone()


WANTS_MODULES = {
    "hidden states": lambda model: {"output_hidden_states": True},
    "a hook in a layer": lambda model: model.model.layers[1].mlp.register_forward_hook(lambda *given: None) and {},
    "a hook of a layer": lambda model: model.model.layers[1].register_forward_pre_hook(lambda *given: None) and {},
    "a forward of one's own": lambda model: model.model.layers[0].mlp.__dict__.update(
        forward=model.model.layers[0].mlp.forward
    ) or {},
    "another module": lambda model: setattr(model.model.layers[2].mlp, "up_proj", nn.Sequential(
        model.model.layers[2].mlp.up_proj)) or {},
    "another activation": lambda model: setattr(model.model.layers[2].mlp, "act_fn", nn.ReLU()) or {},
    "no module": lambda model: setattr(model.model.layers[2], "mlp", nn.Identity()) or {},
    "an attention of one's own": lambda model: setattr(model.config, "_attn_implementation", "watched") or {},
    "dropout": lambda model: setattr(model.train().config, "attention_dropout", 0.5) or {},
    "weights of another size": lambda model: narrow(model.model.layers[0].mlp) or {},
    "weights of another dtype": lambda model: model.model.layers[0].self_attn.double() and {},
}  # fmt: skip


@pytest.mark.parametrize("wish", WANTS_MODULES)
def test_the_modules_compute_where_more_is_wanted(folder, calls, monkeypatch, wish):
    model = load(folder)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "watched", modeling_cpm_bee.eager_attention_forward)
    decode(model, 1, 1)
    assert len(calls) == 3
    options = WANTS_MODULES[wish](model)
    if wish == "weights of another dtype":
        assert layer_steps(model.model).kernel is None
        return
    decode(model, 1, 1, **options)
    assert len(calls) == 3


@torch.no_grad()
def test_changed_weights_count_at_once(folder, calls, monkeypatch):
    model = load(folder)
    before = decode(model, 1, 1)[0][-1].last_hidden_state
    weight = model.model.layers[1].mlp.down_proj.weight
    weight.data = weight.data.clone() * 2
    after = decode(model, 1, 1)[0][-1].last_hidden_state
    weight.mul_(0.5)
    assert not torch.allclose(before, after, rtol=1e-2)
    torch.testing.assert_close(decode(model, 1, 1)[0][-1].last_hidden_state, before)
    assert len(calls) == 9
    twin = copy.deepcopy(model)
    twin.model.norm.weight.zero_()
    assert decode(twin, 1, 1)[0][-1].last_hidden_state.abs().max() == 0
    torch.testing.assert_close(decode(model, 1, 1)[0][-1].last_hidden_state, before)


def test_weights_that_another_moves_while_an_answer_is_generated_stay_readable(folder, calls):
    model, ids = load(folder), torch.arange(7, 27)[None]

    class Mover(BaseStreamer):
        moved: list[torch.Tensor] = []

        def put(self, value):
            for weight in model.model.layers.parameters():
                place = weight.data_ptr()
                weight.data = weight.data.clone()
                assert weight.data_ptr() != place
                self.moved.append(torch.full_like(weight, torch.nan))  # where memory would be free

        def end(self):
            pass

    ordinary = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False, streamer=Mover()), ordinary)
    model.model.layers[1].mlp.down_proj.weight.data = torch.zeros_like(model.model.layers[1].mlp.down_proj.weight)
    calls.clear()
    changed = model.generate(ids, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert len(calls) == 4
    prompt = model(ids, use_cache=True)
    step = model(changed.sequences[:, 20:21], use_cache=True, **{CACHE: cache_of(prompt)})
    torch.testing.assert_close(changed.logits[1], step.logits[:, -1].detach(), rtol=1e-4, atol=1e-4)


def test_memory_that_weights_have_left_is_free_after_an_answer(folder, calls):
    model = load(folder)
    weight = model.model.layers[0].mlp.down_proj.weight
    memory = weight.detach().numpy().copy()
    weight.data, memory = torch.from_numpy(memory), weakref.ref(memory)
    model.generate(torch.arange(7, 27)[None], max_new_tokens=3, do_sample=False)
    assert len(calls) == 2 and memory() is not None
    weight.data = weight.data.bfloat16()
    assert memory() is None


def test_training_by_steps_after_an_answer(folder):
    model, ids = load(folder), torch.arange(7, 27)[None]
    with torch.inference_mode():
        model.generate(ids, max_new_tokens=3, do_sample=False)
    cache = cache_of(model(ids[:, :-1], use_cache=True))
    model(ids[:, -1:], use_cache=True, **{CACHE: cache}).logits.sum().backward()
    assert model.model.position_bias.relative_attention_bias.weight.grad.isfinite().all()


@torch.no_grad()
def test_a_step_of_fake_numbers_leaves_nothing_behind(folder):
    model, ids = load(folder), torch.tensor([[7]])
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert type(model(ids).logits) is FakeTensor
    assert type(model(ids).logits) is torch.Tensor


@torch.no_grad()
def test_changed_layers_count_at_once(folder, calls, monkeypatch):
    model = load(folder)
    decode(model, 1, 1)
    model.model.layers = model.model.layers[:2]
    ours = decode(model, 1, 1)[0][-1].last_hidden_state
    model.model.norm = copy.deepcopy(model.model.norm)
    model.model.norm.weight.mul_(2)
    twice = decode(model, 1, 1)[0][-1].last_hidden_state
    assert len(calls) == 9
    monkeypatch.setattr(modeling_cpm_bee, "step_layers", lambda *given: None)
    torch.testing.assert_close(decode(model, 1, 1)[0][-1].last_hidden_state, twice, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(twice, 2 * ours)


@torch.no_grad()
def test_a_copied_cache_is_written_apart_from_the_original(folder, calls):
    model = load(folder)
    cache = decode(model, 1, 1)[1]
    for copied in (copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))):
        twin, before = copied(cache), cache.layers[1].keys.clone()
        for given in (cache, twin):
            model.model(torch.tensor([[50 + (given is twin)]]), **{CACHE: given}, use_cache=True)
        model.model(torch.tensor([[60]]), **{CACHE: twin}, use_cache=True)
        assert torch.equal(cache.layers[1].keys[:, :, :-1], before)
        assert torch.equal(twin.layers[1].keys[:, :, :-2], before)
        assert not torch.equal(cache.layers[0].keys[:, :, -1], twin.layers[0].keys[:, :, -2])
    assert len(calls) == 9


def test_with_other_caches_the_modules_compute(folder, calls):
    """Nothing is written over the ends of keys in half the bytes, or over places that aren't there."""
    model = load(folder)
    with torch.autocast("cpu", torch.bfloat16):
        _, cache = decode(model, 1, 1)
    assert cache.layers[0].keys.dtype == torch.bfloat16 and not calls
    with torch.no_grad(), pytest.raises(RuntimeError):
        model.model(torch.tensor([[50]]), **{CACHE: cache}, use_cache=True)
    _, cache = decode(model, 1, 1)
    with torch.no_grad(), pytest.raises(RuntimeError, match="size"):
        bias = torch.zeros(1, 3, 1, 5)
        model.model(torch.tensor([[50]]), **{CACHE: cache}, use_cache=True, position_bias=bias)
    assert len(calls) == 3


@pytest.mark.parametrize("change", ["reorder_cache", "crop", "deepcopy", "repeat"])
@torch.no_grad()
def test_a_cache_that_was_changed_in_between(folder, calls, monkeypatch, change):
    def run(model):
        cache = decode(model, 2, 1)[1]
        if change == "reorder_cache":
            cache.reorder_cache(torch.tensor([1, 0]))
        elif change == "crop":
            cache.crop(-2)
        elif change == "repeat":
            cache.batch_repeat_interleave(2)
        else:
            kept, cache = cache, copy.deepcopy(cache)
            model.model(torch.tensor([[50], [60]]), **{CACHE: kept}, use_cache=True)
        ids = torch.arange(50, 50 + cache.layers[0].keys.shape[0])[:, None]
        return [model.model(ids + step, **{CACHE: cache}, use_cache=True).last_hidden_state for step in range(3)]

    model = load(folder)
    ours = run(model)
    assert len(calls) >= 6
    monkeypatch.setattr(modeling_cpm_bee, "step_layers", lambda *given: None)
    for mine, expected in zip(ours, run(model), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)


def test_with_gradients_the_modules_compute(folder, calls):
    model = load(folder).requires_grad_()
    outputs = model.model(torch.arange(7, 27)[None], use_cache=True)
    model.model(torch.tensor([[50]]), **{CACHE: cache_of(outputs)}, use_cache=True).last_hidden_state.sum().backward()
    assert not calls and model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_where_kernels_take_the_weights_there_are_no_graphs(folder):
    model, ids = load(folder), torch.arange(7, 27)[None]
    ordinary = model.generate(ids, max_new_tokens=4, do_sample=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, fast=True), ordinary)
    assert not model.fast_decoder.graphs
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
