"""SEED-LLaMA: documents of words and images, drawing and describing, LoRA, training."""

import dataclasses
import shutil

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from genlab.cli import main
from genlab.generators.base import Guidance
from genlab.generators.seed_llama import CHAT_DESCRIBE, SeedLlama, SeedLlamaConfig
from genlab.hub import from_pretrained
from genlab.noise import Noise
from genlab.tokens import Tokens
from samplers import default_sampler
from samplers.speculative_jacobi import SpeculativeJacobiSampler
from tokenizers_img.vq import VQ, VQConfig
from train.config import DataConfig, OptimConfig, run_config
from train.documents import learn_pieces
from train.loop import train
from train.presets import PRESETS
from train.tasks import build_task

LM = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
TINY = SeedLlamaConfig(grid=(6,), vocab=20, lm=LM, text_vocab=300, text_length=16)


def make(**changes):
    torch.manual_seed(0)
    model = SeedLlama(dataclasses.replace(TINY, **changes)).eval()
    for name, p in model.named_parameters():
        if p.ndim > 1 and "lora" not in name:
            torch.nn.init.normal_(p, std=0.2)  # decided enough that a wrong mask shows
    model.extra["word_pieces"] = learn_pieces(["a red square", "a blue square", "two green circles"], 300)
    return model


def images(model, n=2):
    ids = torch.randint(20, (n, 6), generator=torch.Generator().manual_seed(1))
    return Tokens(ids, model.spec)


# -- documents ------------------------------------------------------------------------------------------------------


def test_documents_there_and_back():
    model = make()
    parts = ["a red ", torch.tensor([1, 2, 3, 4, 5, 0]), " and ", torch.tensor([7]), "."]
    ids = model.ids_of(parts)
    assert ids[0] == model.bos
    assert [i for i in ids if i >= 300] == [320, 301, 302, 303, 304, 305, 300, 321, 320, 307, 321]
    again = model.parts_of(ids)
    assert [p if isinstance(p, str) else p.tolist() for p in again] == [
        p if isinstance(p, str) else p.tolist() for p in parts
    ]


@pytest.mark.parametrize("text", ["", "Ünïcödé ✓ 日本", "  two  spaces ", "<img>"])
def test_any_text_can_be_written(text):
    model = make()
    assert "".join(model.parts_of(model.ids_of([text]))) == text
    assert max(model.ids_of([text])) < 300  # what looks like a mark is none


def test_long_captions_are_cut_and_the_mark_stays():
    model = make()
    text = model.read_captions(["a red square " * 20, "a"])
    assert text.embeds_BTD.shape[1] <= 16
    for row, mask in zip(text.embeds_BTD[..., 0], text.mask_BT, strict=True):
        ids = row[mask].long().tolist()
        assert (ids[0], ids[-1]) == (model.bos, model.boi)


def test_marks_may_not_lie_among_the_codes():
    with pytest.raises(ValueError, match="must be apart and outside the codes"):
        make(begin_image=305)
    with pytest.raises(ValueError, match="attends within 8 positions, a caption and an image take 22"):
        make(lm=OTHERS["gemma2"] | {"sliding_window": 8})
    own = make(begin_image=299, end_image=340)
    assert own.lm.get_input_embeddings().num_embeddings == 341


# -- reading and drawing ----------------------------------------------------------------------------------------------


def test_the_view_of_earlier_codes_does_not_change():
    model = make()
    caption = model.read_captions(["a red square"])
    ids = images(model, 1).values[..., None]
    before = model.logits(ids[:, :-1], model.check_condition(caption))
    for i in range(5):
        changed = ids.clone()
        changed[:, i] = (changed[:, i] + 1) % 20
        after = model.logits(changed[:, :-1], model.check_condition(caption))
        moved = (after - before).abs().amax((0, 2, 3)) > 1e-6
        assert moved.tolist() == [j > i for j in range(6)]


OTHERS = {
    "llama": LM,
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 0, "eos_token_id": 1},
    "qwen2": LM | {"model_type": "qwen2"},
    "gemma2": LM | {"model_type": "gemma2", "head_dim": 8, "sliding_window": 64, "query_pre_attn_scalar": 8},
    "gpt_neox": {k: v for k, v in LM.items() if k != "num_key_value_heads"} | {"model_type": "gpt_neox"},
}


@pytest.mark.parametrize("lm", list(OTHERS))
def test_an_image_is_predicted_as_its_document_is(lm):
    """Padding, positions, and the choice among codes alone: teacher forcing is the LM's own view of the document."""
    model = make(lm=OTHERS[lm])
    tokens = images(model)
    captions = ["a red square", "a"]
    got = model.logits(tokens.values[:, :-1, None], model.check_condition(model.read_captions(captions)))
    for b, caption in enumerate(captions):
        ids = torch.tensor([model.ids_of([caption, tokens.values[b]])])
        at = ids[0].tolist().index(model.boi)
        want = model.lm(input_ids=ids).logits[0, at : at + 6, 300:320]
        torch.testing.assert_close(got[b, :, 0], want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("lm", list(OTHERS))
def test_drawing_with_the_cache_is_drawing_without_it(lm):
    model = make(lm=OTHERS[lm])
    text, guidance = model.read_captions(["a red square", "two"]), Guidance(scale=2.0, schedule="constant")
    a, b = model.start(text, guidance), model.start(text, guidance, cached=False)
    for k in range(6):
        p, q = model.predict(a), model.predict(b)
        torch.testing.assert_close(p.logits_BGKV, q.logits_BGKV, atol=1e-4, rtol=1e-4)
        for state in (a, b):
            model.commit(state, torch.full((2, 1, 1), k))
    assert model.tokens(a).values.tolist() == [list(range(6))] * 2


def test_an_image_hangs_on_its_own_caption_and_seed():
    model = make()
    text, sampler = model.read_captions(["a red square", "two green circles"]), default_sampler(model)
    both = sampler.sample(model, text, seeds=torch.tensor([3, 4])).tokens.values
    alone = sampler.sample(model, model.read_captions(["two green circles"]), seeds=torch.tensor([4])).tokens.values
    assert torch.equal(both[1:], alone)
    fast = SpeculativeJacobiSampler().sample(model, text, seeds=torch.tensor([3, 4]))
    assert fast.tokens.values.shape == (2, 6)
    assert fast.stats.model_calls < 6


def test_classes_and_foreign_embeddings_are_refused():
    model = make()
    for wrong in (
        torch.tensor([1]),
        dataclasses.replace(model.read_captions(["a"]), embeds_BTD=torch.zeros(1, 3, 4), mask_BT=None),
    ):
        with pytest.raises(ValueError, match=r"give `model.read_captions\(captions\)`"):
            model.start(wrong)


def test_plain_text_is_what_transformers_generates():
    model = make()
    sizes = {k: v for k, v in LM.items() if k != "model_type"}
    plain = LlamaForCausalLM(LlamaConfig(vocab_size=model.total, tie_word_embeddings=False, **sizes)).eval()
    plain.load_state_dict(model.lm.state_dict())
    ids = torch.tensor([model.ids_of(["a red"])])
    for beams in (1, 3):
        want = plain.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, num_beams=beams,
            suppress_tokens=[*range(300, 322)], eos_token_id=1, pad_token_id=1,
        )[0, ids.shape[1] :]  # fmt: skip
        got = model.write([["a red"], ["two green circles are"]], images=False, beams=beams, max_new=12)[0]
        assert got == model.parts_of(want.tolist())


def test_what_it_writes_keeps_the_grammar():
    model = make()
    with torch.no_grad():  # it would always begin an image, and inside it always a word
        model.lm.get_output_embeddings().weight[model.boi] += 3 * model.lm.model.norm.weight
        model.lm.get_output_embeddings().weight[5] += 1
    torch.manual_seed(0)
    for temperature in (0.0, 1.5):
        for parts in model.write([["a "], [images(model).values[0], "what?"]], temperature=temperature, max_new=40):
            whole = [p for p in parts if not isinstance(p, str)]
            assert all(len(p) == 6 for p in whole)
        only = model.write([["a "]], images=False, temperature=temperature, max_new=20)
        assert all(isinstance(p, str) for p in only[0])


def test_documents_longer_than_the_lm_are_refused():
    with pytest.raises(ValueError, match="don't fit into the LM's 128 positions"):
        make().reply(["a red square " * 50])


def test_writing_keeps_nothing_for_gradients():
    model, seen = make(), []
    model.lm.register_forward_hook(lambda *_: seen.append(torch.is_inference_mode_enabled()))
    model.write([["a"]], images=False, max_new=2)
    assert seen
    assert all(seen)


def test_interleaved_documents():
    model, shown = make(), images(make(), 2).values
    document = ["first ", shown[0], " then ", shown[1], " so "]
    alone = model.reply(document, max_new=10, images=False)
    together = model.write([["a"], document], max_new=10, images=False)[1]
    assert alone == together
    ids = torch.tensor([model.ids_of(document)])
    changed = ids.clone()
    changed[0, ids[0].tolist().index(model.boi) + 1] = 300 + (shown[0, 0] + 1) % 20
    assert not torch.allclose(model.lm(input_ids=ids).logits[0, -1], model.lm(input_ids=changed).logits[0, -1])


def test_fewer_codes_are_the_beginning_of_the_image():
    model = make()
    tokens = images(model)
    other = Tokens(tokens.values.clone(), model.spec)
    other.values[:, 3:] = 0
    options = {"max_new": 8}
    few = model.describe(tokens, 3, **options)
    assert few == model.describe(other, 3, **options)
    assert few == model.describe(other.first(3), **options) == model.describe(tokens.first(3), 5, **options)
    mixed = tokens.first(torch.tensor([3, 6]))
    assert model.describe(mixed, **options) == [few[0], model.describe(tokens, **options)[1]]
    assert model.describe(tokens, **options) != model.describe(tokens, ask="What is it?", **options)
    with pytest.raises(ValueError, match="these tokens"):
        model.describe(Tokens(torch.zeros(1, 5, dtype=torch.long), dataclasses.replace(model.spec, grid=(5,))))


# -- learning ---------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_document_by_hand():
    model = make(text_weight=0.5)
    ids = torch.tensor([model.ids_of(["a red square", images(model).values[0]])])
    learn = torch.ones_like(ids, dtype=torch.bool)
    learn[0, 2] = False
    terms = model.document_loss(ids, learn)
    nats = -model.lm(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    code = (ids[0, 1:] >= 300) & (ids[0, 1:] < 320)
    counts = learn[0, 1:]
    weight = counts * torch.where(code, 1.0, 0.5)
    torch.testing.assert_close(terms["loss"], (nats * weight).sum() / weight.sum())
    torch.testing.assert_close(terms["image"], nats[code].mean())
    torch.testing.assert_close(terms["text"], nats[~code & counts].mean())
    padded = torch.cat([ids, torch.ones(1, 3, dtype=torch.long)], 1)
    mask = torch.cat([learn, torch.zeros(1, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(model.document_loss(padded, mask)["loss"], terms["loss"])


def test_lora_changes_only_what_it_should():
    base = make()
    ids = torch.tensor([base.ids_of(["a red square and two green circles"])])
    before = base.text_log_prob(ids)
    model = SeedLlama(dataclasses.replace(TINY, lora_rank=4), base.lm).eval()
    model.extra = dict(base.extra)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "modules_to_save" in n for n in trained)
    assert sum("lora_A" in n for n in trained) == 2 * 7  # all seven projections of both layers
    assert any("embed_tokens" in n for n in trained)
    assert any("lm_head" in n for n in trained)
    assert sum("norm" in n for n in trained) == 2 * 2 + 1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    document = torch.tensor([model.ids_of(["a red square", images(model).values[0]])])
    for _ in range(5):
        model.document_loss(document, torch.ones_like(document, dtype=torch.bool))["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        changed = model.text_log_prob(ids)
        assert torch.equal(model.text_log_prob(ids, adapter=False), before)  # bit for bit
    assert not torch.allclose(changed, before)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    merged = model.merged()
    assert merged.config.lora_rank == 0
    torch.testing.assert_close(merged.text_log_prob(ids), changed, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no LoRA to merge"):
        merged.merged()


def test_saved_and_loaded(tmp_path):
    for changes in ({}, {"lora_rank": 2}):
        model = make(**changes)
        again = from_pretrained(model.save_pretrained(tmp_path / str(len(changes))))
        assert again.describe(images(model), max_new=6) == model.describe(images(model), max_new=6)


def test_generator_loss_is_finite_and_learns_no_caption():
    model = make(caption_drop=1.0)
    noise = Noise(torch.arange(2))
    a = model.loss(images(model).values, model.read_captions(["a red square", "two"]), noise)["loss"]
    b = model.loss(images(model).values, model.read_captions(["else", "other words"]), noise)["loss"]
    assert torch.equal(a, b)


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def world(tmp_path_factory, picture_folder):
    """Captioned pictures and a VQ of 4 x 4 codes."""
    root = tmp_path_factory.mktemp("seed_llama")
    shutil.copytree(picture_folder, root / "pictures")
    for image in (root / "pictures").rglob("*.png"):
        image.with_suffix(".txt").write_text(f"a {image.parent.name} square, left")
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch": 2, "channels": (8, 16), "layers": 1, "decoder_layers": 1, "features": 8}
    VQ(VQConfig(**sizes, norm_groups=4, attention_levels=(), codes=20, dim=4)).save_pretrained(root / "vq")
    return root


def run(world, images=32, **fields):
    model = dataclasses.replace(TINY, grid=(4, 4), order="raster", **fields)
    return run_config(
        name="run", model=model, tokenizer=str(world / "vq"),
        data=DataConfig(source=str(world / "pictures"), flip=True),
        optim=OptimConfig(lr=1e-3, warmup=8), images=images, batch_size=8, precision="fp32", sample_every=0,
        save_every=16, log_every=8, threads=1,
    )  # fmt: skip


def test_training_resumes_and_lora_starts_from_it(tmp_path, world, capsys):
    config = run(world, visual_prefix=0.5, caption_drop=0.2, interleave=2, dropout=0.1, neighbours=2)
    first = train(dataclasses.replace(config, sample_every=32), tmp_path / "a", device="cpu")
    train(config, tmp_path / "b", device="cpu")
    shutil.rmtree(tmp_path / "b" / "model")
    for folder in (tmp_path / "b" / "checkpoints").iterdir():
        if "16" not in folder.name:
            shutil.rmtree(folder)
    resumed = from_pretrained(train(config, tmp_path / "b", device="cpu"))
    model = from_pretrained(first)
    for name, value in model.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert len(model.memory.vectors_ND) == len(resumed.memory.vectors_ND) > 0  # filled in the end, not when resumed
    for neighbours in (2, 0):  # what goes on from it remembers the images it sees itself, or none
        again = dataclasses.replace(run(world, 8, neighbours=neighbours), init=str(first))
        again = from_pretrained(train(again, tmp_path / f"again-{neighbours}", device="cpu"))
        assert (again.memory is not None) == (neighbours > 0)
    tuned = from_pretrained(train(run(world, 8, base=str(first), lora_rank=2, chat=1.0), tmp_path / "c", device="cpu"))
    ids = torch.tensor([model.ids_of(["a red square"])])
    with torch.no_grad():
        assert torch.equal(tuned.text_log_prob(ids, adapter=False), model.text_log_prob(ids))
    capsys.readouterr()
    picture = next((world / "pictures").rglob("*.png"))
    assert main(["caption", str(picture), str(picture.parent), "--model", str(first), "--max-new", "5"]) == 0
    lines = capsys.readouterr().out.strip().split("\n")
    assert len(lines) == 13
    assert lines[0].startswith(f"{picture}\t")
    assert main(["caption", str(picture), "--model", str(first), "--tokens", "17"]) == 2
    assert "reads 1 to 16 tokens" in capsys.readouterr().err
    assert main(["caption", str(tmp_path / "no.png"), "--model", str(first)]) == 2
    assert main(["caption", str(picture), "--model", str(world / "vq")]) == 2
    words = ["--prompt", "a red square", "--seeds", "0-1", "--grid", str(tmp_path / "g.png")]
    assert main(["sample", str(first), *words]) == 0
    assert (tmp_path / "g.png").is_file()


def test_what_documents_are_made_of(world):
    task = build_task(run(world, reverse=1.0, chat=1.0))
    batch, model = task.batch(0, 4), task.model
    for ids, learn in zip(batch.x, batch.labels, strict=True):
        parts = model.parts_of(ids.tolist())
        assert parts[0] == CHAT_DESCRIBE[0]
        assert parts[1].shape == (16,)
        assert parts[2].startswith(CHAT_DESCRIBE[1] + "a ")
        learned = model.parts_of(ids[learn].tolist())
        assert learned == [parts[2].removeprefix(CHAT_DESCRIBE[1])]  # in a chat, only the answer
    drawing = build_task(run(world, reverse=0.0, caption_drop=0.5))
    batch = drawing.batch(0, 16)
    heads = {type(drawing.model.parts_of(ids.tolist())[0]) for ids in batch.x}
    assert heads == {str, torch.Tensor}  # with its caption, and without
    some = build_task(run(world, reverse=1.0, visual_prefix=1.0))
    lengths = {len(some.model.parts_of(ids.tolist())[0]) for ids in some.batch(0, 16).x}
    assert len(lengths) > 3
    many = build_task(run(world, interleave=3))
    assert len(many.batch(0, 16).x) < 16


def test_noisy_codes_are_near_ones_and_are_not_learned(world):
    """Each that changes becomes one of its 8 nearest; what is to be drawn stays as it is."""
    plain, noisy = (build_task(run(world, reverse=1.0, code_noise=share)) for share in (0.0, 0.5))
    a, b = (task.batch(0, 16) for task in (plain, noisy))
    codebook, changed, of = plain.tokenizer.codebook.detach(), 0, 0
    for x, y, learn in zip(a.x, b.x, b.labels, strict=True):
        (codes, words), (others, same) = plain.model.parts_of(x.tolist()), noisy.model.parts_of(y.tolist())
        assert words == same
        for i, j in zip(codes.tolist(), others.tolist(), strict=True):
            rank = int((torch.cdist(codebook[i][None], codebook)[0] < torch.dist(codebook[i], codebook[j])).sum())
            assert rank <= 8
            changed, of = changed + (i != j), of + 1
        assert noisy.model.parts_of(y[learn].tolist()) == [words]
    assert 0.35 < changed / of < 0.65
    plain, noisy = (build_task(run(world, reverse=0.0, code_noise=share)) for share in (0.0, 0.5))
    assert torch.equal(plain.batch(0, 16).x, noisy.batch(0, 16).x)


def test_a_new_lm_begins_with_the_codebook(world):
    """Codes that lie near each other have embeddings, and outputs, that do; a tuned one keeps its own."""
    model = make()
    with torch.no_grad():
        model.start_codes(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
    z = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    apart = torch.pdist((z - z.mean(0)) / z.std(0))
    for table in (model.lm.get_input_embeddings(), model.lm.get_output_embeddings()):
        rows = table.weight.detach()[300:320]
        assert float(torch.corrcoef(torch.stack([apart, torch.pdist(rows)]))[0, 1]) > 0.9
        assert float(rows.std()) == pytest.approx(0.2, rel=0.3)
    with pytest.raises(ValueError, match="has 20 codes, the codebook 7"):
        model.start_codes(torch.randn(7, 4))
    fresh = build_task(run(world))
    before = SeedLlama(fresh.model.config).lm.get_input_embeddings().weight
    assert not torch.equal(fresh.model.lm.get_input_embeddings().weight[300:320], before[300:320])


def test_images_with_a_side_in_their_caption_are_not_mirrored(world):
    task = build_task(run(world))
    n = len(task.images)
    seen = {
        tuple(p.tolist())
        for ids in task.batch(0, 24).x
        for p in task.model.parts_of(ids.tolist())
        if not isinstance(p, str)
    }
    assert seen <= {tuple(row) for row in task.tokens[:n].tolist()}


def test_impossible_runs_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="needs --tokenizer"):
        build_task(dataclasses.replace(run(world), tokenizer=""))
    with pytest.raises(ValueError, match="at least 258"):
        build_task(run(world, text_vocab=100))
    with pytest.raises(FileNotFoundError, match="no causal LM at"):
        build_task(run(world, base=str(tmp_path / "none")))


def test_a_base_of_transformers(world, tmp_path):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    sizes = {k: v for k, v in LM.items() if k != "model_type"}
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=300, tie_word_embeddings=True, **sizes))
    base.save_pretrained(tmp_path / "base")
    pieces = Tokenizer.from_str(learn_pieces(["a red square"], 300))
    PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>").save_pretrained(
        tmp_path / "base"
    )
    task = build_task(run(world, base=str(tmp_path / "base"), lora_rank=2, text_vocab=7))
    model = task.model
    assert model.config.text_vocab == 300
    ids = torch.tensor([model.ids_of(["a red square"])])
    want = base(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    with torch.no_grad():
        assert torch.equal(model.eval().text_log_prob(ids, adapter=False)[0], want)
    assert bool(task(task.batch(0, 4), 0)["loss"].isfinite())


@pytest.mark.parametrize("name", [n for n in PRESETS if n.startswith("seed_llama") and n.endswith("64")])
def test_presets_fit_their_tokenizers(name):
    from genlab.registry import model_class
    from genlab.tokens import require_fit

    config = PRESETS[name]()
    of = PRESETS["seed-codes-emoji64" if config.tokenizer == "seed-emoji64" else config.tokenizer]().model
    with torch.device("meta"):
        require_fit(config.tokenizer, model_class(of.kind)(of).spec, name, SeedLlama(config.model).spec)
