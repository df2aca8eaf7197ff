"""Speed and memory of VisCPM-Paint on this machine: prompts, denoising, decoding.

    python benchmarks/paint.py            # on a CPU a small model, on a GPU the released sizes in fp16
    python benchmarks/paint.py --quick    # does it run at all: seconds
    python benchmarks/paint.py --compile  # UNet compiled and channels-last too: minutes for each of --batches
    python benchmarks/paint.py --original FILE  # ratios to figures of the original, measured on this machine

Beside our pipeline stands the original's way of going about it, on the same weights: a pass of the text encoder for
each of prompt and negative prompt, the plain loop, all images decoded at once. FILE is JSON with seconds of the
original itself (`prompt_encoding_seconds`, `ten_steps_seconds`, `four_images_seconds`), whose code isn't here.

Weights are random and seeded, nothing is downloaded. The last line printed is one JSON object with all figures;
progress goes to stderr.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel

import viscpm_hf
from viscpm_hf import CpmBeeTokenizer, VisCPMPaintPipeline, VisCPMPaintTextEncoder, VisCPMPaintTextEncoderConfig
from viscpm_hf.loading.paint import UNET_CONFIG, VAE_CONFIG, compile_unet
from viscpm_hf.pipelines.pipeline_viscpm_paint import REFERENCE_SCHEDULER_CONFIG


PROMPT = "人闲桂花落，夜静春山空。月出惊山鸟，时鸣春涧中。水墨画，留白，远山，飞鸟"
VOCABULARY_SIZE = 86_583  # of the released vocabulary

SMALL_ENCODER = {
    "hidden_size": 1024, "intermediate_size": 2560, "num_hidden_layers": 8, "num_attention_heads": 8,
}  # fmt: skip
SMALL_UNET = {
    **UNET_CONFIG, "sample_size": 32, "block_out_channels": [64, 128, 256, 256], "attention_head_dim": [1, 2, 4, 4],
}  # fmt: skip
SMALL_VAE = {**VAE_CONFIG, "block_out_channels": [32, 64, 128, 128], "sample_size": 256}
QUICK_UNET = {**SMALL_UNET, "sample_size": 8, "block_out_channels": [32, 32, 32, 32], "attention_head_dim": 1}

# Targets, as (figure, limit, whether the limit is a maximum). The last three are for an H100 with the released sizes.
TARGETS = (
    ("loop_overhead_percent", 2.0, True),
    ("passes_per_prompt_pair", 1.0, True),
    ("held_after_free_over_models_percent", 1.0, True),
    ("four_images_ratio", 1.0, False),
)
GPU_TARGETS = (
    ("iterations_per_second_1", 21.7, False),
    ("compiled_iterations_per_second_1", 49.7, False),
    ("four_candidates_20_steps_seconds", 1.2, True),
)


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


class Bench:
    """The pipeline with random weights, and how time and memory are taken on its device."""

    def __init__(self, options: argparse.Namespace):
        self.device = torch.device(options.device)
        self.is_cuda = self.device.type == "cuda"
        self.dtype = torch.float16 if self.is_cuda else torch.float32
        self.steps, self.rounds, self.batches = options.steps, options.rounds, options.batches
        self.only_four = options.only_four
        self.backend = "eager" if options.quick else "inductor"  # which only looks whether there is one graph
        encoder, unet, vae = ({}, UNET_CONFIG, VAE_CONFIG) if self.is_cuda else (SMALL_ENCODER, SMALL_UNET, SMALL_VAE)
        if options.quick:
            encoder, unet, vae = {**SMALL_ENCODER, "num_hidden_layers": 2}, QUICK_UNET, SMALL_VAE
        self.pipe = self.build(encoder, unet, vae)
        self.pipe.set_progress_bar_config(disable=True)

    def build(self, encoder: dict[str, Any], unet: dict[str, Any], vae: dict[str, Any]) -> VisCPMPaintPipeline:
        torch.manual_seed(0)
        config = VisCPMPaintTextEncoderConfig(**encoder)
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            with self.device:
                models = {
                    "text_encoder": VisCPMPaintTextEncoder(config),
                    "unet": UNet2DConditionModel.from_config(unet),
                    "vae": AutoencoderKL.from_config(vae),
                }
        finally:
            torch.set_default_dtype(default)
        for model in models.values():
            model.eval().requires_grad_(False)
        with tempfile.TemporaryDirectory() as folder:
            tokenizer = CpmBeeTokenizer(write_vocabulary(Path(folder)))
        scheduler = DDPMScheduler(**REFERENCE_SCHEDULER_CONFIG)
        return VisCPMPaintPipeline(tokenizer=tokenizer, scheduler=scheduler, **models)

    def seconds(self, run: Callable[[], Any]) -> float:
        self.synchronize()
        begin = time.perf_counter()
        run()
        self.synchronize()
        return time.perf_counter() - begin

    def best(self, *runs: Callable[[], Any]) -> list[float]:
        """The best time of each, taken in turn so that what else the machine does falls on all of them."""
        times = [[self.seconds(run) for run in runs] for _ in range(self.rounds)]
        return [min(column) for column in zip(*times, strict=True)]

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize()

    def time_outside_unet(self, run: Callable[[], Any]) -> float:
        """Time outside the UNet in percent of that in it, of one and the same run: neighbours slow down both."""
        begins, inside = [], []
        before = self.pipe.unet.register_forward_pre_hook(lambda *_: begins.append(time.perf_counter()))
        after = self.pipe.unet.register_forward_hook(lambda *_: inside.append(time.perf_counter() - begins[-1]))
        total = self.seconds(run)
        before.remove()
        after.remove()
        return 100 * (total / sum(inside) - 1)

    def memory(self, run: Callable[[], Any]) -> float | None:
        """Peak memory while it runs, in MiB; None on a CPU, where there is no such counter."""
        if not self.is_cuda:
            run()
            return None
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)

    # ------------------------------------------------------------------------------------------------------- figures

    def prompts(self) -> dict[str, Any]:
        """Conditional and unconditional prompt together against one alone."""
        passes = []
        handle = self.pipe.text_encoder.register_forward_pre_hook(lambda *_: passes.append(1))
        self.pipe.encode_prompt(PROMPT)
        handle.remove()

        def both() -> None:
            self.pipe.encode_prompt(PROMPT)

        def alone() -> None:
            self.pipe.encode_prompt(PROMPT, do_classifier_free_guidance=False)

        both_seconds, alone_seconds = self.best(both, alone)
        log(f"both prompts {both_seconds:.3f} s, one {alone_seconds:.3f} s")
        return {
            "encode_seconds": both_seconds,
            "encode_prompt_alone_seconds": alone_seconds,
            "passes_per_prompt_pair": len(passes),
            "peak_memory_encoding_mib": self.memory(both),
        }

    def originals_way(self, count: int, steps: int) -> list[Any]:
        """Images as the original goes about it, with this pipeline's models."""
        pipe = self.pipe
        with torch.no_grad():
            embeds = []
            for text in (PROMPT, ""):
                _, inputs = pipe.tokenize_prompts([text])
                embeds.append(pipe.text_encoder(**inputs.to(self.device)).prompt_embeds[0])
            if not steps:
                return embeds
            prompt, negative = embeds[0][:-1], embeds[1]  # whose last row is that of padding
            negative = torch.cat([negative, negative[-1:].expand(len(prompt) - len(negative), -1)])
            hidden = torch.stack([negative, prompt]).repeat_interleave(count, dim=0)
            size = pipe._latent_size(*pipe.default_size())
            latents = torch.randn(count, *size, device=self.device, dtype=self.dtype)
            pipe.scheduler.set_timesteps(steps)
            for timestep in pipe.scheduler.timesteps:
                noise = pipe.unet(torch.cat([latents] * 2), timestep, encoder_hidden_states=hidden).sample
                negative, positive = noise.chunk(2)
                noise = negative + 7.5 * (positive - negative)
                latents = pipe.scheduler.step(noise, timestep, latents).prev_sample
            image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample
            return pipe.image_processor.postprocess(image, output_type="pil")

    def against_the_original(self, reference: dict[str, float]) -> dict[str, Any]:
        """Prompts, ten steps of one image and of four, PIL images included: ours and the original's way, in turn."""

        def ours(count: int, steps: int) -> None:
            generators = [torch.Generator().manual_seed(index) for index in range(count)]
            self.pipe(PROMPT, num_images_per_prompt=count, num_inference_steps=steps, generator=generators)

        steps = min(10, self.steps) if self.rounds == 1 else 10
        pairs = {
            "prompt_encoding": (lambda: self.originals_way(1, 0), lambda: self.pipe.encode_prompt(PROMPT)),
            "ten_steps": (lambda: self.originals_way(1, steps), lambda: ours(1, steps)),
            "four_images": (lambda: self.originals_way(4, steps), lambda: ours(4, steps)),
        }
        figures: dict[str, Any] = {}
        for name, (theirs, own) in pairs.items():
            theirs(), own()
            theirs_seconds, own_seconds = self.best(theirs, own)
            figures[f"{name}_seconds"] = round(own_seconds, 4)
            figures[f"{name}_originals_way_seconds"] = round(theirs_seconds, 4)
            figures[f"{name}_ratio"] = round(theirs_seconds / own_seconds, 3)
            if f"{name}_seconds" in reference:
                figures[f"{name}_ratio_to_the_original"] = round(reference[f"{name}_seconds"] / own_seconds, 3)
            log(f"{name}: {own_seconds:.3f} s, the original's way {theirs_seconds:.3f} s")
        return figures

    def free(self) -> dict[str, Any]:
        """Drops the text encoder; what is still held against the weights of UNet and VAE."""
        self.embeds = self.pipe.encode_prompt(PROMPT)
        self.pipe.free_text_encoder()
        gc.collect()
        models = sum(size_of(model) for model in (self.pipe.unet, self.pipe.vae))
        if self.is_cuda:
            torch._C._cuda_clearCublasWorkspaces()  # of the products before
            held = torch.cuda.memory_allocated()
        else:
            tensors = {
                tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
                for tensor in gc.get_objects()
                if issubclass(type(tensor), torch.Tensor) and not tensor.is_meta
            }
            held = sum(tensors.values())
        return {
            "unet_and_vae_mib": round(models / 2**20, 1),
            "held_after_free_mib": round(held / 2**20, 1),
            "held_after_free_over_models_percent": round(100 * (held / models - 1), 3),
        }

    def denoising(self, prefix: str = "") -> dict[str, Any]:
        """Our loop against nothing but the UNet on inputs made beforehand."""
        prompt_embeds, negative_prompt_embeds = self.embeds
        figures: dict[str, Any] = {}
        for batch in self.batches:
            size = self.pipe._latent_size(*self.pipe.default_size())
            latents = torch.randn(2 * batch, *size, device=self.device, dtype=self.dtype)
            hidden = torch.cat([negative_prompt_embeds, prompt_embeds]).repeat_interleave(batch, dim=0)
            timestep = torch.tensor(500, device=self.device)

            def bare(latents=latents, hidden=hidden, timestep=timestep) -> None:
                with torch.no_grad():
                    for _ in range(self.steps):
                        self.pipe.unet(latents, timestep, encoder_hidden_states=hidden, return_dict=False)

            def ours(batch=batch) -> None:
                self.pipe(
                    prompt_embeds=prompt_embeds,
                    negative_prompt_embeds=negative_prompt_embeds,
                    num_images_per_prompt=batch,
                    num_inference_steps=self.steps,
                    output_type="latent",
                )

            bare(), ours()
            bare_seconds, our_seconds = self.best(bare, ours)
            if self.is_cuda or prefix:  # a compiled UNet would take hooks into its graph
                overhead = 100 * (our_seconds / bare_seconds - 1)
            else:
                overhead = min(self.time_outside_unet(ours) for _ in range(self.rounds))
            figures[f"{prefix}iterations_per_second_{batch}"] = round(self.steps / our_seconds, 3)
            figures[f"{prefix}bare_iterations_per_second_{batch}"] = round(self.steps / bare_seconds, 3)
            figures[f"{prefix}loop_overhead_percent_{batch}"] = round(overhead, 2)
            figures[f"{prefix}peak_memory_denoising_mib_{batch}"] = self.memory(ours)
            log(f"{prefix}batch {batch}: {self.steps / our_seconds:.2f} it/s, {overhead:+.2f} % over the bare UNet")
        figures[f"{prefix}loop_overhead_percent"] = figures[f"{prefix}loop_overhead_percent_{self.batches[0]}"]
        return figures

    def whole(self, prefix: str = "") -> dict[str, Any]:
        """Whole images: 50 steps of DDPM, and four candidates of 20 steps of DPM-Solver++."""
        prompt_embeds, negative_prompt_embeds = self.embeds

        def draw(count: int, steps: int) -> None:
            self.pipe(
                prompt_embeds=prompt_embeds,
                negative_prompt_embeds=negative_prompt_embeds,
                num_images_per_prompt=count,
                num_inference_steps=steps,
                output_type="pt",
            )

        ddpm = self.pipe.scheduler
        self.pipe.scheduler = DPMSolverMultistepScheduler.from_config(ddpm.config)
        draw(4, 2)
        (candidates,) = self.best(lambda: draw(4, 20))
        self.pipe.scheduler = ddpm
        figures = {f"{prefix}four_candidates_20_steps_seconds": round(candidates, 4)}
        log(f"{prefix}four candidates: {candidates:.3f} s")
        if self.only_four:
            return figures
        steps = 50 if self.is_cuda else self.steps
        draw(1, 2)
        (image,) = self.best(lambda: draw(1, steps))
        latents = torch.randn(1, *self.pipe._latent_size(*self.pipe.default_size()), device=self.device)
        with torch.no_grad():
            (decoding,) = self.best(lambda: self.pipe.decode_latents(latents.to(self.dtype)))
        return figures | {
            f"{prefix}seconds_per_image": round(image, 4),
            f"{prefix}seconds_per_image_steps": steps,
            f"{prefix}vae_decode_seconds": round(decoding, 4),
            f"{prefix}peak_memory_image_mib": self.memory(lambda: draw(1, 2)),
        }

    def compile(self) -> None:
        compile_unet(self.pipe.unet, backend=self.backend, fullgraph=True)
        self.pipe.vae.to(memory_format=torch.channels_last)


def size_of(model: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def write_vocabulary(folder: Path) -> str:
    """A vocabulary of the released size: special tokens, Chinese characters, and made-up words."""
    specials = ["<pad>", "<unk>", "<mask>", "<sep>", "</n>", "</_>", "<s>", "</s>", "<root>", "<ans>", "<option>"]
    letters = [chr(code) for code in range(33, 127)] + [chr(code) for code in range(0x4E00, 0x9FA6)] + list("，。、")
    words = [f"word{index}" for index in range(VOCABULARY_SIZE - len(specials) - len(letters) - 1)]
    path = folder / "vocab.txt"
    path.write_text("\n".join([*specials, "<eod>", *letters, *words]) + "\n", "utf-8")
    return os.fspath(path)


def machine(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "diffusers": diffusers.__version__,
        "viscpm_hf": viscpm_hf.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny models, one round")
    parser.add_argument("--compile", action="store_true", help="measure a compiled, channels-last UNet too")
    parser.add_argument("--steps", type=int, help="denoising steps per measurement (CPU: 6, GPU: 50)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements, of which the best counts")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8], help="images at once")
    parser.add_argument("--original", type=Path, metavar="JSON", help="seconds of the original on this machine")
    parser.add_argument("--output", type=Path, help="write the JSON there too")
    parser.add_argument("--as-it-comes", action="store_true", help="print the JSON anew after every measurement")
    parser.add_argument(
        "--only-four", action="store_true", help="prompts, four candidates of 20 steps, and what --compile adds"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.batches = 1, options.batches[:1]
    if options.steps is None:
        options.steps = 50 if options.device.startswith("cuda") else 6

    bench = Bench(options)
    sizes = {
        f"{name}_parameters": sum(parameter.numel() for parameter in getattr(bench.pipe, name).parameters())
        for name in ("text_encoder", "unet", "vae")
    }
    log(f"{machine(bench.device)['device']}, {sizes}")
    reference = json.loads(options.original.read_text("utf-8")) if options.original else {}
    figures = {**machine(bench.device), "dtype": str(bench.dtype), **sizes, "steps": options.steps}
    measurements: list[Callable[[], dict[str, Any] | None]] = [bench.prompts, bench.free, bench.whole]
    if not options.only_four:
        measurements[1:1] = [lambda: bench.against_the_original(reference)]
        measurements[-1:] = [bench.denoising, bench.whole]
    if options.compile:
        measurements += [bench.compile, lambda: bench.whole("compiled_"), lambda: bench.denoising("compiled_")]
    for measure in measurements:
        figures |= measure() or {}
        if options.as_it_comes:
            print(json.dumps(figures), flush=True)
    targets = TARGETS + (GPU_TARGETS if bench.is_cuda and not options.quick else ())
    figures["missed"] = [
        f"{name} is {figures[name]}, target {'<=' if is_maximum else '>='} {limit}"
        for name, limit, is_maximum in targets
        if name in figures and (figures[name] > limit if is_maximum else figures[name] < limit)
    ]
    if options.output is not None:
        options.output.write_text(json.dumps(figures, indent=1) + "\n", "utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
