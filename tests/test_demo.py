"""The demo: what captions mean, what the checker accepts, that pictures are reproducible."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")

from diffusers import FlowMatchEulerDiscreteScheduler  # noqa: E402
from PIL import Image  # noqa: E402
from tiny_models import shared_folder  # noqa: E402

from lrq_quant.demo import (  # noqa: E402
    WEIGHTS_FOLDER,
    checker,
    compare,
    load_demo_pipeline,
    scenes,
    train,
)
from lrq_quant.demo.pipeline import ShapesPipeline, load_pipeline, prompt_generators  # noqa: E402
from lrq_quant.demo.text import CaptionEncoder  # noqa: E402

TINY = train.ModelConfig(width=128, blocks=1, patch_size=8)


@pytest.fixture
def generator() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


@pytest.fixture
def tiny_pipeline() -> ShapesPipeline:
    model = train.Denoiser(TINY).eval()
    # A fresh model ends in zeros; give the output something that depends on the caption.
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    for block in model.transformer.transformer_blocks:
        torch.nn.init.normal_(block.attn2.to_out[0].weight, std=0.1)
    pipeline = ShapesPipeline(
        model.transformer, model.text_encoder, FlowMatchEulerDiscreteScheduler(shift=2.0)
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_scenes(
    count: int, generator: torch.Generator, world: scenes.World = scenes.DEMO
) -> tuple[torch.Tensor, list[str]]:
    """Pictures fp32 [count, 3, H, W] over all compositions, and their captions."""
    sampler = scenes.SceneSampler(compositions=scenes.all_compositions(world), world=world)
    batch = sampler.sample(count, generator)
    return batch.pictures, sampler.captions(batch)


def picture_of(*things: tuple[str, str, float, int, int]) -> np.ndarray:
    """[32, 32, 3] with every (colour, shape, half_extent, column, row) drawn in turn."""
    picture = np.broadcast_to(np.float32(scenes.DEMO.background), (32, 32, 3)).copy()
    for colour, shape, half_extent, column, row in things:
        cover = scenes.shape_coverage(shape, half_extent, column, row, 32).numpy()[..., None]
        picture = picture * (1 - cover) + np.float32(scenes.DEMO.colours[colour]) * cover
    return picture


WORLDS = pytest.mark.parametrize("world", scenes.WORLDS.values(), ids=scenes.WORLDS)


@WORLDS
def test_heldout_compositions_never_appear_in_training(generator, world):
    train_set = set(scenes.split_compositions(False, world))
    heldout = set(scenes.split_compositions(True, world))
    assert not train_set & heldout
    assert train_set | heldout == set(scenes.all_compositions(world))
    assert 0.1 < len(heldout) / len(scenes.all_compositions(world)) < 0.2

    def links(text: str) -> list[tuple]:
        """Every link of a caption, sizes left out; the first one first."""
        caption = scenes.parse_caption(text, world)
        kinds = [(thing.colour, thing.shape) for thing in caption.things]
        return list(zip(kinds, caption.relations, kinds[1:], strict=False))

    heldout_links = {
        links(scenes.caption_of([c], (None, None), world).text)[0] for c in heldout
    }  # fmt: skip
    sampler = scenes.SceneSampler(world=world)
    drawn = sampler.captions(sampler.sample(2000, generator))
    assert not heldout_links & {link for text in drawn for link in links(text)}
    assert {len(links(text)) for text in drawn} == set(range(1, world.most_things))
    captions = scenes.heldout_captions(256, 1, world)
    assert len(set(captions)) == 256
    assert {links(text)[0] for text in captions} <= heldout_links
    assert {len(links(text)) for text in captions} == set(range(1, world.most_things))


@WORLDS
def test_the_same_picture_told_backwards_is_on_the_same_side_of_the_split(world):
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    names = [scenes.RELATIONS.index(opposite[name]) for name in scenes.RELATIONS]
    for c in scenes.all_compositions(world)[::7]:
        backwards = scenes.Composition(c.colour2, c.shape2, names[c.relation], c.colour1, c.shape1)
        assert scenes.is_held_out(c, world) == scenes.is_held_out(backwards, world)


@WORLDS
def test_captions_survive_text(world):
    for text in scenes.training_captions(200, 3, world):
        assert scenes.parse_caption(text, world).text == text


@pytest.mark.parametrize(
    "text",
    [
        "a red circle",
        "a red circle left of a red circle",
        "a pink circle above a red square",
        "a red circle above a huge red square",
        "a red circle above a red square left of a blue cross",  # three things are not of the demo
        "red circle above a red square",
        "",
    ],
)
def test_text_outside_the_grammar_is_an_error(text):
    with pytest.raises(ValueError, match="parse_caption"):
        scenes.parse_caption(text)


@WORLDS
def test_things_keep_their_gap(world):
    """Every layout leaves min_gap pixels of background between any two things."""
    half_extents = list(world.sizes.values())

    def check(places: tuple[int, ...], sizes: tuple[int, ...]) -> None:
        centres = [world.lattice[i] for i in places]
        spots = list(zip(centres[0::2], centres[1::2], sizes, strict=True))
        for (row1, column1, a), (row2, column2, b) in itertools.combinations(spots, 2):
            apart = max(abs(row1 - row2), abs(column1 - column2))
            assert apart - half_extents[a] - half_extents[b] >= world.min_gap

    relations, sizes = range(len(scenes.RELATIONS)), range(len(half_extents))
    for relation, size1, size2 in itertools.product(relations, sizes, sizes):
        found = scenes.layouts(relation, size1, size2, world)
        assert found
        for places in found:
            check(places, (size1, size2))
    if world.most_things > 2:
        for key in itertools.product(relations, relations, sizes, sizes, sizes):
            chains = scenes.chain_layouts(key[:2], key[2:], world)
            assert chains
            for places in chains[::11]:
                check(places, key[2:])


@WORLDS
def test_checker_accepts_what_the_renderer_drew(generator, world):
    pictures, captions = draw_scenes(500, generator, world)
    assert checker.prompt_accuracy(pictures, captions, world) >= 0.995
    noisy = (pictures + 0.04 * torch.randn(pictures.shape, generator=generator)).clamp(0, 1)
    assert checker.prompt_accuracy(noisy, captions, world) >= 0.99


def test_checker_tolerates_slight_blur(generator):
    pictures, captions = draw_scenes(300, generator)
    kernel = torch.tensor([0.15, 0.7, 0.15])
    kernel = (kernel[:, None] * kernel).expand(3, 1, 3, 3)
    padded = torch.nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate")
    blurred = torch.nn.functional.conv2d(padded, kernel, groups=3)
    assert checker.prompt_accuracy(blurred, captions) >= 0.995


@WORLDS
def test_checker_rejects_other_captions(generator, world):
    pictures, captions = draw_scenes(500, generator, world)
    assert checker.prompt_accuracy(pictures, captions[1:] + captions[:1], world) < 0.02
    noise = torch.rand(20, *pictures.shape[1:], generator=generator)
    assert checker.prompt_accuracy(noise, captions[:20], world) == 0


def test_checker_looks_at_every_relation_of_three_things(generator):
    world = scenes.SCENES64
    pictures, captions = draw_scenes(400, generator, world)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    chains = [i for i, text in enumerate(captions) if scenes.parse_caption(text, world).things[2:]]
    assert len(chains) > 100
    for place in (0, 1):
        wrong = []
        for index in chains:
            caption = scenes.parse_caption(captions[index], world)
            relations = list(caption.relations)
            relations[place] = opposite[relations[place]]
            wrong.append(scenes.Caption(caption.things, tuple(relations)).text)
        assert checker.prompt_accuracy(pictures[chains], wrong, world) == 0


def test_checker_takes_every_kind_of_picture(generator):
    pictures, captions = draw_scenes(8, generator)
    bytes_ = (pictures.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    images = ShapesPipeline.numpy_to_pil(bytes_ / 255)
    for kind in (pictures, bytes_, bytes_ / 255, images):
        assert checker.prompt_accuracy(kind, captions) == 1
    assert checker.check(pictures[0], captions[0]).right
    assert checker.check(images[0], captions[0]).right


RED, BLUE = ("red", "circle", 6.0, 8, 16), ("blue", "square", 4.0, 24, 16)


@pytest.mark.parametrize(
    ("things", "caption", "right"),
    [
        ((RED, BLUE), "a red circle left of a blue square", True),
        ((RED, BLUE), "a blue square right of a red circle", True),
        ((RED, BLUE), "a large red circle left of a small blue square", True),
        ((RED, BLUE), "a small red circle left of a blue square", False),  # size
        ((RED, BLUE), "a red circle right of a blue square", False),  # relation
        ((RED, BLUE), "a red circle above a blue square", False),  # relation across
        ((RED, BLUE), "a blue circle left of a red square", False),  # colours swapped
        ((RED, BLUE), "a red square left of a blue circle", False),  # shapes swapped
        ((RED, BLUE, ("cyan", "circle", 4.0, 16, 28)), "a red circle left of a blue square", False),
        ((RED,), "a red circle left of a blue square", False),  # one is missing
        ((), "a red circle left of a blue square", False),
        ((("red", "circle", 6.0, 8, 16), ("blue", "circle", 9.0, 22, 16)),
         "a red circle left of a blue circle", False),  # a size that is neither
    ],
)  # fmt: skip
def test_checker_verdicts(things, caption, right):
    verdict = checker.check(picture_of(*things), caption)
    assert verdict.right == right
    assert bool(verdict.reason) != right
    assert len(verdict.found) == len(things)


def test_checker_rejects_a_colour_outside_the_palette():
    picture = picture_of(RED, BLUE)
    picture[24:30, 12:18] = (0.95, 0.95, 0.95)
    verdict = checker.check(picture, "a red circle left of a blue square")
    assert not verdict.right
    assert sorted(thing.colour for thing in verdict.found) == ["blue", "red", "unknown"]


def test_empty_caption_is_the_start_mark_alone():
    encoder = CaptionEncoder(embed_dim=8)
    embeddings, mask = encoder.encode(["", "a red circle above a small blue cross"])
    assert embeddings.shape == (2, 16, 8)
    assert mask.sum(dim=1).tolist() == [1, 9]
    with pytest.raises(ValueError, match="unknown word 'orange'"):
        encoder.tokenize(["an orange"[3:]])
    with pytest.raises(ValueError, match="at most 15 words"):
        encoder.tokenize(["a " * 16])


def test_first_and_second_thing_never_share_a_position():
    """Word positions alone must tell the two things apart: the encoder does not mix words."""
    encoder = CaptionEncoder(embed_dim=8)
    relation_words = set(encoder.tokenize([" ".join(scenes.RELATIONS)]).unique().tolist())
    firsts, seconds = set(), set()
    for text in scenes.training_captions(1000):
        before = len(scenes.parse_caption(text).things[0].text.split()) + 1
        ids = encoder.tokenize([text])[0].tolist()
        words = [i for i, word in enumerate(ids) if word > 1 and word not in relation_words]
        firsts |= {i for i in words if i < before}
        seconds |= {i for i in words if i > before}
    colours = max(firsts), min(seconds)
    assert colours[0] < colours[1]


def test_picture_depends_on_its_generator_not_on_its_batch(tiny_pipeline):
    captions = scenes.heldout_captions(5, seed=7)
    options = {"num_inference_steps": 3, "output_type": "np"}
    together = tiny_pipeline(captions, generator=prompt_generators(5, seed=1), **options).images
    again = tiny_pipeline(captions, generator=prompt_generators(5, seed=1), **options).images
    np.testing.assert_array_equal(together, again)
    generators = prompt_generators(5, seed=1)
    alone = tiny_pipeline(captions[3], generator=generators[3], **options).images
    np.testing.assert_allclose(alone[0], together[3], atol=1e-4)
    other = tiny_pipeline(captions[:1], generator=prompt_generators(1, seed=2), **options).images
    assert np.abs(other[0] - together[0]).max() > 0.1


def test_guidance_uses_the_caption(tiny_pipeline):
    captions = scenes.heldout_captions(2, seed=7)
    options = {"num_inference_steps": 3, "output_type": "pt"}

    def draw(prompts: list[str], guidance: float) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(5) for _ in prompts]
        return tiny_pipeline(
            prompts, guidance_scale=guidance, generator=generators, **options
        ).images

    first, second = draw(captions, 2.0)
    assert not torch.equal(first, second)
    # Guiding an empty caption away from the empty caption changes nothing.
    torch.testing.assert_close(draw([""], 3.0), draw([""], 1.0), atol=1e-4, rtol=0)


def test_pipeline_names_bad_arguments(tiny_pipeline):
    with pytest.raises(ValueError, match="one a prompt"):
        tiny_pipeline(["a red circle"], generator=prompt_generators(2))
    with pytest.raises(ValueError, match="output_type"):
        tiny_pipeline(["a red circle"], output_type="latent")
    with pytest.raises(ValueError, match="at least one caption"):
        tiny_pipeline([])
    with pytest.raises(ValueError, match="num_inference_steps"):
        tiny_pipeline(["a red circle"], num_inference_steps=0)


def test_saved_pipeline_draws_the_same(tiny_pipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path, dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["text_encoder"] == ["lrq_quant.demo.text", "CaptionEncoder"]
    captions = scenes.heldout_captions(2)
    first, second = (
        p(captions, num_inference_steps=2, generator=prompt_generators(2), output_type="np").images
        for p in (tiny_pipeline, loaded)
    )
    np.testing.assert_array_equal(first, second)


def test_training_batch_is_a_straight_path_from_picture_to_noise():
    config = train.TrainConfig(batch=64, caption_dropout=0.5)
    encoder = CaptionEncoder(embed_dim=8)
    batches = train.Batches(config, encoder, torch.device("cpu"))
    noisy, word_ids, timestep, velocity = batches.draw()
    sigma = (timestep / 1000)[:, None, None, None]
    assert 0 <= sigma.min() < 0.1 and 0.9 < sigma.max() <= 1
    clean = (noisy - sigma * velocity) / 2 + 0.5
    background = clean.permute(0, 2, 3, 1)[:, 0, 0]
    torch.testing.assert_close(
        background, torch.tensor(scenes.DEMO.background).expand(64, 3), atol=1e-4, rtol=0
    )
    dropped = (encoder.mask(word_ids).sum(dim=1) == 1).sum()
    assert 0 < dropped < 64


@WORLDS
def test_training_captions_match_their_pictures(generator, world):
    sampler = scenes.SceneSampler(world=world)
    encoder = train.Denoiser(TINY, world).text_encoder
    table = train.CaptionTable(encoder, world, torch.device("cpu"))
    batch = sampler.sample(200, generator)
    captions = sampler.captions(batch)
    assert checker.prompt_accuracy(batch.pictures, captions, world) == 1
    assert torch.equal(table.lookup(batch), encoder.tokenize(captions))


def test_trainer_writes_a_folder_that_draws(tmp_path):
    config = train.TrainConfig(
        seconds=None, steps=3, batch=4, compile=False, final_captions=2,
        final_guidance=(2.0,), model=TINY,
    )  # fmt: skip
    out = tmp_path / "model"
    train.train(out, config, torch.device("cpu"))
    with pytest.raises(FileExistsError, match="exists already"):
        train.train(out, config, torch.device("cpu"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    report = json.loads((out / train.REPORT_FILE).read_text())
    assert report["steps"] == 3 and report["heldout_captions"] == 2
    assert np.isfinite(report["final_loss"])
    pipeline = load_pipeline(out)
    assert pipeline.scheduler.config.shift == config.shift
    assert pipeline(scenes.heldout_captions(1), num_inference_steps=1).images[0].size == (32, 32)


def test_a_killed_training_continues_with_the_same_steps(tmp_path):
    config = train.TrainConfig(
        seconds=None, steps=6, batch=4, compile=False, save_seconds=0.0, model=TINY,
        world="scenes64",
    )  # fmt: skip
    device = torch.device("cpu")
    whole = train.Trainer(config, device)
    for _ in range(6):
        whole.train_step()
    first = train.Trainer(config, device)
    for _ in range(3):
        first.train_step()
    first.save_state(tmp_path / "state")
    second = train.Trainer(config, device)
    second.load_state(tmp_path / "state")
    assert second.step_count == 3
    for _ in range(3):
        second.train_step()
    for ours, theirs in zip(second.averages, whole.averages, strict=True):
        assert torch.equal(ours, theirs)
    other = train.Trainer(dataclasses.replace(config, seed=1), device)
    with pytest.raises(ValueError, match="another configuration"):
        other.load_state(tmp_path / "state")


def test_training_falls_and_the_average_follows():
    config = train.TrainConfig(
        seconds=None, steps=40, batch=16, compile=False, warmup_steps=5, model=TINY
    )
    trainer = train.Trainer(config, torch.device("cpu"), scenes.split_compositions(False)[:1])
    losses = [float(trainer.train_step()) for _ in range(config.steps)]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    assert trainer.progress() == 1
    for average, parameter in zip(trainer.averages, trainer.parameters, strict=True):
        assert not average.requires_grad
        assert (average - parameter).abs().max() < 0.2
    assert not torch.equal(trainer.averages[0], trainer.parameters[0])
    rounded = trainer.pipeline().transformer
    assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}


def test_a_run_without_an_end_is_an_error():
    with pytest.raises(ValueError, match="seconds or steps"):
        train.TrainConfig(seconds=None, steps=None)


def test_shipped_model_fits_its_budget():
    """At most 8 MB of safetensors, and rotation blocks of 128 fit every width."""
    files = [*WEIGHTS_FOLDER.rglob("*.safetensors")]
    assert files and 5e6 < sum(file.stat().st_size for file in files) <= 8e6
    for block in load_demo_pipeline("cpu").transformer.transformer_blocks:
        linears = [m for m in block.modules() if isinstance(m, torch.nn.Linear)]
        assert linears and all(m.in_features % 128 == 0 for m in linears)


KEYS = "psnr_db prompt_accuracy prompts weight_bits checkpoint_bytes seconds_per_image"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("device", "prompts"), [("cpu", 4), pytest.param("cuda", 256, marks=pytest.mark.gpu)]
)
def test_the_demo(device: str, prompts: int, tmp_path, monkeypatch):
    """The shipped model draws what it is asked for, and as well at W4A8: the whole path. Fewer
    captions to calibrate with on a CPU."""
    if device == "cpu":
        monkeypatch.setattr(compare, "CALIBRATION_CAPTIONS", 2)
    report = compare.run_demo(tmp_path, device, prompts=prompts, schemes=("w4a8",))
    assert json.loads((tmp_path / "report.json").read_text()) == report
    bf16, w4a8 = report["bf16"], report["w4a8"]
    assert set(bf16) == set(w4a8) == set(KEYS.split()) and bf16["psnr_db"] is None
    assert bf16["prompts"] == w4a8["prompts"] == prompts
    # Of four captions one may fail.
    assert bf16["prompt_accuracy"] >= (0.9 if prompts == 256 else 0.75)
    assert w4a8["prompt_accuracy"] >= bf16["prompt_accuracy"] - (0.02 if prompts == 256 else 0.25)
    assert w4a8["psnr_db"] >= (40 if prompts == 256 else 30)
    assert 4 < w4a8["weight_bits"] < 5 and bf16["weight_bits"] == 16
    assert w4a8["checkpoint_bytes"] < 0.4 * bf16["checkpoint_bytes"]
    with Image.open(tmp_path / "grid.png") as grid:
        columns = np.asarray(grid.convert("L"))
    assert columns.std() > 10 and "w4a8" in compare.table(report)


def test_rows_of_the_demo(generator: torch.Generator):
    """PSNR is the median over pictures, accuracy the share that is right."""
    # Accepted but for one in two hundred: four that are.
    drawn, captions = draw_scenes(12, generator)
    right = [i for i in range(12) if checker.check(drawn[i], captions[i]).right][:4]
    pictures = drawn[right].permute(0, 2, 3, 1).numpy()
    captions = [captions[i] for i in right]
    baseline = compare.Drawn(pictures, 1.0)
    changed = pictures.copy()
    changed[0] = 0  # neither near nor right
    changed[1, 0, 0] = 1 - changed[1, 0, 0]
    row = compare._row(compare.Drawn(changed, 2.0), baseline, captions)
    decibels = compare.psnr_db(changed, pictures)
    assert row["psnr_db"] == np.median(decibels) == (decibels[1] + 99.0) / 2
    assert row["prompt_accuracy"] == 0.75 and row["seconds_per_image"] == 2.0
    assert compare._row(baseline, baseline, captions)["prompt_accuracy"] == 1.0


def test_the_demo_replaces_its_own_folders_alone(tmp_path, monkeypatch):
    """A model of the user's under the same name is refused before anything is drawn."""
    monkeypatch.setattr(compare, "heldout_captions", lambda *_: pytest.fail("it drew"))
    mine = tmp_path / "models" / "w4a8"
    shutil.copytree(shared_folder("pixart"), mine)
    with pytest.raises(FileExistsError, match="w4a8 exists already"):
        compare.run_demo(tmp_path, "cpu", prompts=1)
    assert (mine / "config.json").is_file()
    compare._remove_own(mine)
    assert (mine / "config.json").is_file()
    (mine / compare._MARK).touch()
    compare._remove_own(mine)
    assert not mine.exists()
