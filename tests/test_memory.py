"""What a model is said to need, against what it takes."""

import json

import paint_support
import pytest
import torch
import transformers
from support import PRUNED_CASE, Golden
from torch import nn
from transformers import AutoModelForCausalLM

from viscpm_hf import (
    CpmBeeConfig,
    OriginalCheckpointError,
    PackedConfig,
    ReferenceDecodingConfig,
    VisCPMChatConfig,
    VisCPMChatForConditionalGeneration,
    memory_plan,
)
from viscpm_hf.loading.quantization import quantization_config
from viscpm_hf.memory import Machine, Work
from viscpm_hf.memory.activations import peak_bytes
from viscpm_hf.memory.sizes import model_sizes
from viscpm_hf.memory.work import cache_places, kv_bytes, work_bytes
from viscpm_hf.modeling.cache_cpm_bee import CpmBeeCache


GOLDEN_A = Golden("chat_a")
MACHINE = Machine(ram=int(64e9), gpu=int(24e9), ram_bandwidth=20e9, cpu_flops=1e12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model that bitsandbytes takes in 4 bits: multiples of 64. Pruning left nothing of its second layer."""
    text = CpmBeeConfig(
        vocab_size=300, hidden_size=128, num_attention_heads=2, head_dim=64, intermediate_size=192,
        num_hidden_layers=3, mask_modules=[[False, False], [True, True], [True, False]],
    )  # fmt: skip
    vision = {
        "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
        "num_query_tokens": 4,
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    config = VisCPMChatConfig(text_config=text.to_dict(), vision_config=vision)
    VisCPMChatForConditionalGeneration(config).save_pretrained(folder)
    return folder


def loaded_bytes(model: nn.Module) -> int:
    """Of all tensors of a loaded model, those of quantised weights' states included."""
    tensors: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if type(module).__name__ == "Linear8bitLt":
            tensors.append(module.weight.SCB if module.weight.SCB is not None else module.state.SCB)
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in tensors}.values())


# -------------------------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantization", [None, "int8", "nf4", "packed8", "packed4"])
def test_weights_are_those_of_the_loaded_model(folder, dtype, quantization):
    name = {"packed8": "8bit", "packed4": "4bit"}.get(quantization, quantization)
    options = {} if quantization is None else {"quantization_config": quantization_config(name, dtype)}
    model = VisCPMChatForConditionalGeneration.from_pretrained(folder, dtype=dtype, device_map="cpu", **options)
    sizes = model_sizes(folder)
    assert sum(sizes.weights(dtype, quantization).values()) == loaded_bytes(model)
    layers = [loaded_bytes(layer) for layer in model.model.language_model.layers]
    assert sizes.layers(dtype, quantization) == layers


def test_paints_weights_are_those_of_the_loaded_model(tmp_path):
    sizes = model_sizes(paint_support.PAINT / "pytorch_model.bin")
    parts = paint_support.components()
    weights = sizes.weights(torch.bfloat16, diffusion_dtype=torch.float32)
    assert weights["UNet"] == loaded_bytes(parts["unet"]) and weights["VAE"] == loaded_bytes(parts["vae"])
    expected = loaded_bytes(parts["text_encoder"].to(torch.bfloat16))
    assert sum(size for part, size in weights.items() if part not in ("UNet", "VAE")) == expected


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("length", [3, 300])
def test_the_cache_is_that_of_an_answer(beams, length, monkeypatch):
    """The keys and values that are there when an answer of full length ends."""
    chat = GOLDEN_A.load_chat()
    caches = []
    monkeypatch.setattr(CpmBeeCache, "__init__", remember(caches, CpmBeeCache.__init__))
    end = chat.model.config.text_config.eos_token_id
    chat.model.lm_head.register_forward_hook(lambda module, args, logits: forbid(logits, end))
    options = {"mode": "generate"} if beams == 1 else {"num_beams": beams, "temperature": 1.0}
    turn = chat.ask(GOLDEN_A.image(0), "颜色", max_new_tokens=length, **options)
    assert turn.num_tokens == (length if beams == 1 else ReferenceDecodingConfig(max_new_tokens=length).last_step + 1)
    (cache,) = caches
    found = sum(buffer.nbytes for layer in cache.layers for buffer in layer._buffers)
    document = {"image": "<image>", "context": "", "question": "颜色", "<ans>": ""}
    prompt = chat.processor.encode_prompt(chat.processor.parse_prompt(document)).prompt()
    work = Work(prompt_length=len(prompt), length=length, beams=beams)
    assert kv_bytes(model_sizes(GOLDEN_A.weights), work, torch.float32) == found


def remember(caches: list, initialize):
    def __init__(self):
        initialize(self)
        caches.append(self)

    return __init__


def forbid(logits: torch.Tensor, token: int) -> torch.Tensor:
    logits[..., token] = -1e4
    return logits


def test_places_of_a_growing_cache():
    assert cache_places(100, 0, 1) == cache_places(100, 256, 1) == 356
    assert cache_places(100, 257, 1) == 357 + 256
    assert cache_places(100, 258, 3) == 358 + 256


def test_peak_of_what_is_alive():
    weight = torch.empty(100, 100, device="meta")

    def compute():
        first = weight @ weight  # 40,000 bytes
        second = first.t() + 1  # and 40,000 more; a view takes none
        del first
        return second * 2

    assert peak_bytes(compute) == 80_000
    kept = []
    assert peak_bytes(lambda: kept.extend(weight + number for number in range(5))) == 200_000


def test_working_memory_grows_as_the_work_does():
    sizes = model_sizes(GOLDEN_A.weights)
    one = work_bytes(sizes, Work(), torch.float32)
    assert work_bytes(sizes, Work(batch=4), torch.float32).kv_cache == 4 * one.kv_cache
    assert work_bytes(sizes, Work(prompt_length=400), torch.float32).activations > 2 * one.activations
    assert work_bytes(sizes, Work(), torch.bfloat16).kv_cache == one.kv_cache / 2
    paint = model_sizes(paint_support.PAINT / "pytorch_model.bin")
    small, large = (work_bytes(paint, Work(candidates=count), torch.float32).stages for count in (1, 4))
    assert 3 < large["UNet"] / small["UNet"] < 4.5 and 3 < large["VAE"] / small["VAE"] < 4.5


# --------------------------------------------------------------------------------------------------------------- plans


@pytest.fixture(scope="module")
def released():
    return memory_plan("openbmb/VisCPM-Chat", machine=MACHINE)


def rows(plan) -> dict:
    return {(row.precision, row.placement): row for row in plan.rows}


def test_the_released_sizes_need_no_files(released):
    """Figures that follow from the model's shapes alone; the file itself has 20.6 GB, with parts that aren't used."""
    assert released.kind == "chat"
    assert released.parameters["layers"] == 48 * (4 * 4096**2 + 3 * 4096 * 10240 + 2 * 4096)
    found = rows(released)
    assert found["half", "GPU"].weights == pytest.approx(20.5e9, rel=0.01)
    assert found["int8", "GPU"].weights == pytest.approx(11.2e9, rel=0.01)
    assert found["nf4", "GPU"].weights == pytest.approx(6.75e9, rel=0.01)
    # Two bytes, keys and values, 48 layers of 4096; 512 + 2 steps of 3 beams after 164 tokens, rounded up to rooms.
    assert found["half", "GPU"].kv_cache == 2 * 2 * 48 * 4096 * cache_places(164, 514 * 3, 3)
    assert {row.placement for row in released.rows} == {"GPU", "CPU", "CPU + disk", "GPU + streamed layers"}


def test_rows_add_up(released):
    for row in released.rows:
        if row.placement == "GPU + streamed layers":
            assert row.weights <= row.weights_gpu + row.weights_ram  # two layers' room more
            assert row.peak_gpu <= MACHINE.gpu
        elif row.placement == "GPU":
            assert (row.weights_gpu, row.weights_ram, row.weights_disk) == (row.weights, 0, 0)
        elif row.placement == "CPU":
            assert (row.weights_gpu, row.weights_ram, row.weights_disk) == (0, row.weights, 0)
        if row.peak_gpu:
            assert row.peak_gpu > row.weights_gpu + row.kv_cache + row.activations
        else:
            assert row.peak_ram > row.weights_ram + row.kv_cache + row.activations
        assert row.fits == (row.problem is None)


@pytest.mark.parametrize(
    ("machine", "precision", "placement", "command"),
    [
        ({"gpu": 80e9}, "half", "GPU", "--dtype float16 --device cuda"),
        ({"gpu": 16e9}, "int8", "GPU", "--quantization 8bit --device cuda"),
        ({"gpu": 10e9}, "nf4", "GPU", "--quantization 4bit --device cuda"),
        ({"gpu": 6e9}, "nf4", "GPU + streamed layers", "CUDA_MEMORY_CPMBEE_MAX="),
        ({"gpu": None, "ram": 20e9}, "int8", "CPU", "--quantization 8bit --device cpu"),
        ({"gpu": None, "ram": 6e9}, "half", "CPU + disk", '{"": "cpu", "model.language_model.layers": "disk"}'),
    ],
)
def test_the_best_for_a_machine(machine, precision, placement, command):
    speeds = {"gpu_bandwidth": 1e12, "gpu_flops": 1e14, "ram_bandwidth": 40e9, "cpu_flops": 1e12}
    sizes = {name: None if size is None else int(size) for name, size in {"ram": 64e9, **machine}.items()}
    plan = memory_plan("openbmb/VisCPM-Chat", machine=Machine(**sizes, **speeds), work=Work(length=128, beams=1))
    assert (plan.best.precision, plan.best.placement) == (precision, placement)
    assert command in plan.advice and "--mode generate" in plan.advice


def test_nothing_fits():
    plan = memory_plan("openbmb/VisCPM-Chat", machine=Machine(ram=int(1e9), gpu=int(2e9)))
    assert plan.best is None
    assert "fits nowhere on this machine (GPU 2 GB, RAM 1 GB)" in plan.advice
    assert "It would take a GPU of 9." in plan.advice and "or RAM of 4." in plan.advice


def test_layouts_are_alike(golden, original_folder, saved_folder):
    plans = [memory_plan(source, machine=MACHINE) for source in (golden.weights, original_folder, saved_folder)]
    assert len({tuple(row.weights for row in plan.rows) for plan in plans}) == 1


def test_paint():
    plan = memory_plan("openbmb/VisCPM-Paint", machine=MACHINE, work=Work(candidates=1))
    found = rows(plan)
    assert found["half", "GPU"].weights == pytest.approx(21.1e9, rel=0.01)
    offloaded = found["nf4", "GPU + model offload"]
    assert offloaded.peak_gpu < 6.5e9 and offloaded.peak_ram > 7e9
    assert found["half", "GPU"].seconds_per_image > 0
    four = memory_plan("openbmb/VisCPM-Paint", machine=MACHINE)
    ratio = rows(four)["half", "GPU"].seconds_per_image / found["half", "GPU"].seconds_per_image
    assert 3 < ratio < 4.1


@pytest.mark.parametrize(("name", "gigabytes"), [("1b", 2.11), ("2b", 5.0), ("5b", 9.3), ("10b", 19.2)])
def test_cpm_bees_released_sizes(name, gigabytes):
    """That of 1b as its repository lists it; the others by the same count of blocks."""
    plan = memory_plan(f"openbmb/cpm-bee-{name}", machine=MACHINE)
    assert (plan.kind, plan.title) == ("cpm_bee", "CPM-Bee")
    found = rows(plan)
    assert found["half", "GPU"].weights / 1e9 == pytest.approx(gigabytes, abs=0.005 if name == "1b" else 0.05)
    num_attention_layers, width = (48, 4096) if name == "10b" else (19, 32 * {"1b": 40, "2b": 64, "5b": 128}[name])
    places = cache_places(164, 514 * 3, 3)
    assert found["half", "GPU"].kv_cache == 2 * 2 * num_attention_layers * width * places


@pytest.mark.parametrize("case", ["chat_a", PRUNED_CASE])
def test_cpm_bee_alone(case, tmp_path):
    """Original and saved; and the line of Python that is recommended loads what is promised."""
    source = Golden(case).write_layout(tmp_path / "llm", "cpm-bee")
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "saved")
    plans = [memory_plan(folder, machine=MACHINE) for folder in (source, tmp_path / "saved")]
    assert len({tuple(row.weights for row in plan.rows) for plan in plans}) == 1
    names = ("AutoModelForCausalLM", "BitsAndBytesConfig")
    for row in plans[0].rows:
        if row.placement in ("CPU", "CPU + disk") and row.precision != "int4":  # too narrow for 4 bits
            known = {name: getattr(transformers, name) for name in names} | {"PackedConfig": PackedConfig}
            model = eval(row.command, known)
            if row.placement == "CPU":
                assert loaded_bytes(model) == row.weights
    assert {"nf4", "int4"} <= {row.precision for row in plans[0].rows}


# ----------------------------------------------------------------------------------------------------------- bad input


def test_bad_models(tmp_path):
    with pytest.raises(FileNotFoundError, match="neither a path here nor in the Hub's cache"):
        memory_plan("someone/something", machine=MACHINE)
    with pytest.raises(OSError, match="nowhere.bin"):
        memory_plan(tmp_path / "nowhere.bin", machine=MACHINE)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(OriginalCheckpointError, match="holds no VisCPM checkpoint"):
        memory_plan(tmp_path, machine=MACHINE)
    with pytest.raises(ValueError, match="is VisCPM-Chat, not VisCPM-Paint"):
        memory_plan(GOLDEN_A.weights, machine=MACHINE, kind="paint")


@pytest.mark.parametrize(
    "work", [{"length": 0}, {"beams": True}, {"batch": 1.5}, {"size": 100}, {"prompt_length": -1}]
)
def test_bad_work(work):
    (name,) = work
    with pytest.raises(ValueError, match=f"{name} is a"):
        memory_plan(paint_support.PAINT / "pytorch_model.bin", machine=MACHINE, work=Work(**work))


@pytest.mark.parametrize(("gpu", "ram"), [("much", None), ("8XB", None), (None, "8 apples")])
def test_bad_machines(gpu, ram):
    with pytest.raises(ValueError, match="--gpu is a size|--ram is a number"):
        Machine.detect(gpu, ram)


def test_machines_as_given():
    assert Machine.detect("8GB", "16GB").gpu == 8_000_000_000
    assert Machine.detect("none", "16GB").gpu is None
    known = Machine.detect("rtx 4090", "1GiB")
    assert (known.gpu, known.gpu_bandwidth, known.ram) == (24_000_000_000, 1008e9, 2**30)
    assert Machine.detect(ram="2g").ram_bandwidth > 1e8
