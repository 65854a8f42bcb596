"""Divot-LLM: documents of words and clips, drawn in one pass; its heads; its stories."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from eval.bench_divot import DivotBenchConfig, likelihood, run
from genlab.cli import main
from genlab.data.clips import open_clips
from genlab.data.video import read_film
from genlab.distributions import Chain, GaussianMixture
from genlab.generators.base import Guidance
from genlab.generators.divot_lm import QUERY, SHOWN, WORD, DivotLM, DivotLMConfig
from genlab.hub import from_pretrained
from genlab.noise import Noise
from genlab.registry import SAMPLERS
from genlab.tokens import Tokens
from samplers import default_sampler
from samplers.mixture import MixtureConfig, MixtureSampler, draw_token
from tests.unit.test_divot import TINY, VAE
from tokenizers_img.divot import Divot
from tokenizers_img.kl_vae import KLVAE
from train.config import DataConfig, OptimConfig, run_config
from train.documents import learn_pieces
from train.loop import train

LM = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
SMALL = DivotLMConfig(grid=(8,), vocab=8, dim=16, components=3, lm=LM, text_vocab=300, text_length=24)
WORDS = ["a red apple", "a waving hand", "grinning face with big eyes"]


def make(**fields):
    torch.manual_seed(0)
    model = DivotLM(dataclasses.replace(SMALL, **fields)).eval()
    model.extra["word_pieces"] = learn_pieces(WORDS, 300)
    return model


def clip(seed):
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))


def test_a_document_and_its_places():
    m = make()
    ids, what, tokens = m.document(["a red", clip(0), " apple", clip(1)], draw_last=True)
    assert ids[0] == m.bos
    assert ids.count(m.boi) == ids.count(m.eoi) == 2
    assert what.count(SHOWN) == what.count(QUERY) == 8
    assert what.index(SHOWN) < what.index(QUERY)
    assert torch.equal(tokens, torch.cat([clip(0), clip(1)]))
    batch = m.batch_of([(ids, what, tokens), m.document(["a"])])
    assert torch.equal(batch.tokens_BTC[0][batch.what_BT[0] == QUERY], clip(1))
    assert not bool(batch.learn_BT[batch.what_BT != WORD].any())
    assert batch.learn_BT[1].sum() == len(m.pieces.encode("a").ids) + 1  # its words and its end


@pytest.mark.parametrize("lora", [0, 2])
def test_queries_see_each_other_and_all_before(lora):
    """Changing the last query changes the first; changing what follows a word doesn't change the word."""
    m = make(lora_rank=lora)
    ids, what, tokens = m.document(["a red apple", clip(0)], draw_last=True)
    d = m.batch_of([(ids, what, tokens)])
    real = torch.ones_like(d.what_BT, dtype=torch.bool)
    x = m.embed_document(d.ids_BT, d.what_BT, d.tokens_BTC).detach()
    at = [i for i, w in enumerate(what) if w == QUERY]
    other = x.clone()
    other[0, at[-1]] += 1
    a, b = m.hidden(x, d.what_BT, real)[0], m.hidden(other, d.what_BT, real)[0]
    assert not torch.allclose(a[0, at[0]], b[0, at[0]], atol=1e-4)
    assert torch.allclose(a[0, : at[0]], b[0, : at[0]], atol=1e-5)
    shown = torch.where(d.what_BT == QUERY, SHOWN, d.what_BT)  # a clip that is read is causal
    a, b = m.hidden(x, shown, real)[0], m.hidden(other, shown, real)[0]
    assert torch.allclose(a[0, at[0]], b[0, at[0]], atol=1e-5)


def test_padding_doesnt_matter():
    m = make()
    text = m.read_captions(WORDS)
    alone = m.predict(m.start(m.read_captions(WORDS[:1])))
    together = m.predict(m.start(text))
    assert torch.allclose(alone.mean_BGMC[0], together.mean_BGMC[0], atol=1e-4)
    docs = [m.document(["a red apple", clip(0)], draw_last=True), m.document(["a", clip(1)], draw_last=True)]
    losses = [float(m.multimodal_loss(m.batch_of([d]), Noise(torch.tensor([0])))["clip"].detach()) for d in docs]
    both = float(m.multimodal_loss(m.batch_of(docs), Noise(torch.arange(2)))["clip"].detach())
    assert both == pytest.approx(sum(losses) / 2, abs=1e-4)


def test_a_drawn_clip_is_the_head_of_the_document_loss():
    """What `predict` says of a caption's clip is what the document's loss is made of."""
    m = make()
    d = m.batch_of([m.document(["a waving hand", clip(0)], draw_last=True)])
    loss = float(m.multimodal_loss(d, Noise(torch.tensor([0])))["clip"].detach())
    text = m.read_captions(["a waving hand"])
    assert -float(m.log_prob(text, clip(0)[None]).detach().mean()) / 16 == pytest.approx(loss, abs=1e-4)
    assert float(m.loss(clip(0)[None], text, Noise(torch.tensor([0])))["loss"].detach()) == pytest.approx(
        loss, abs=1e-4
    )


@pytest.mark.parametrize("head", ["mixture", "mse", "diffusion"])
def test_heads_learn_and_draw(head, tmp_path):
    m = make(head=head, head_steps=5).train()
    docs = [m.document([w, clip(i)], draw_last=True) for i, w in enumerate(WORDS)]
    docs += [m.document([clip(i), w]) for i, w in enumerate(WORDS)]
    # clips to be read alone: nothing is drawn, and no weight lacks a gradient, as FSDP2 wants it
    m.multimodal_loss(m.batch_of(docs[3:]), Noise(torch.arange(3)))["loss"].backward()
    assert not [name for name, p in m.named_parameters() if p.grad is None]
    batch, optimizer = m.batch_of(docs), torch.optim.AdamW(m.parameters(), lr=3e-3)
    seen = []
    for step in range(12):
        optimizer.zero_grad()
        terms = m.multimodal_loss(batch, Noise(torch.arange(6) + 6 * step))
        terms["loss"].backward()
        optimizer.step()
        seen.append(float(terms["loss"].detach()))
    assert seen[-1] < 0.85 * seen[0]
    m.eval()
    sampler, text = default_sampler(m), m.read_captions(WORDS)
    assert sampler.name == ("chain" if head == "diffusion" else "mixture")
    out = sampler.sample(m, text, torch.arange(3))
    assert out.tokens.values.shape == (3, 8, 16)
    assert out.stats.model_calls == 1  # one pass
    alone = sampler.sample(m, text[1:2], torch.tensor([1]))
    assert torch.allclose(alone.tokens.values, out.tokens.values[1:2], atol=1e-3)
    again = from_pretrained(m.save_pretrained(tmp_path / "m"))
    assert torch.allclose(default_sampler(again).sample(again, text, torch.arange(3)).tokens.values, out.tokens.values)
    assert issubclass(m.predicts, Chain if head == "diffusion" else GaussianMixture)


def test_the_mixture_beats_the_mean_where_there_are_two_answers():
    """One caption, two clips far apart: the mean lies between them, the mixture on both."""
    targets = torch.stack([torch.full((8, 16), 1.5), torch.full((8, 16), -1.5)])
    found = {}
    for head in ("mixture", "mse"):
        m = make(head=head).train()
        text = m.read_captions(WORDS[:1])[torch.tensor([0, 0])]
        optimizer = torch.optim.AdamW(m.parameters(), lr=5e-3)
        for step in range(60):
            optimizer.zero_grad()
            m.loss(targets + 0.1 * torch.randn(2, 8, 16), text, Noise(torch.arange(2) + step))["loss"].backward()
            optimizer.step()
        m.eval()
        found[head] = float(m.log_prob(text, targets + 0.1 * torch.randn(2, 8, 16)).detach().mean()) / 16
        if head == "mixture":
            drawn = MixtureSampler().sample(m, text[torch.zeros(40).long()], torch.arange(40)).tokens.values
            assert 0.2 < float((drawn.mean(-1) > 0).float().mean()) < 0.8
            assert float(drawn.mean(-1).abs().mean()) > 1
    assert found["mixture"] > found["mse"] + 0.5


def test_variance_scaling():
    dist = GaussianMixture(torch.zeros(500, 2, 1), torch.full((500, 2, 1, 4), 3.0), torch.full((500, 2, 1, 4), 2.0))
    noise = Noise(torch.arange(500)).at(position=torch.arange(2))
    for variance in (1.0, 0.1):
        x = draw_token(dist, variance, noise)
        assert float(x.mean()) == pytest.approx(3, abs=0.15)
        assert float(x.std()) == pytest.approx(2 * variance**0.5, rel=0.06)
    assert torch.equal(draw_token(dist, 0.0, noise), torch.full((500, 2, 4), 3.0))
    with pytest.raises(ValueError, match="positive"):
        draw_token(dist, -1.0, noise)


def test_the_temperature_of_components():
    """0 takes the likeliest, a high one takes each alike, and their Gaussians stay as they are."""
    logits = torch.tensor([3.0, 1.0, 0.0]).expand(1, 2000, 3)
    mean = torch.tensor([[0.0], [10.0], [20.0]]).expand(1, 2000, 3, 1)
    dist = GaussianMixture(logits_BGM=logits, mean_BGMC=mean, std_BGMC=torch.ones_like(mean))
    noise = Noise(torch.tensor([0])).at(position=torch.arange(2000))
    for temperature, share in ((0.0, 1.0), (1.0, float(logits[0, 0].softmax(0)[0])), (1e4, 1 / 3)):
        x = draw_token(dist.temperature(temperature), 1.0, noise)[0, :, 0]
        assert float((x < 5).float().mean()) == pytest.approx(share, abs=0.04)
        assert float(x[x < 5].std()) == pytest.approx(1.0, abs=0.1)
        assert set(draw_token(dist.temperature(temperature), 0.0, noise).unique().tolist()) <= {0.0, 10.0, 20.0}
    with pytest.raises(ValueError, match="temperature must not be negative"):
        dist.temperature(-1.0)


def test_a_model_says_at_what_temperature_it_is_drawn():
    m = make(temperature=0.0)
    torch.nn.init.normal_(m.leave[-1].weight, std=1.0)
    text, seeds = m.read_captions(WORDS), torch.arange(3)
    draw = lambda t: MixtureSampler(MixtureConfig(variance=0.0, temperature=t)).sample(m, text, seeds).tokens.values  # noqa: E731
    assert torch.equal(draw(None), draw(0.0))
    assert not torch.equal(draw(None), draw(1.0))


def test_what_cant_work_is_refused():
    m = make()
    text = m.read_captions(WORDS)
    with pytest.raises(ValueError, match="no classifier-free guidance"):
        m.start(text, Guidance(scale=3.0))
    with pytest.raises(ValueError, match="draws by text"):
        m.start(torch.tensor([0]))
    state = m.start(text)
    with pytest.raises(ValueError, match="expected one clip a row"):
        m.commit(state, torch.zeros(3, 8, 4))
    m.commit(state, torch.zeros(3, 8, 16))
    with pytest.raises(ValueError, match="committed already"):
        m.predict(state)
    m.crop(state, [0, 0, 0])
    assert m.predict_many(state, [])[0] is m.predict(state)
    with pytest.raises(ValueError, match="chat has no effect"):
        make(chat=1.0)
    with pytest.raises(ValueError, match="one query a token"):
        make(vocab=9)
    with pytest.raises(ValueError, match="no order"):
        m.describe(Tokens(torch.zeros(1, 8, 16), m.spec), keep=3)
    diffusion = make(head="diffusion")
    with pytest.raises(ValueError, match="has no density"):
        diffusion.log_prob(text, torch.zeros(3, 8, 16))
    with pytest.raises(ValueError, match="these can: mixture"):
        SAMPLERS["ancestral"]().sample(m, text, torch.arange(3))


def test_merged_lora_draws_the_same():
    m = make(lora_rank=2)
    for name, p in m.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    text, seeds = m.read_captions(WORDS), torch.arange(3)
    sampler = MixtureSampler(MixtureConfig(variance=0.0))
    a, b = (sampler.sample(x, text, seeds).tokens.values for x in (m, m.merged()))
    assert torch.allclose(a, b, atol=1e-4)
    with pytest.raises(ValueError, match="no LoRA"):
        make().merged()


def test_describe_and_story():
    m = make()
    tokens = Tokens(torch.stack([clip(0), clip(1)]), m.spec)
    said = m.describe(tokens, max_new=5)
    assert len(said) == 2
    assert said[1] == m.describe(tokens[1:], max_new=5)[0]  # padding doesn't matter
    told = m.story("A hand.", clips=3, seed=4, max_new=6)
    assert len(told) == 3
    assert all(text and tuple(c.shape) == (8, 16) for text, c in told)
    again = m.story("A hand.", clips=3, seed=4, max_new=6)
    assert [t for t, _ in told] == [t for t, _ in again]
    assert torch.allclose(told[2][1], again[2][1])
    assert not torch.allclose(told[2][1], m.story("A hand.", clips=3, seed=5, max_new=6)[2][1])
    with pytest.raises(ValueError, match="at least one clip"):
        m.story("x", clips=0)
    m.lm.config.max_position_embeddings = 24
    with pytest.raises(ValueError, match="don't fit into the LM's 24 positions"):
        m.story("A hand.", clips=3, max_new=1)
    with pytest.raises(ValueError, match="don't fit into the LM's 24 positions"):
        m.tell([["why " * 30]], max_new=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("divot_lm")
    torch.manual_seed(0)
    KLVAE(VAE).save_pretrained(folder / "vae")
    torch.manual_seed(0)
    Divot(TINY).save_pretrained(folder / "divot")
    return folder


def test_from_training_to_a_story(folder, monkeypatch, capsys):
    """Train, draw, describe, tell, and adapt the de-tokenizer to what is drawn."""
    monkeypatch.setenv("GENLAB_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    config = run_config(
        name="lm", model=dataclasses.replace(SMALL, interleave=2), tokenizer=str(folder / "divot"), images=16,
        batch_size=4, data=DataConfig(source="emoji-anim#4", takes=2), precision="fp32", threads=1, save_every=0,
        optim=OptimConfig(lr=1e-3, warmup=4), log_every=4, sample_every=16,
    )  # fmt: skip
    lm = train(config, folder / "lm", device="cpu")
    assert (folder / "lm" / "samples" / "000000016.png").is_file()

    words = ["sample", str(lm), "--prompt", "waving hand", "--seeds", "0-1", "--grid", "a.webp", "--out", "drawn"]
    assert main(words) == 0
    assert len(list((folder / "drawn").glob("*.webp"))) == 2
    assert read_film((folder / "a.webp").read_bytes(), "a", 32, 4).frames_T.shape[0] == 4
    capsys.readouterr()
    assert main(["caption", "a.webp", "--model", str(lm), "--max-new", "4", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 1
    assert main(["sample", str(lm), "--prompt", "x", "--grid", "a.png"]) == 2
    assert "a.webp" in capsys.readouterr().err

    assert main(["story", "A hand says hello.", "--model", str(lm), "--clips", "2", "--out", "s.html"]) == 0
    page = (folder / "s.html").read_text()
    assert page.count("data:image/webp;base64,") == 2
    assert "A hand says hello." in page
    assert "<script" not in page
    assert main(["story", "<b>", "--model", str(folder / "divot"), "--out", "t.html"]) == 2

    stage = run_config(
        name="adapt", model=dataclasses.replace(TINY, stage="adapt"), tokenizer=str(folder / "vae"), images=8,
        batch_size=4, data=DataConfig(source="emoji-anim#4"), precision="fp32", threads=1, save_every=0, log_every=4,
        sample_every=0, init=str(folder / "divot"), teacher=str(lm), optim=OptimConfig(lr=1e-3, warmup=4),
    )  # fmt: skip
    adapted = from_pretrained(train(stage, folder / "adapt", device="cpu"))
    x = open_clips("emoji-anim#1", "heldout", 32, 4).batch([0]).float() / 127.5 - 1
    assert torch.equal(adapted.encode(x).values, from_pretrained(folder / "divot").encode(x).values)

    heads = ["mse", "diffusion"]
    others = [str(make(head=h).save_pretrained(folder / h)) for h in heads]
    bench = DivotBenchConfig(
        tokenizer=str(folder / "divot"), lm=(str(lm), *others), painter=str(folder / "adapt/model"), n=3,
        clips="emoji-anim#6", fd=False, out=folder / "bench",
    )  # fmt: skip
    result = run(bench)["language"]
    assert list(result) == ["nearest_training_clip", *bench.lm]
    assert [row.get("heldout_nats_a_channel") is None for row in result.values()] == [True, False, False, True]
    held = open_clips("emoji-anim#6", "heldout", 32, 4)
    assert len((folder / "bench/captions.md").read_text().splitlines()) == 2 + 3
    assert held.captions[0] in (folder / "bench/captions.md").read_text()
    assert read_film((folder / "bench/prompts.webp").read_bytes(), "p", 32, 4).frames_T.shape[0] == 4
    with pytest.raises(ValueError, match="--lm takes a divot_lm"):
        run(dataclasses.replace(bench, lm=(str(folder / "divot"),)))


def test_the_benchs_likelihood_is_the_heads():
    """Of one clip, by hand; and a head without a density has none."""
    m, c = make(), DivotBenchConfig(batch_size=1)
    tokens = Tokens(torch.stack([clip(0), clip(1)]), m.spec)
    d = m.batch_of([m.document([WORDS[0], clip(0)], draw_last=True), m.document([WORDS[1], clip(1)], draw_last=True)])
    with torch.no_grad():
        each = float(m.multimodal_loss(d, Noise(torch.arange(2)))["nats"])
    assert likelihood(m, WORDS[:2], tokens, c) == pytest.approx(each, rel=1e-4)
    assert likelihood(make(head="diffusion"), WORDS[:2], tokens, c) is None
