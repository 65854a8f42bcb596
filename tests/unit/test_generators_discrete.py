"""LlamaGen, ELM, VAR: caches, guidance, conditions, losses, converters, presets."""

import math
from types import SimpleNamespace

import pytest
import torch

from genlab.convert.elm import convert_elm
from genlab.convert.llamagen import convert_llamagen
from genlab.convert.var import convert_var
from genlab.generators.base import Guidance, Text
from genlab.generators.elm import ELM, ELMConfig, ELMMasked, ELMMaskedConfig
from genlab.generators.llamagen import LlamaGen, LlamaGenConfig
from genlab.generators.var import VAR, VARConfig
from genlab.hub import from_pretrained
from genlab.noise import Noise
from samplers.ancestral import AncestralConfig, AncestralSampler
from samplers.masked import MaskedConfig, MaskedSampler

SIZES = {"num_classes": 5, "dim": 32, "depth": 2, "heads": 2}
GUIDED = Guidance(scale=3.0, schedule="linear")
B = 3


def randomise(model, seed=0):
    """Weights of ordinary size everywhere: the published starts leave heads at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in [*model.parameters(), *model.buffers()]:
            if p.is_floating_point():
                fan_in = p[0].numel() if p.ndim > 1 else 4
                p.copy_(torch.randn(p.shape, generator=generator) / fan_in**0.5 + (p.ndim == 1))
    return model.eval()


def make(name):
    if name == "llamagen":
        return randomise(LlamaGen(LlamaGenConfig(grid=(4, 3), vocab=11, **SIZES)))
    if name == "llamagen-text":
        c = LlamaGenConfig(grid=(4, 3), vocab=11, condition="text", text_dim=6, text_length=5, **SIZES)
        return randomise(LlamaGen(c))
    if name == "elm-text":
        text = {"condition": "text", "text_dim": 6, "text_length": 5}
        return randomise(ELM(ELMConfig(grid=(4, 3), sub_tokens=2, bits=3, **SIZES, **text)))
    if name == "elm":
        return randomise(ELM(ELMConfig(grid=(4, 3), sub_tokens=3, bits=3, **SIZES)))
    if name == "elm_masked":
        return randomise(ELMMasked(ELMMaskedConfig(grid=(4, 3), sub_tokens=2, bits=3, **SIZES)))
    text = {"condition": "text", "text_dim": 6, "text_length": 5} if name == "var-text" else {}
    return randomise(VAR(VARConfig(scales=(1, 2, 3, 4), vocab=13, code_dim=6, **SIZES, **text)))


def condition(model, rows=B):
    if model.by_text:
        g = torch.Generator().manual_seed(1)
        mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
        return Text(torch.randn(3, 4, 6, generator=g), mask)[:rows]
    return torch.tensor([0, 4, 2])[:rows]


def drawn(model, seed=2):
    """Random finished ids, as token values."""
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.spec.vocab, (B, *model.spec.shape), generator=g)


def full(model, values, cond, guidance):
    """Guided logits of all positions by teacher forcing, (B, L, K, V)."""
    L, K = model.spec.length, model.spec.depth

    def rows(c):
        if isinstance(model, VAR):
            return model.logits(c, model.inputs(values))[:, :, None]
        return model.logits(values.view(B, L, K)[:, :-1], c)

    c = model.check_condition(cond)
    free = model.no_condition(c)
    groups = torch.cat([torch.full((len(model.where(g)),), g) for g in range(model.n_groups)]).tolist()
    s = torch.tensor([guidance.at(model.progress(g)) for g in groups]).view(1, -1, 1, 1)
    u = rows(free)
    return u + s * (rows(c) - u)


def close(have, want, tolerance=1e-5):
    assert have.shape == want.shape
    assert (have - want).abs().max() <= tolerance * want.abs().max()


CACHED = ["llamagen", "llamagen-text", "elm", "elm-text", "var", "var-text"]
CAUSAL = CACHED[:4]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("guidance", [Guidance(), GUIDED, Guidance(scale=2.0, schedule="constant", until=0.5)])
@pytest.mark.parametrize("name", CACHED)
def test_incremental_prediction_is_the_full_forward(name, guidance, cached):
    model = make(name)
    values, cond = drawn(model), condition(model)
    want = full(model, values, cond, guidance)
    events = values.view(B, -1, model.spec.depth)
    state = model.start(cond, guidance, cached=cached)
    for g in range(model.n_groups):
        where = model.where(g)
        close(model.predict(state).logits_BGKV, want[:, where])
        model.commit(state, events[:, where])
    assert torch.equal(model.tokens(state).values, values)
    scales = [guidance.at(model.progress(g)) for g in range(model.n_groups)]
    assert state.calls == model.n_groups
    assert state.rows_computed == B * sum(1 if s == 1 else 2 for s in scales)


@pytest.mark.parametrize("name", CACHED)
def test_cropped_caches_forget(name):
    model = make(name)
    old, new, cond = drawn(model, 3), drawn(model, 4), condition(model)
    state = model.start(cond, GUIDED)
    for g in range(model.n_groups):
        model.predict(state)
        model.commit(state, old.view(B, -1, model.spec.depth)[:, model.where(g)])
    keep = model.n_groups // 2
    model.crop(state, [keep] * B)
    mixed = new.clone()
    for g in range(keep):
        mixed[:, model.where(g)] = old[:, model.where(g)]
    want = full(model, mixed, cond, GUIDED)
    for g in range(keep, model.n_groups):
        close(model.predict(state).logits_BGKV, want[:, model.where(g)])
        model.commit(state, mixed.view(B, -1, model.spec.depth)[:, model.where(g)])
    assert torch.equal(model.tokens(state).values, mixed)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("name", CAUSAL)
def test_many_at_once_with_rows_at_different_lengths(name, cached):
    model = make(name)
    values, cond = drawn(model), condition(model)
    events = values.view(B, -1, model.K)
    want = full(model, values, cond, GUIDED)
    state = model.start(cond, GUIDED, cached=cached)
    for g in range(model.n_groups):
        model.predict(state)
        model.commit(state, events[:, g : g + 1])
    n = [2, 9, 5]
    model.crop(state, n)
    drafts = torch.stack([events[b, m : m + 2] for b, m in enumerate(n)])
    wanted = torch.stack([want[b, m : m + 3] for b, m in enumerate(n)])
    as_list = model.predict_many(state, list(drafts.split(1, 1)))
    close(torch.cat([p.logits_BGKV for p in as_list], 1), wanted)
    as_tensor = model.predict_many(state, drafts)
    close(torch.cat([p.logits_BGKV for p in as_tensor], 1), wanted)


def test_accepted_drafts_are_not_read_again_and_wrong_ones_are():
    model = make("elm")
    values, cond = drawn(model), condition(model)
    events = values.view(B, -1, model.K)
    state = model.start(cond, Guidance())
    model.predict_many(state, events[:, :3])
    for g in range(2):
        model.commit(state, events[:, g : g + 1])
    assert state.cache.lengths == [4, 4, 4]
    other = events[:, 2:3].clone()
    other[1] = (other[1] + 1) % model.V
    model.commit(state, other)
    assert state.cache.lengths == [4, 3, 4]  # row 1 has read an id that was not taken
    values[:, 2] = other[:, 0]
    close(model.predict(state).logits_BGKV, full(model, values, cond, Guidance())[:, 3:4])


def test_complete_rows_wait_for_the_others():
    model = make("llamagen")
    values, cond = drawn(model), condition(model)
    state = model.start(cond, GUIDED)
    for g in range(model.n_groups):
        model.predict(state)
        model.commit(state, values[:, g, None, None])
    model.crop(state, [12, 10, 12])
    want = full(model, values, cond, GUIDED)
    for g in (10, 11):
        close(model.predict(state).logits_BGKV[1], want[1, g : g + 1])
        event = torch.full((B, 1, 1), 7)
        event[1] = values[1, g]
        model.commit(state, event)
    assert torch.equal(model.tokens(state).values, values)
    with pytest.raises(ValueError, match="committed already"):
        model.predict(state)
    with pytest.raises(ValueError, match="committed already"):
        model.commit(state, values[:, :1, None])


def test_var_reads_several_scales_at_once():
    model = make("var")
    values, cond = drawn(model), condition(model)
    want = full(model, values, cond, GUIDED)
    state = model.start(cond, GUIDED)
    model.commit(state, values[:, :1, None])
    dists = model.predict_many(state, [values[:, model.where(g), None] for g in (1, 2)])
    for g, p in zip((1, 2, 3), dists, strict=True):
        close(p.logits_BGKV, want[:, model.where(g)])
    other = drawn(model, 9)  # not the drafts
    for g in range(1, 4):
        model.commit(state, other[:, model.where(g), None])
    other[:, :1] = values[:, :1]
    model.crop(state, [3] * B)
    close(model.predict(state).logits_BGKV, full(model, other, cond, GUIDED)[:, model.where(3)])


@pytest.mark.parametrize("name", [*CACHED, "elm_masked"])
def test_a_stale_distribution_is_refused(name):
    model = make(name)
    state = model.start(condition(model))
    where = model.where(0).expand(B, -1) if model.any_order else None
    dist = model.predict(state, where)
    noise = Noise(torch.arange(B), position=model.where(0))
    event = dist.sample(noise)
    model.commit(state, event, where)
    for stale in (dist, dist.temperature(0.5).top_k(2)):
        with pytest.raises(ValueError, match="older state"):
            stale.sample(noise)
    dist = model.predict(state, None if where is None else where + 1)
    model.crop(state, [0] * B)
    with pytest.raises(ValueError, match="older state"):
        dist.sample(noise)


@pytest.mark.parametrize("name", [*CACHED, "elm_masked"])
def test_misuse_is_refused(name):
    model = make(name)
    state = model.start(condition(model))
    where = model.where(0).expand(B, -1) if model.any_order else None
    with pytest.raises(ValueError, match="shape"):
        model.commit(state, torch.zeros(B, 2, 7, dtype=torch.long), where)
    with pytest.raises(ValueError, match="can't crop"):
        model.crop(state, [1] * B)
    with pytest.raises(ValueError, match="are committed"):
        model.tokens(state)
    text = model.by_text
    with pytest.raises(ValueError, match="by text" if text else "by class"):
        model.start(torch.tensor([0]) if text else Text(torch.zeros(1, 2, 6)))
    with pytest.raises(ValueError, match="captions must be" if text else "labels must be"):
        model.start(Text(torch.zeros(1, 6, 6)) if text else torch.tensor([6]))
    able = "masked" if model.any_order else "ancestral"
    wrong = AncestralSampler() if model.any_order else MaskedSampler()
    with pytest.raises(ValueError, match=f"these can: {able}"):
        wrong.sample(model, condition(model), torch.arange(B))


def test_the_masked_model_takes_no_captions():
    with pytest.raises(ValueError, match="draws by class"):
        ELMMasked(ELMMaskedConfig(condition="text", **SIZES))


@pytest.mark.parametrize("name", ["llamagen-text", "elm-text"])
def test_captions_are_padded_without_effect(name):
    model = make(name)
    ids, cond = drawn(model).view(B, -1, model.K)[:1, :-1], condition(model)
    alone = Text(cond.embeds_BTD[:1, 2:])  # row 0's two embeddings that count
    a = model.logits(ids, model.check_condition(alone))
    b = model.logits(ids, model.check_condition(cond[:1]))
    close(a, b)


# -- losses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CACHED, "elm_masked"])
def test_losses(name):
    model = make(name)
    object.__setattr__(model.config, "label_drop", 0.0)
    noise = Noise(torch.arange(B))
    terms = model.loss(drawn(model), condition(model), noise)
    assert all(v.isfinite() for v in terms.values())
    if not model.any_order:
        want = -full(model, drawn(model), condition(model), Guidance()).log_softmax(-1)
        want = want.gather(-1, drawn(model).view(B, -1, model.spec.depth, 1)).mean()
        assert terms["loss"].item() == pytest.approx(want.item(), rel=1e-5)


@pytest.mark.parametrize("name", [*CACHED, "elm_masked"])
def test_label_dropout(name):
    model = make(name)
    object.__setattr__(model.config, "label_drop", 1.0)
    noise, cond = Noise(torch.arange(B)), condition(model)
    other = Text(cond.embeds_BTD + 1, cond.mask_BT) if isinstance(cond, Text) else (cond + 1) % 5
    assert model.loss(drawn(model), cond, noise)["loss"] == model.loss(drawn(model), other, noise)["loss"]
    object.__setattr__(model.config, "label_drop", 0.0)
    assert model.loss(drawn(model), cond, noise)["loss"] != model.loss(drawn(model), other, noise)["loss"]


@pytest.mark.parametrize("name", [*CACHED, "elm_masked"])
def test_training_learns(name):
    model = make(name)
    torch.manual_seed(0)
    fresh = type(model)(model.config)
    if isinstance(fresh, VAR):
        fresh.codes.load_state_dict(model.codes.state_dict())
    object.__setattr__(fresh.config, "label_drop", 0.0)
    optimiser = torch.optim.AdamW([p for p in fresh.parameters() if p.requires_grad], lr=5e-3)
    values, cond = drawn(fresh), condition(fresh)

    def held():  # the same masks before and after
        noise = Noise(torch.arange(64))
        return fresh.eval().loss(values.repeat(22, *[1] * (values.ndim - 1))[:64], many, noise)["loss"].item()

    many = cond[torch.arange(64) % B]
    first = held()
    fresh.train()
    with torch.enable_grad():
        for step in range(40):
            loss = fresh.loss(values, cond, Noise(torch.arange(B) + B * step))["loss"]
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert first == pytest.approx(math.log(fresh.spec.vocab), rel=0.25)
    # masked places learn slowly: among masks alone, nothing but its edges tells a position where it is
    assert held() < (0.9 if model.any_order else 0.5) * first


# -- the masked model -------------------------------------------------------------------------------------------


def test_masked_drafts_are_rows_of_one_batch():
    model, cond = make("elm_masked"), condition(make("elm_masked"))
    values = drawn(model)
    order = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(b)) for b in range(B)])
    sets = list(order.split([3, 4, 5], 1))
    events = [values.gather(1, w[..., None].expand(-1, -1, 2)) for w in sets]
    state = model.start(cond, GUIDED)
    many = model.predict_many(state, events[:2], sets)
    assert state.calls == 1
    for p, w, e in zip(many, sets, events, strict=True):
        close(p.logits_BGKV, model.predict(state, w).logits_BGKV)
        model.commit(state, e, w)
    assert torch.equal(model.tokens(state).values, values)
    model.crop(state, [3, 7, 0])
    assert [int((row == model.V).all(-1).sum()) for row in state.ids_BLK] == [9, 5, 12]
    with pytest.raises(ValueError, match="twice"):
        model.commit(state, events[0], sets[0])
    with pytest.raises(ValueError, match="sets `where`"):
        model.predict(state)


def test_masked_progress_is_the_cosine_schedule_turned_round():
    model = make("elm_masked")
    assert model.progress(0) == 0
    assert model.progress(12) == 1
    for r in (0.25, 0.5, 0.75):
        masked = 12 * math.cos(math.pi / 2 * r)
        assert model.progress(12 - masked) == pytest.approx(r)


# -- samplers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CACHED)
def test_naive_sampling_gives_the_same_tokens(name):
    model, seeds = make(name), torch.arange(B)
    config = {"temperature": 0.9, "top_k": 6, "top_p": 0.95, "guidance": GUIDED}
    a = AncestralSampler(AncestralConfig(**config)).sample(model, condition(model), seeds)
    b = AncestralSampler(AncestralConfig(**config, naive=True)).sample(model, condition(model), seeds)
    assert torch.equal(a.tokens.values, b.tokens.values)
    assert a.stats.model_calls == b.stats.model_calls == model.n_groups


@pytest.mark.parametrize("name", [*CACHED, "elm_masked"])
def test_an_image_depends_on_its_own_seed_alone(name):
    model = make(name)
    sampler = MaskedSampler(MaskedConfig(steps=5)) if model.any_order else AncestralSampler()
    cond, seeds = condition(model), torch.tensor([5, 6, 7])
    together = sampler.sample(model, cond, seeds).tokens.values
    alone = sampler.sample(model, cond[1:2], seeds[1:2]).tokens.values
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(sampler.sample(model, cond, seeds + 10).tokens.values, together)


def test_temperature_zero_is_greedy():
    model = make("elm")
    out = AncestralSampler(AncestralConfig(temperature=0.0, guidance=GUIDED)).sample(
        model, condition(model), torch.arange(B)
    )
    want = full(model, out.tokens.values, condition(model), GUIDED).argmax(-1)
    assert torch.equal(out.tokens.values, want)


@pytest.mark.parametrize("confidence", ["drawn", "entropy", "random"])
@pytest.mark.parametrize(("steps", "schedule"), [(1, "cosine"), (4, "linear"), (10, "cosine"), (40, "cosine")])
def test_masked_sampler_fills_everything(steps, schedule, confidence):
    model = make("elm_masked")
    sampler = MaskedSampler(MaskedConfig(steps=steps, schedule=schedule, confidence=confidence, guidance=Guidance()))
    out = sampler.sample(model, condition(model), torch.arange(B))
    assert out.stats.model_calls == min(steps, 12)
    assert out.tokens.values.max() < model.V
    left = [12]
    for i in range(steps):
        left.append(sampler.config.masked(i, steps, 12, left[-1]))
    assert left[-1] == 0
    assert all(a > b or a == 0 for a, b in zip(left, left[1:], strict=False))


def test_one_masked_step_is_independent_draws():
    model = make("elm_masked")
    sampler = MaskedSampler(MaskedConfig(steps=1, guidance=Guidance()))
    out = sampler.sample(model, condition(model), torch.arange(B))
    state = model.start(condition(model), Guidance())
    where = torch.arange(12).expand(B, 12)
    want = model.predict(state, where).sample(Noise(torch.arange(B)).at(position=where, step=0))
    assert torch.equal(out.tokens.values, want)


# -- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*CACHED, "elm_masked"])
def test_saved_and_loaded(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path / "m")
    again = from_pretrained(tmp_path / "m")
    assert again.config == model.config
    noise = Noise(torch.arange(B))
    assert (
        again.loss(drawn(model), condition(model), noise)["loss"]
        == model.loss(drawn(model), condition(model), noise)["loss"].item()
    )


def official_gpt(dim=32, layers=2, hidden=256):
    block = {"attention.wqkv": (3 * dim, dim), "attention.wo": (dim, dim)}
    block |= {"feed_forward.w1": (hidden, dim), "feed_forward.w3": (hidden, dim), "feed_forward.w2": (dim, hidden)}
    block |= {"attention_norm": (dim,), "ffn_norm": (dim,)}
    shapes = {f"layers.{i}.{k}.weight": s for i in range(layers) for k, s in block.items()}
    return {k: torch.randn(s) for k, s in (shapes | {"norm.weight": (dim,)}).items()}


def test_text_checkpoints_convert():
    state = official_gpt() | {"tok_embeddings.weight": torch.randn(11, 32), "output.weight": torch.randn(11, 32)}
    state |= {
        "cls_embedding.cap_proj.fc1.weight": torch.randn(32, 6),
        "cls_embedding.uncond_embedding": torch.zeros(5, 6),
    }
    state |= {"cls_embedding.cap_proj.fc2.weight": torch.randn(32, 32)}
    model = convert_llamagen(state, heads=2, grid=(3, 3))
    assert (model.config.condition, model.config.text_length, model.config.text_dim) == ("text", 5, 6)
    assert model.config.hidden == 256
    assert torch.equal(model.gpt.layers[1].mlp.fc1_x.weight, state["layers.1.feed_forward.w3.weight"])
    with pytest.raises(ValueError, match="heads="):
        convert_llamagen(state)
    with pytest.raises(ValueError, match=r"unexpected: freqs\.extra"):
        convert_llamagen(state | {"freqs.extra": torch.zeros(1)}, heads=2)
    del state["layers.0.attention.wo.weight"]
    with pytest.raises(ValueError, match=r"missing: gpt\.layers\.0\.wo\.weight"):
        convert_llamagen(state, heads=2)


@pytest.mark.parametrize("output", ["absent", "tied", "its own"])
def test_masked_checkpoints_convert(output):
    state = official_gpt() | {"cls_embedding.embedding_table.weight": torch.randn(6, 32)}
    state |= {"tok_embedder.weight": torch.randn(9, 32), "pos_embed.weight": torch.randn(25, 32)}
    state |= {"mlm_layer.fc.weight": torch.randn(32, 32), "mlm_layer.fc.bias": torch.randn(32)}
    state |= {"mlm_layer.ln.weight": torch.randn(32), "mlm_layer.ln.bias": torch.randn(32)}
    state |= {"mlm_layer.bias": torch.randn(1, 1, 9)}
    if output != "absent":
        state["output.weight"] = state["tok_embedder.weight"] if output == "tied" else torch.randn(9, 32)
    model = convert_elm(state, heads=2)
    assert isinstance(model, ELMMasked)
    assert (model.config.grid, model.config.bits, model.config.sub_tokens) == ((5, 5), 3, 1)
    assert torch.equal(model.bias[0], state["mlm_layer.bias"][0, 0, :8])


def test_elm_with_one_sub_token_converts():
    state = official_gpt() | {"cls_embedding.embedding_table.weight": torch.randn(6, 32)}
    state |= {"tok_embedder.weight": torch.randn(8, 32), "output.weight": torch.randn(8, 32)}
    model = convert_elm(state, heads=2, grid=(3, 3))
    assert isinstance(model, ELM)
    assert model.spec.shape == (9, 1)
    with pytest.raises(ValueError, match="power of two"):
        convert_elm(state | {"tok_embedder.weight": torch.randn(9, 32)}, heads=2)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("l2", [False, True])
def test_var_checkpoints_convert(shared, l2):
    config = VARConfig(
        scales=(1, 2, 3), vocab=13, code_dim=6, shared_modulation=shared, l2_attention=l2, **(SIZES | {"dim": 128})
    )
    model = randomise(VAR(config))
    back = {"scale": "attn.scale_mul_1H11", "qkv.weight": "attn.mat_qkv.weight", "q_bias": "attn.q_bias"}
    back |= {"v_bias": "attn.v_bias", "ada_offset": "ada_gss", "pos": "pos_1LC", "scale_emb.weight": "lvl_embed.weight"}
    state, vae = {}, {"encoder.conv_in.weight": torch.zeros(1)}
    for name, value in model.state_dict().items():
        block, _, rest = name.rpartition(name.split(".", 2)[2]) if name.startswith("blocks.") else ("", "", name)
        rest = name.removeprefix(block)
        if name.startswith("codes."):
            theirs = name.replace("codes.codebook", "quantize.embedding.weight")
            vae[theirs.replace("codes.phis.", "quantize.quant_resi.qresi_ls.")] = value
            continue
        for ours, theirs in {"proj.": "attn.proj.", "fc": "ffn.fc", "ada_lin.": "ada_lin.1."}.items():
            if block and rest.startswith(ours):
                rest = rest.replace(ours, theirs, 1)
        rest = rest.replace("head_ada_lin.", "head_nm.ada_lin.1.").replace("shared_ada_lin.", "shared_ada_lin.1.")
        rest = back.get(rest, rest)
        shapes = {"attn.scale_mul_1H11": (1, -1, 1, 1), "ada_gss": (1, 1, 6, -1), "pos_1LC": (1, *value.shape)}
        shapes |= {"pos_start": (1, *value.shape)}
        state[block + rest] = value.reshape(shapes.get(rest, value.shape))
    state |= {"lvl_1L": torch.tensor([[0] + [1] * 4 + [2] * 9]), "attn_bias_for_masking": torch.zeros(1, 1, 14, 14)}
    state |= {"blocks.0.attn.zero_k_bias": torch.zeros(128)}
    again = convert_var(state, vae=vae)
    assert again.config == config
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    blind = convert_var(state)
    blind.logits(torch.tensor([0]), torch.zeros(1, 13, 6))
    with pytest.raises(ValueError, match="no codebook"):
        blind.start(torch.tensor([0]))
    del state["lvl_1L"]
    with pytest.raises(ValueError, match="give scales="):
        convert_var(state)


def test_var_adopts_its_tokenizers_codes():
    from tokenizers_img.msvq import MultiScaleQuantiser

    model = VAR(VARConfig(scales=(1, 2, 4), vocab=13, code_dim=6, **SIZES))
    quantiser = randomise(MultiScaleQuantiser(codes=13, dim=6, scales=((1, 1), (2, 2), (4, 4)), phi_ratio=0.3))
    tokenizer = SimpleNamespace(kind="msvq", spec=model.spec, quantiser=quantiser)
    with pytest.raises(ValueError, match="adopt"):
        model.loss(torch.zeros(1, 21, dtype=torch.long), torch.tensor([0]), Noise(torch.arange(1)))
    model.adopt(tokenizer)
    ids = torch.randint(0, 13, (2, 21))
    assert torch.equal(model.inputs(ids), tokenizer.quantiser.next_scale_input(ids))
    assert not any(p.requires_grad for p in model.codes.parameters())
    with pytest.raises(ValueError, match="differ in"):
        VAR(VARConfig(scales=(1, 4), vocab=13, code_dim=6, **SIZES)).adopt(tokenizer)


# -- presets --------------------------------------------------------------------------------------------------------

# millions: the papers' and repositories' own counts, without VAR's codebook and phis
PUBLISHED = {
    "llamagen-b-in256": 111,
    "llamagen-l-in256": 343,
    "llamagen-xl-in256": 775,
    "llamagen-xxl-in256": 1400,
    "llamagen-3b-in256": 3100,
    "elm-l-2-12-in256": 328,
    "elm-xl-2-12-in256": 757,
    "elm-xxl-2-12-in256": 1390,
    "elm-2b-2-12-in256": 1909,
    "var-d16-in256": 310,
    "var-d20-in256": 600,
    "var-d24-in256": 1000,
    "var-d30-in256": 2000,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    from genlab.registry import model_class
    from train.presets import PRESETS

    config = PRESETS[name]()
    with torch.device("meta"):
        model = model_class(config.model.kind)(config.model)
    frozen = sum(p.numel() for p in model.codes.parameters()) if isinstance(model, VAR) else 0
    assert (model.n_params - frozen) / 1e6 == pytest.approx(
        PUBLISHED[name], rel=0.015 if PUBLISHED[name] < 1000 else 0.04
    )


def test_bfloat16_keeps_its_rotary_table():
    model = make("llamagen").to(torch.bfloat16)
    assert model.gpt._rope.dtype == torch.complex64
    state = model.start(torch.tensor([0]), Guidance())
    model.predict(state)
    assert state.cache.k.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("schedule", "middle"),
    [("constant", 1), ("linear", 0.5), ("cosine", 0.5**0.5), ("square", 0.25), ("square_root", 0.5**0.5)],
)
def test_guidance_schedules(schedule, middle):
    guidance = Guidance(scale=5.0, schedule=schedule)
    assert guidance.at(1.0) == pytest.approx(5)
    assert guidance.at(0.5) == pytest.approx(1 + 4 * middle)
    assert Guidance(scale=5.0, schedule=schedule, until=0.4).at(0.5) == 1


def test_log_schedule():
    assert Guidance(scale=5.0, schedule="log").at(0.5) == pytest.approx(1 + 4 * math.log((1 + math.e) / 2))
    assert Guidance(scale=5.0, schedule="log").at(1.0) == pytest.approx(5)


def test_guidance_is_the_published_one_unless_the_config_has_its_own():
    sizes = {"grid": (2, 2), "vocab": 8, "dim": 16, "depth": 1, "heads": 1}
    text = {"condition": "text", "text_dim": 4, "text_length": 2}
    scales = [LlamaGen(LlamaGenConfig(**sizes, **more)).default_guidance.scale for more in ({}, text)]
    assert scales == [2.0, 7.5]
    assert LlamaGen(LlamaGenConfig(**sizes, **text, guidance=1.5)).default_guidance.scale == 1.5
