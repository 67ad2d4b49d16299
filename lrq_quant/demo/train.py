"""Trains the demo model: python -m lrq_quant.demo.train --out FOLDER [--seconds 420]

The larger testbed of benchmarks/quality.py is trained by

    python -m lrq_quant.demo.train --out build/testbeds/scenes64 --world scenes64 --width 512 \\
        --head-dim 64 --blocks 6 --patch-size 8 --lr 7e-4 --seconds 420 --shard-size 20MB

Flow matching in pixel space: x = (1 - sigma) * picture + sigma * noise, the transformer predicts
noise - picture from x, sigma and the caption; one caption in ten is dropped for guidance. Every
picture is drawn fresh on the training device, from training compositions only. The folder holds
the exponential moving average of the weights in bf16 as a diffusers pipeline, and training.json,
which says how they came about; its accuracies are of the stored weights, run in bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PixArtTransformer2DModel
from torch import nn

from lrq_quant.demo.checker import prompt_accuracy
from lrq_quant.demo.pipeline import (
    DEFAULT_GUIDANCE,
    DEFAULT_STEPS,
    ShapesPipeline,
    load_pipeline,
    prompt_generators,
)
from lrq_quant.demo.scenes import (
    DEMO,
    RELATIONS,
    WORLDS,
    Composition,
    SceneBatch,
    SceneSampler,
    Thing,
    World,
    heldout_captions,
)
from lrq_quant.demo.text import CaptionEncoder, caption_vocabulary
from lrq_quant.pipeline_io import check_writable

REPORT_FILE = "training.json"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model. 256 wide, 3 blocks and patches of 4 are 3.8 M parameters, 7.7 MB."""

    width: int = 256
    head_dim: int = 32
    blocks: int = 3
    patch_size: int = 4
    text_dim: int = 128


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The run ends at `seconds` or at `steps`, whichever comes first."""

    seconds: float | None = 420.0
    steps: int | None = None
    seed: int = 0
    batch: int = 1024
    learning_rate: float = 1e-3
    warmup_steps: int = 500
    ema_decay: float = 0.999
    caption_dropout: float = 0.1
    shift: float = 2.0  # of sigma, in training and in the sampler: more time at high noise
    compile: bool = True
    log_seconds: float = 10.0
    check_seconds: float = 60.0  # between two looks at held-out captions
    check_captions: int = 64
    final_captions: int = 256
    final_guidance: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0)
    save_seconds: float = 60.0  # between two states to resume from
    shard_size: str = "5GB"  # largest weight file
    world: str = DEMO.name
    model: ModelConfig = field(default_factory=ModelConfig)

    def __post_init__(self) -> None:
        if self.world not in WORLDS:
            raise ValueError(
                f"TrainConfig: world must be one of {list(WORLDS)}, got {self.world!r}"
            )
        if self.seconds is None and self.steps is None:
            raise ValueError("TrainConfig: seconds or steps must be given, got neither")


class Denoiser(nn.Module):
    """Text encoder and transformer as one module: what is trained, averaged and compiled."""

    def __init__(self, config: ModelConfig, world: World = DEMO) -> None:
        super().__init__()
        # Each thing takes up to four words, each relation two, and one mark starts the caption.
        longest = 6 * world.most_things - 1
        self.text_encoder = CaptionEncoder(
            caption_vocabulary(world), config.text_dim, max(16, longest)
        )
        self.transformer = PixArtTransformer2DModel(
            num_attention_heads=config.width // config.head_dim,
            attention_head_dim=config.head_dim,
            in_channels=3,
            out_channels=3,
            num_layers=config.blocks,
            cross_attention_dim=config.width,
            sample_size=world.picture_size,
            patch_size=config.patch_size,
            norm_type="ada_norm_single",
            interpolation_scale=1,
            use_additional_conditions=False,
            caption_channels=config.text_dim,
        )
        _initialize(self.transformer)

    def forward(
        self, noisy: torch.Tensor, word_ids: torch.Tensor, timestep: torch.Tensor
    ) -> torch.Tensor:
        """Velocity [B, 3, H, W] of noisy [B, 3, H, W], word_ids [B, L], timestep fp32 [B]."""
        return self.transformer(
            noisy,
            encoder_hidden_states=self.text_encoder(word_ids),
            encoder_attention_mask=self.text_encoder.mask(word_ids),
            timestep=timestep,
            return_dict=False,
        )[0]


def _initialize(transformer: PixArtTransformer2DModel) -> None:
    """PixArt's initialization: Xavier, and zero where a residual branch or the output ends."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = transformer.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
    nn.init.zeros_(patches.bias)
    embedder = transformer.adaln_single.emb.timestep_embedder
    for linear in (embedder.linear_1, embedder.linear_2, transformer.adaln_single.linear):
        nn.init.normal_(linear.weight, std=0.02)
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out[0].weight)
    nn.init.zeros_(transformer.proj_out.weight)


class CaptionTable:
    """Word ids of the captions of scenes, put together on the device."""

    def __init__(self, encoder: CaptionEncoder, world: World, device: torch.device) -> None:
        words = (None, *world.sizes)
        kinds = [(colour, shape) for colour in world.colours for shape in world.shapes]
        things = [Thing(*kind, size).text for kind in kinds for size in words]
        # The last row is empty: a thing, or a relation, that is not there.
        self._things = self._phrases(encoder, [*things, ""]).to(device)
        self._relations = self._phrases(encoder, [*RELATIONS, ""]).to(device)
        self._words, self._length = len(words), encoder.config.max_length
        self.empty = encoder.tokenize([""]).to(device)  # [1, L]
        self._pad = int(self.empty[0, -1])

    @staticmethod
    def _phrases(encoder: CaptionEncoder, texts: list[str]) -> torch.Tensor:
        """Ids without the start mark, as long as the longest phrase."""
        ids = encoder.tokenize(texts)[:, 1:]
        longest = max(len(text.split()) for text in texts)
        return ids[:, :longest]

    def lookup(self, scenes: SceneBatch) -> torch.Tensor:
        """int64 [B, L] of the captions of scenes."""
        thing = scenes.things * self._words + scenes.size_words
        thing = torch.where(scenes.things < 0, len(self._things) - 1, thing)
        relation = torch.where(scenes.relations < 0, len(RELATIONS), scenes.relations)
        parts = [self.empty[:, :1].expand(len(thing), 1), self._things[thing[:, 0]]]
        for place in range(relation.shape[1]):
            parts += [self._relations[relation[:, place]], self._things[thing[:, place + 1]]]
        ids = torch.cat(parts, dim=1)
        # Padding inside goes to the end, the words keep their order.
        ids = ids.gather(1, (ids == self._pad).long().argsort(dim=1, stable=True))
        missing = max(0, self._length - ids.shape[1])
        return nn.functional.pad(ids, (0, missing), value=self._pad)[:, : self._length]


class Batches:
    """Endless training batches, made on the device."""

    def __init__(
        self,
        config: TrainConfig,
        encoder: CaptionEncoder,
        device: torch.device,
        compositions: tuple[Composition, ...] | None = None,
    ) -> None:
        self._config = config
        world = WORLDS[config.world]
        self._sampler = SceneSampler(device, compositions, world)
        self._table = CaptionTable(encoder, world, device)
        self.generator = torch.Generator(device).manual_seed(config.seed)
        self._strata = torch.arange(config.batch, device=device)

    def draw(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """noisy [B, 3, H, W], word_ids [B, L], timestep [B] in 0..1000, target velocity."""
        config, generator = self._config, self.generator
        scenes = self._sampler.sample(config.batch, generator)
        word_ids = self._table.lookup(scenes)
        uniform = torch.rand(2, config.batch, generator=generator, device=word_ids.device)
        dropped = uniform[0] < config.caption_dropout
        word_ids = torch.where(dropped[:, None], self._table.empty, word_ids)
        position = (self._strata + uniform[1]) / config.batch  # stratified: lower variance
        sigma = config.shift * position / (1 + (config.shift - 1) * position)
        clean = scenes.pictures * 2 - 1
        noise = torch.randn(clean.shape, generator=generator, device=clean.device)
        noisy = torch.lerp(clean, noise, sigma[:, None, None, None])
        return noisy, word_ids, sigma * 1000, noise - clean


class _Stretch:
    """The steps between two log lines: where it began and the summed loss, kept on the device."""

    def __init__(self, first_step: int, start: float) -> None:
        self.first_step, self.start = first_step, start
        self._total: torch.Tensor | None = None

    def add(self, loss: torch.Tensor) -> None:
        self._total = loss if self._total is None else self._total + loss

    def mean_loss(self, step: int) -> float:
        """Mean over the stretch up to `step`; waits for the device."""
        return math.nan if self._total is None else float(self._total) / (step - self.first_step)


class Trainer:
    """One training run: the model, its moving average, the optimizer and the clock."""

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        compositions: tuple[Composition, ...] | None = None,
    ) -> None:
        self.config, self.device, self.world = config, device, WORLDS[config.world]
        self.started = time.monotonic()
        torch.manual_seed(config.seed)
        self.model = Denoiser(config.model, self.world).to(device).train()
        self.average = Denoiser(config.model, self.world).to(device).eval().requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.parameters = list(self.model.parameters())
        self.averages = list(self.average.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(0.9, 0.99),
            weight_decay=0.0,
            fused=device.type == "cuda",
        )
        self.batches = Batches(config, self.model.text_encoder, device, compositions)
        self.step_count = 0
        self.compiled = False
        self.forward = self._compiled_forward() if config.compile else self.model

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def progress(self) -> float:
        """Share of the budget spent, of steps or of seconds, whichever ends first."""
        config = self.config
        of_steps = self.step_count / config.steps if config.steps is not None else 0.0
        of_time = self.elapsed() / config.seconds if config.seconds is not None else 0.0
        return max(of_steps, of_time)

    def train_step(self) -> torch.Tensor:
        """One update; the loss, not synchronized."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        loss = self._loss(self.forward)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.step_count += 1
        decay = min(self.config.ema_decay, (1 + self.step_count) / (10 + self.step_count))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, self.parameters, 1 - decay)
        return loss.detach()

    def save_state(self, file: Path) -> None:
        """Everything that the rest of the run depends on, but the compiler's choices."""
        state = {
            "config": asdict(self.config),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.batches.generator.get_state(),
            "steps": self.step_count,
            "elapsed": self.elapsed(),
        }
        temporary = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        torch.save(state, temporary)
        os.replace(temporary, file)

    def load_state(self, file: Path) -> None:
        """Continue from save_state. Raises ValueError on the state of another configuration."""
        state = torch.load(file, map_location=self.device, weights_only=True)
        if state["config"] != asdict(self.config):
            raise ValueError(f"{file} is of another configuration; remove it or name another --out")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.batches.generator.set_state(state["generator"].cpu())
        self.step_count = state["steps"]
        self.started = time.monotonic() - state["elapsed"]

    def run(self, state_file: Path | None = None) -> float:
        """Trains to the end of the budget; the mean loss of the last stretch.

        state_file: written every save_seconds, for load_state.
        """
        last_check = last_save = self.elapsed()
        log = _Stretch(self.step_count, last_check)
        while self.progress() < 1:
            log.add(self.train_step())
            if self.step_count % 50:
                continue
            # Waiting for the device keeps the clock honest: steps are only queued until then.
            self._synchronize()
            if self.elapsed() - log.start < self.config.log_seconds:
                continue
            self._log(log)
            if state_file and self.elapsed() - last_save >= self.config.save_seconds:
                self.save_state(state_file)
                last_save = self.elapsed()
            if self.elapsed() - last_check >= self.config.check_seconds:
                count = self.config.check_captions
                accuracy = measure_accuracy(self.pipeline(), count, world=self.world)
                last_check = self.elapsed()
                print(
                    f"{last_check:6.1f} s  {count} held-out captions right: {accuracy:.3f}",
                    flush=True,
                )
            log = _Stretch(self.step_count, self.elapsed())
        return self._log(log) if self.step_count > log.first_step else math.nan

    def _log(self, log: _Stretch) -> float:
        loss = log.mean_loss(self.step_count)
        now = self.elapsed()
        milliseconds = (now - log.start) / (self.step_count - log.first_step) * 1000
        print(
            f"{now:6.1f} s  step {self.step_count:6d}  loss {loss:.5f}  "
            f"lr {self._learning_rate():.2e}  {milliseconds:.2f} ms/step",
            flush=True,
        )
        if not math.isfinite(loss):
            raise RuntimeError(f"train: the loss became {loss} at step {self.step_count}")
        return loss

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def pipeline(self) -> ShapesPipeline:
        """The averaged weights, rounded to bf16, as a pipeline of its own."""
        rounded = Denoiser(self.config.model, self.world)
        rounded.load_state_dict(self.average.state_dict())
        rounded = rounded.to(self.device, torch.bfloat16).eval()
        scheduler = FlowMatchEulerDiscreteScheduler(shift=self.config.shift)
        pipeline = ShapesPipeline(rounded.transformer, rounded.text_encoder, scheduler)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _learning_rate(self) -> float:
        warmup = min(1.0, (self.step_count + 1) / self.config.warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, self.progress())))
        return self.config.learning_rate * warmup * max(cosine, 1e-3)

    def _loss(self, forward: nn.Module) -> torch.Tensor:
        noisy, word_ids, timestep, target = self.batches.draw()
        on_gpu = self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            velocity = forward(noisy, word_ids, timestep)
        return nn.functional.mse_loss(velocity.float(), target)

    def _compiled_forward(self) -> nn.Module:
        """The compiled model, or the plain one when a trial step does not compile."""
        try:
            compiled = torch.compile(self.model, dynamic=False)
            self._loss(compiled).backward()
        except Exception as error:  # any failure of the compiler must not cost the run
            print(f"torch.compile failed, training without it: {error!s:.400}", flush=True)
            return self.model
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self.compiled = True
        print(f"{self.elapsed():6.1f} s  compiled", flush=True)
        return compiled


def measure_accuracy(
    pipeline: ShapesPipeline,
    count: int,
    guidance: float = DEFAULT_GUIDANCE,
    steps: int = DEFAULT_STEPS,
    world: World = DEMO,
) -> float:
    """Share of `count` held-out captions that the pipeline draws right, seed 0."""
    captions = heldout_captions(count, world=world)
    pictures = pipeline(
        captions,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=prompt_generators(count),
        output_type="np",
    ).images
    return prompt_accuracy(pictures, captions, world)


def train(
    out: Path,
    config: TrainConfig,
    device: torch.device,
    compositions: tuple[Composition, ...] | None = None,
) -> dict:
    """Trains and writes the folder `out`, all of it or nothing; returns what training.json says.

    A killed run leaves `<out>.state` and continues from it when it is called again with the same
    configuration.  `compositions` restricts what is drawn (tests); by default all of training.
    Raises FileExistsError where `out` holds something, OSError where it cannot be written, before
    it trains.
    """
    out = check_writable(out)
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(config, device, compositions)
    count = sum(p.numel() for p in trainer.parameters)
    print(f"{count / 1e6:.2f} M parameters on {_device_name(device)}", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    state_file = out.with_name(f"{out.name}.state")
    if state_file.is_file():
        trainer.load_state(state_file)
        print(f"continuing at step {trainer.step_count}", flush=True)
    loss = trainer.run(state_file)
    seconds = trainer.elapsed()

    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / out.name
        trainer.pipeline().save_pretrained(folder, max_shard_size=config.shard_size)
        stored = load_pipeline(folder, device)
        stored.set_progress_bar_config(disable=True)
        accuracy = {}
        for guidance in config.final_guidance:
            accuracy[str(guidance)] = measure_accuracy(
                stored, config.final_captions, guidance, world=trainer.world
            )
            print(
                f"{config.final_captions} held-out captions, guidance {guidance}: "
                f"{accuracy[str(guidance)]:.4f} right",
                flush=True,
            )
        report = {
            "steps": trainer.step_count,
            "seconds": round(seconds, 1),
            "final_loss": loss,
            "heldout_captions": config.final_captions,
            "heldout_accuracy_by_guidance": accuracy,
            "sampler_steps": DEFAULT_STEPS,
            "parameters": count,
            "bytes": sum(f.stat().st_size for f in folder.rglob("*.safetensors")),
            "device": _device_name(device),
            "torch": torch.__version__,
            "compiled": trainer.compiled,
            "config": asdict(config),
        }
        (folder / REPORT_FILE).write_text(json.dumps(report, indent=2) + "\n")
        os.replace(folder, out)  # or an empty folder, as check_writable found
    state_file.unlink(missing_ok=True)
    print(f"wrote {out}, {report['bytes']} bytes of safetensors", flush=True)
    return report


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def main(arguments: list[str] | None = None) -> dict:
    defaults, model = TrainConfig(), ModelConfig()
    parser = argparse.ArgumentParser(prog="python -m lrq_quant.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seconds", type=float, help="time budget (default 420 without --steps)")
    parser.add_argument("--steps", type=int, help="step budget")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--batch", type=int, default=defaults.batch)
    parser.add_argument("--lr", type=float, default=defaults.learning_rate)
    parser.add_argument("--world", choices=list(WORLDS), default=defaults.world)
    parser.add_argument("--shard-size", default=defaults.shard_size, help="as diffusers takes it")
    parser.add_argument("--width", type=int, default=model.width)
    parser.add_argument("--head-dim", type=int, default=model.head_dim)
    parser.add_argument("--blocks", type=int, default=model.blocks)
    parser.add_argument("--patch-size", type=int, default=model.patch_size)
    parser.add_argument("--final-captions", type=int, default=defaults.final_captions)
    parser.add_argument("--no-compile", action="store_true", help="train without torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    seconds = args.seconds
    if seconds is None and args.steps is None:
        seconds = defaults.seconds
    config = TrainConfig(
        seconds=seconds,
        steps=args.steps,
        seed=args.seed,
        batch=args.batch,
        learning_rate=args.lr,
        compile=device.type == "cuda" and not args.no_compile,
        final_captions=args.final_captions,
        world=args.world,
        shard_size=args.shard_size,
        model=ModelConfig(
            width=args.width, head_dim=args.head_dim, blocks=args.blocks, patch_size=args.patch_size
        ),
    )
    return train(args.out, config, device)


if __name__ == "__main__":
    main()
