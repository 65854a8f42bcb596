"""The loop: stopped and resumed equals uninterrupted; killed at any time, it goes on from a whole checkpoint."""

import dataclasses
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from genlab.commands.models import load_line
from genlab.config import to_dict, to_json
from genlab.generators.xar import XARConfig
from genlab.hub import from_pretrained
from genlab.tokens import TokenSpec
from tests.smoke.test_matrix import KINDS
from tokenizers_img.kl_vae import KLVAEConfig
from tokenizers_img.losses import AutoencoderLossConfig
from train import checkpoint
from train.config import DataConfig, OptimConfig, read_config, run_config
from train.loop import TrainingError, card, dry_run, learning_rate, train
from train.presets import PRESETS
from train.speed import keep_memory
from train.tasks import Order, build_task, class_weights, lasting


def tokenizer_run(folder, **changes):
    model = KLVAEConfig(
        image_size=16,
        patch=4,
        channels=(16,),
        layers=1,
        latent_channels=4,
        norm_groups=4,
        shortcut=True,
        equivariance=0.25,
    )
    fields = {
        "name": "tiny-vae",
        "model": model,
        "loss": AutoencoderLossConfig(perceptual=0.0),
        "data": DataConfig(source=str(folder), flip=True),
        "optim": OptimConfig(lr=1e-3, warmup=16),
        "images": 96,
        "batch_size": 8,
        "precision": "fp32",
        "save_every": 16,
        "log_every": 8,
        "sample_every": 0,
        "threads": 1,
    }
    return run_config(**{**fields, **changes})


def generator_run(folder, tokenizer, **changes):
    model = XARConfig(
        grid=(4, 4), channels=4, num_classes=2, size=2, dim=32, encoder_depth=1, decoder_depth=1, heads=2, dropout=0.1
    )
    return tokenizer_run(
        folder, name="tiny-xar", model=model, tokenizer=str(tokenizer), loss=AutoencoderLossConfig(), **changes
    )


def weights(folder):
    return from_pretrained(folder).state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("which", ["tokenizer", "generator"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, picture_folder, tiny_tokenizer, which):
    run = tokenizer_run if which == "tokenizer" else lambda f, **k: generator_run(f, tiny_tokenizer, **k)
    config = run(picture_folder)
    whole = weights(train(config, tmp_path / "whole", device="cpu"))
    task = build_task(config)
    load, calls = task.load, []

    def interrupted(start, n):
        calls.append(start)
        if start >= 56:  # the prefetching thread asks one batch ahead
            os.kill(os.getpid(), signal.SIGTERM)
        return load(start, n)

    task.load = interrupted
    with pytest.raises(SystemExit) as stop:
        train(config, tmp_path / "parts", device="cpu", task=task)
    assert stop.value.code == 143
    seen, _, complaints = checkpoint.newest(tmp_path / "parts" / "checkpoints")
    assert 0 < seen < config.images
    assert not complaints
    resumed = weights(train(config, tmp_path / "parts", device="cpu"))
    assert equal(whole, resumed)
    lines = [json.loads(line)["images"] for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines))
    assert lines[-1] == config.images
    other = weights(train(dataclasses.replace(config, seed=1), tmp_path / "other", device="cpu"))
    assert not equal(whole, other)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, picture_folder, capsys):
    config = tokenizer_run(picture_folder, images=64, keep=3)
    whole = weights(train(config, tmp_path / "run", device="cpu"))
    newest = checkpoint.candidates(tmp_path / "run" / "checkpoints")[0]
    data = bytearray((newest / checkpoint.TENSORS).read_bytes())
    data[len(data) // 2] ^= 1
    (newest / checkpoint.TENSORS).write_bytes(data)
    assert equal(whole, weights(train(config, tmp_path / "run", device="cpu")))
    assert "damaged" in capsys.readouterr().out


def test_all_checkpoints_damaged_is_an_error(tmp_path, picture_folder):
    config = tokenizer_run(picture_folder, images=16)
    train(config, tmp_path / "run", device="cpu")
    for path in checkpoint.candidates(tmp_path / "run" / "checkpoints"):
        (path / checkpoint.MANIFEST).write_text("{")
    with pytest.raises(ValueError, match="--resume never"):
        train(config, tmp_path / "run", device="cpu")
    train(config, tmp_path / "run", device="cpu", resume="never")


@pytest.mark.parametrize("poison", ["nan", "inf"])
def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path, picture_folder, poison):
    config = tokenizer_run(picture_folder)
    task = build_task(config)
    forward = task.forward

    def poisoned(batch, images_seen):
        losses = forward(batch, images_seen)
        return {**losses, "loss": losses["loss"] * float(poison)} if images_seen >= 40 else losses

    task.forward = poisoned
    with pytest.raises(TrainingError, match=f"loss {poison}"):
        train(config, tmp_path / "run", device="cpu", task=task)
    seen, state, _ = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert seen == 32
    assert all(v.isfinite().all() for v in state["task"].values() if v.is_floating_point())


def test_another_config_and_another_run_are_refused(tmp_path, picture_folder):
    from train.loop import run_lock

    config = tokenizer_run(picture_folder, images=16)
    train(config, tmp_path / "run", device="cpu")
    with pytest.raises(ValueError, match="differs in batch_size"):
        train(dataclasses.replace(config, batch_size=4), tmp_path / "run", device="cpu")
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    del written["text_encoder"]  # as of a run that began before there was the option
    (tmp_path / "run" / "config.json").write_text(json.dumps(written))
    train(config, tmp_path / "run", device="cpu")
    with run_lock(tmp_path / "run"), pytest.raises(ValueError, match="another run is training"):
        train(config, tmp_path / "run", device="cpu")


def test_a_run_that_could_not_begin_leaves_its_folder_free(tmp_path, picture_folder):
    config = tokenizer_run(picture_folder, images=16)
    wrong = dataclasses.replace(config, data=dataclasses.replace(config.data, source="/nowhere"))
    with pytest.raises(FileNotFoundError, match="no such source"):
        train(wrong, tmp_path / "run", device="cpu")
    assert (train(config, tmp_path / "run", device="cpu") / "config.json").is_file()


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("images", (0, -5)), ("batch_size", (0, -8)), ("accumulate", (0, -1)), ("keep", (0, -1)), ("threads", (-1,)),
        ("log_every", (-1,)), ("sample_every", (-1,)), ("save_every", (-1,)), ("cpu_minutes", (-1.0, float("nan"))),
        ("ema", (1.0, 1.5, -0.1, float("nan"))), ("seed", (1 << 23, -(1 << 23) - 1)),
    ],
)  # fmt: skip
def test_a_number_out_of_range_is_named_before_anything_is_written(tmp_path, picture_folder, option, values):
    for value in values:
        config = tokenizer_run(picture_folder, **{option: value})
        named = re.escape(f"--{option.replace('_', '-')} is {value}; expected ")
        with pytest.raises(ValueError, match=named):
            train(config, tmp_path / "run", device="cpu")
        with pytest.raises(ValueError, match=named):
            dry_run(config)
    assert not list(tmp_path.iterdir())


def test_the_largest_and_smallest_seeds_train(picture_folder):
    for seed in ((1 << 23) - 1, -(1 << 23)):
        assert dry_run(tokenizer_run(picture_folder, seed=seed))["loss"]["loss"] > 0


@pytest.mark.parametrize("name", ["meta", "foo", "cpu:3"])
def test_a_device_that_is_not_there_is_refused(tmp_path, picture_folder, name):
    with pytest.raises(ValueError, match=f"no device '{name}' to train on"):
        train(tokenizer_run(picture_folder), tmp_path / "run", device=name)
    assert not list(tmp_path.iterdir())


def test_a_generator_by_class_refuses_pictures_without_one(tmp_path, picture_folder, tiny_tokenizer):
    mixed = tmp_path / "mixed"
    shutil.copytree(picture_folder / "train", mixed)
    shutil.copy(mixed / "red" / "00.png", mixed / "stray.png")
    flat = tmp_path / "flat"
    shutil.copytree(mixed / "blue", flat)
    for folder, told in ((mixed, "1 of 25 images of .*first stray"), (flat, "12 of 12 images of .*first 00")):
        config = generator_run(folder, tiny_tokenizer, images=16)
        config = dataclasses.replace(config, data=DataConfig(source=str(folder), split="all"))
        with pytest.raises(ValueError, match=f"{told}.*put each into a folder.*--model.condition text"):
            train(config, tmp_path / "run", device="cpu")
    (mixed / "stray.png").unlink()
    config = dataclasses.replace(config, data=DataConfig(source=str(mixed), split="all"))
    train(config, tmp_path / "run", device="cpu")  # the folder is free for the corrected one


@pytest.mark.parametrize(
    ("run", "changes", "option"),
    [
        ("tokenizer", {"teacher": "m"}, "--teacher"),
        ("tokenizer", {"teacher": "", "codes_of": "seed-emoji64"}, "--codes-of"),
        ("tokenizer", {"prompts": ("a",)}, "--prompts"),
        ("tokenizer", {"text_encoder": "x"}, "--text-encoder"),
        ("tokenizer", {"data": DataConfig(takes=2)}, "--data.takes"),
        ("tokenizer", {"data": DataConfig(reverse=True)}, "--data.reverse"),
        ("generator", {"loss": AutoencoderLossConfig(l1=5.0)}, "--loss"),
        ("generator", {"prompts": ("a",)}, "--prompts"),
        ("generator", {"text_encoder": "x"}, "--text-encoder"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(picture_folder, tiny_tokenizer, run, changes, option):
    config = tokenizer_run(picture_folder) if run == "tokenizer" else generator_run(picture_folder, tiny_tokenizer)
    with pytest.raises(ValueError, match=f"{option} is for .*, and does nothing for this"):
        build_task(dataclasses.replace(config, **changes))


def test_what_changed_since_a_run_stopped_is_noticed(tmp_path, picture_folder, tiny_tokenizer):
    pictures, tokenizer, run = tmp_path / "pictures", tmp_path / "vae", tmp_path / "run"
    shutil.copytree(picture_folder, pictures)
    shutil.copytree(tiny_tokenizer, tokenizer)
    config = generator_run(pictures, tokenizer, images=16)
    train(config, run, device="cpu")
    moved = pictures / "train" / "red" / "00.png"
    moved.rename(moved.with_name("zz.png"))
    with pytest.raises(ValueError, match=r"what --data\.source names has changed .*--resume never"):
        train(config, run, device="cpu")
    moved.with_name("zz.png").rename(moved)
    train(config, run, device="cpu")
    other = from_pretrained(tokenizer)
    other.latent_mean += 1
    other.save_pretrained(tokenizer)
    with pytest.raises(ValueError, match="what --tokenizer names has changed"):
        train(config, run, device="cpu")
    seen, state, _ = checkpoint.newest(run / "checkpoints")
    del state["stands_on"]  # as of an earlier version
    checkpoint.write(run / "checkpoints", seen, state, keep=1)
    train(config, run, device="cpu")


def test_a_generator_finds_its_tokenizer_from_anywhere_and_tells_another(
    tmp_path, picture_folder, tiny_tokenizer, monkeypatch, recwarn
):
    shutil.copytree(tiny_tokenizer, tmp_path / "vae")
    monkeypatch.chdir(tmp_path)
    model = train(generator_run(picture_folder, "vae", images=16), tmp_path / "run", device="cpu")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["tokenizer"] == "vae"
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert load_line(model).generator.extra["tokenizer"] == str(tmp_path / "vae")
    assert not [w for w in recwarn if "other weights" in str(w.message)]
    other = from_pretrained(tmp_path / "vae")
    other.latent_mean += 1
    other.save_pretrained(tmp_path / "vae")
    with pytest.warns(UserWarning, match="trained on tokens of other weights"):
        load_line(model)
    assert lasting("kl_vae-f8c16-emoji64") == "kl_vae-f8c16-emoji64"
    assert lasting("owner/name") == "owner/name"


def test_a_grid_of_many_classes_shows_a_few(picture_folder, tiny_tokenizer):
    config = generator_run(picture_folder, tiny_tokenizer)
    task = build_task(dataclasses.replace(config, model=dataclasses.replace(config.model, num_classes=1000)))
    task.images.classes = tuple(map(str, range(1000)))
    decode, sizes = task.tokenizer.decode, []
    task.tokenizer.decode = lambda tokens: sizes.append(len(tokens)) or decode(tokens)
    assert task.preview(task.model.eval()).shape == (128, 3, 16, 16)
    assert sizes == [32] * 4


def test_accumulation_equals_one_batch(tmp_path, picture_folder):
    """The KL autoencoder has no batch statistics, so parts of a batch give the same gradient up to rounding."""
    one = tokenizer_run(
        picture_folder, images=32, model=dataclasses.replace(tokenizer_run(picture_folder).model, equivariance=0.0)
    )
    a = weights(train(one, tmp_path / "a", device="cpu"))
    b = weights(train(dataclasses.replace(one, accumulate=4), tmp_path / "b", device="cpu"))
    assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)
    with pytest.raises(ValueError, match="multiple of accumulate"):
        train(dataclasses.replace(one, accumulate=3), tmp_path / "c", device="cpu")


def test_fine_tuning_starts_from_a_model_and_leaves_frozen_parts_alone(tmp_path, picture_folder, tiny_tokenizer):
    frozen = ("vae.encoder", "vae.quant_conv", "to_latent")
    run = tokenizer_run(picture_folder, name="tuned", init=str(tiny_tokenizer), freeze=frozen, images=32)
    before, after = from_pretrained(tiny_tokenizer), from_pretrained(train(run, tmp_path / "tuned", device="cpu"))
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(before.encode(images).values, after.encode(images).values)  # scale of the latents included
    assert not torch.equal(before.to_pixels.weight, after.to_pixels.weight)
    for name, p in before.named_parameters():
        if name.startswith(frozen):
            assert torch.equal(p, after.get_parameter(name)), name


def test_a_refiner_joins_a_trained_tokenizer_and_changes_nothing_at_first(
    tmp_path, picture_folder, tiny_tokenizer, capsys
):
    run = tokenizer_run(picture_folder, init=str(tiny_tokenizer))
    model = dataclasses.replace(run.model, refine=8, decoder_noise=0.5)
    task = build_task(dataclasses.replace(run, model=model))
    assert "has no refine" in capsys.readouterr().err
    before, batch = from_pretrained(tiny_tokenizer), task.batch(0, 4)
    assert torch.equal(task.model.decode(task.model.encode(batch.x)), before.decode(before.encode(batch.x)))
    clean, _ = before.reconstruct(batch.x, batch.noise)
    noisy, _ = task.model.reconstruct(batch.x, batch.noise)
    assert not torch.allclose(clean, noisy)  # the decoder's noise
    task(batch, 0)["loss"].backward()
    assert task.model.refine.leave.weight.grad.abs().sum() > 0


def freezing():
    """The rows of docs/finetune.md: kind, what to freeze."""
    text = (Path(__file__).parents[2] / "docs" / "finetune.md").read_text()
    for kinds, parts in re.findall(r"^  \| (`.*`) \| `--freeze (.*)` \|$", text, re.MULTILINE):
        yield from ((kind, tuple(parts.split())) for kind in re.findall(r"`(\w+)`", kinds))


def test_frozen_as_the_guide_says_for_every_tokenizer_that_is_trained():
    assert {kind for kind, _ in freezing()} == {"kl_vae", "vq", "msvq", "bae", "rvq", "flextok"}


@pytest.mark.parametrize("shortcut", [False, True])
@pytest.mark.parametrize(("kind", "parts"), list(freezing()))
def test_frozen_as_the_guide_says_a_tokenizer_keeps_its_tokens(
    tmp_path, picture_folder, tiny_tokenizer, kind, parts, shortcut, capsys
):
    images = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model, more = KINDS[kind], {}
    if kind == "flextok":
        if shortcut:
            pytest.skip("it has none of its own")
        more = {"tokenizer": str(tiny_tokenizer), "loss": AutoencoderLossConfig()}
    elif shortcut:
        model, parts = (
            dataclasses.replace(model, shortcut=True),
            (*parts, "to_latent" if kind == "kl_vae" else "to_map"),
        )
    run = tokenizer_run(picture_folder, model=model, optim=OptimConfig(lr=0.01, warmup=1), images=16, **more)
    first = train(run, tmp_path / "first", device="cpu")
    capsys.readouterr()
    second = train(dataclasses.replace(run, init=str(first), freeze=parts), tmp_path / "second", device="cpu")
    assert "that make the tokens" not in capsys.readouterr().err
    before, after = from_pretrained(first), from_pretrained(second)
    tokens = before.encode(images)
    assert torch.equal(tokens.values, after.encode(images).values)
    assert not torch.equal(before.decode(tokens), after.decode(tokens))
    if kind != "flextok":
        build_task(dataclasses.replace(run, init=str(first), freeze=parts[1:]))
        assert "leaves parts free that make the tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"freeze": ("nothing",)}, "--freeze nothing fits no parameter"),
        ({"freeze": ("vae", "to_latent", "to_pixels")}, "nothing to train"),
        ({"init": "xar-cell-emoji64"}, "is a xar, this run trains a kl_vae"),
        ({"init": "kl_vae-f8c16-emoji64"}, "other sizes"),
    ],
)
def test_fine_tuning_refuses(picture_folder, changes, message):
    with pytest.raises(ValueError, match=message):
        build_task(tokenizer_run(picture_folder, **changes))


def test_training_lowers_the_loss(tmp_path, picture_folder, tiny_tokenizer):
    config = generator_run(picture_folder, tiny_tokenizer, images=2048, batch_size=32, save_every=2048, log_every=128)
    train(config, tmp_path / "run", device="cpu")
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_a_line_of_the_log_is_the_mean_since_the_one_before(tmp_path, picture_folder, tiny_tokenizer):
    def losses(every):
        run = generator_run(picture_folder, tiny_tokenizer, images=32, log_every=every)
        train(run, tmp_path / str(every), device="cpu")
        return [json.loads(line)["loss"] for line in (tmp_path / str(every) / "metrics.jsonl").read_text().splitlines()]

    a, b, c, d = losses(8)
    assert losses(16) == pytest.approx([(a + b) / 2, (c + d) / 2])


def test_adversarial_and_perceptual_losses_train(tmp_path, picture_folder):
    loss = AutoencoderLossConfig(perceptual=0.0, adversarial=0.1, adversarial_start=16)
    config = tokenizer_run(picture_folder, loss=loss, images=48)
    train(config, tmp_path / "run", device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "discriminator" not in lines[0]
    assert "discriminator" in lines[-1]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="these are glibc's options")
def test_freed_memory_is_kept_for_the_next_step():
    assert keep_memory()

    def step():
        x = torch.empty(1 << 20).fill_(1)
        return (x + x).sum()

    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        step()
    # 2048 pages a step go to the kernel and come back otherwise; the heap may still grow once or twice
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 20 * 2048 / 4


def test_schedule():
    optim = OptimConfig(lr=1.0, warmup=100, final_lr=0.1)
    assert learning_rate(optim, 0, 0.0) == pytest.approx(0.01)
    assert learning_rate(optim, 1000, 1.0) == pytest.approx(0.1)
    assert learning_rate(optim, 1000, 0.5) == pytest.approx(0.55)
    assert learning_rate(dataclasses.replace(optim, schedule="constant"), 1000, 0.9) == 1.0


@pytest.mark.parametrize("name", list(PRESETS))
def test_presets_survive_json_and_reject_unknown_keys(name):
    config = PRESETS[name]()
    assert config.name == name
    assert read_config(json.loads(to_json(config))) == config
    with pytest.raises(ValueError, match=r"model\.widht"):
        read_config({**to_dict(config), "model": {**to_dict(config)["model"], "widht": 3}})


def test_the_card_names_the_command_that_repeats_the_run():
    plain = PRESETS["kl_vae-f8c16-emoji64"]()
    model = SimpleNamespace(
        extra={"trained": {"images": 1, "cpu_minutes": 1}},
        kind="kl_vae",
        n_params=1,
        spec=TokenSpec(kind="continuous", grid=(8, 8), dim=16),
    )
    assert "\n    genlab train kl_vae-f8c16-emoji64\n" in card(plain, model)
    changed = card(dataclasses.replace(plain, seed=1), model)
    assert "\n    genlab train --config run.json\n" in changed
    (written,) = re.findall(r"`run.json` above\):\n\n```json\n(.*?)```", changed, re.DOTALL)
    assert read_config(json.loads(written)) == dataclasses.replace(plain, seed=1)


def test_dry_run_trains_nothing(tmp_path, picture_folder):
    report = dry_run(tokenizer_run(picture_folder))
    assert report["parameters"] > 0
    assert report["batch"] == [8, 3, 16, 16]
    assert report["loss"]["loss"] > 0


KILL = """
import sys
from pathlib import Path
from genlab.config import load_json
from train.config import read_config
from train.loop import train
train(read_config(load_json(sys.argv[1])), Path(sys.argv[2]), device="cpu")
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_at_random_points_it_goes_on(tmp_path, picture_folder, tiny_tokenizer, number):
    config = generator_run(picture_folder, tiny_tokenizer, images=1600, save_every=8, log_every=8, keep=2)
    (tmp_path / "c.json").write_text(to_json(config))
    out, rng, seen = tmp_path / "run", random.Random(0), 0
    command = [sys.executable, "-c", KILL, str(tmp_path / "c.json"), str(out)]
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.time() + 90
        while time.time() < deadline and process.poll() is None:  # wait until it makes progress, then strike
            found = checkpoint.candidates(out / "checkpoints")
            if found and int(found[0].name) > seen:
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(number)
        process.wait(timeout=90)
        state = checkpoint.newest(out / "checkpoints")
        assert state is not None
        assert not state[2], "a checkpoint under its final name must be whole"
        assert state[0] >= seen
        seen = state[0]
    finished = weights(train(config, out, device="cpu"))
    whole = weights(train(config, tmp_path / "whole", device="cpu"))
    assert equal(finished, whole)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_blocks_train_as_plain_ones_do(tmp_path, picture_folder, tiny_tokenizer, monkeypatch, backend):
    if backend == "inductor" and "GENLAB_COMPILE" not in os.environ:
        pytest.skip("half a minute of compiling: GENLAB_COMPILE=1 runs it")
    if backend == "inductor" and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler here")
    compiled, run = [], torch.nn.Module.compile

    def seen(module, *arguments, **options):
        compiled.append(module)
        run(module, *arguments, **options, backend=backend)

    monkeypatch.setattr(torch.nn.Module, "compile", seen)
    config = generator_run(picture_folder, tiny_tokenizer, images=24)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
    plain = weights(train(config, tmp_path / "plain", device="cpu"))
    assert not compiled
    quick = weights(train(dataclasses.replace(config, compile=True), tmp_path / "compiled", device="cpu"))
    assert len(compiled) == 2  # the encoder's block, and the decoder's
    assert plain.keys() == quick.keys()
    assert max((plain[k].float() - quick[k].float()).abs().max() for k in plain) < 1e-4


def test_balance_shows_classes_as_often_as_it_says():
    labels = torch.tensor([0] * 80 + [1] * 15 + [2] * 5)
    for balance, wanted in ((1.0, [1, 1, 1]), (0.5, [80**0.5, 15**0.5, 5**0.5])):
        order = Order(100, 3, class_weights(SimpleNamespace(labels=labels), balance))
        seen = order(0, 20000)
        share = torch.bincount(labels[seen]).double() / 20000
        wanted = torch.tensor(wanted).double()
        assert float((share - wanted / wanted.sum()).abs().max()) < 5e-3
        within = torch.bincount(seen, minlength=100)[labels == 0].double()  # images of a class count alike
        due = float(within.mean()) / 200  # an epoch, 0 or 1 times: 5 deviations of 200 epochs
        assert float((within - within.mean()).abs().max()) < 5 * (200 * due * (1 - due)) ** 0.5
        assert torch.equal(order(150, 120), seen[150:270])  # whatever the batches
        assert not torch.equal(seen[:100], seen[100:200])
    assert sorted(Order(100, 3, torch.ones(100))(0, 100).tolist()) == list(range(100))
    assert class_weights(SimpleNamespace(), 0) is None  # pairs to distil have no classes
    with pytest.raises(ValueError, match=r"--data\.balance is between 0"):
        class_weights(SimpleNamespace(labels=labels), 1.5)
    with pytest.raises(ValueError, match="images with classes, 2 of these 3 have none"):
        class_weights(SimpleNamespace(labels=torch.tensor([-1, 0, -1])), 0.5)
