"""xAR, MAR and ECAR: drawing with caches equals one forward over everything; states, guidance, batches."""

import dataclasses
import math

import pytest
import torch

from genlab.distributions import Chain, Gaussian
from genlab.generators.base import Guidance
from genlab.generators.ecar import ECAR, ECARConfig
from genlab.generators.mar import MAR, MARConfig
from genlab.generators.xar import XAR, XARConfig
from genlab.nn.diffusion_head import TRAIN_STEPS, DiffusionChain, DiffusionHead, process
from genlab.noise import Noise
from genlab.text import Text
from samplers.chain import ChainConfig, ChainSampler, cosine_counts
from samplers.flow import FlowConfig, FlowSampler

ENTITIES = {
    "patch": {"entity": "patch"},
    "cell": {"entity": "cell", "size": 2},
    "subsample": {"entity": "subsample", "size": 2},
    "scale": {"entity": "scale", "scales": (1, 2, 4)},
    "image": {"entity": "image"},
}
SCHEDULES = {
    "constant": Guidance(scale=2.5, schedule="constant"),
    "begins late": Guidance(scale=2.5, schedule="linear"),  # the first group is unguided
    "begins later": None,
    "none": Guidance(scale=1.0),
}


class Later(Guidance):
    """Unguided up to two thirds: the unconditional half of the cache is several groups behind by then."""

    def at(self, r):
        return 2.5 if r > 0.6 else 1.0


SCHEDULES["begins later"] = Later()


def shaken(model, seed=0):
    """Every parameter random: nothing hides behind a zero at the start of training."""
    stream = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=stream) / math.sqrt(max(1, p.shape[-1]) / 8))
    return model.eval()


def xar(entity, **more):
    c = XARConfig(grid=(4, 4), channels=3, num_classes=5, dim=32, encoder_depth=1, decoder_depth=2, heads=4,
                  dropout=0.0, **{**ENTITIES[entity], **more})  # fmt: skip
    return shaken(XAR(c))


def mar(order, seed=0, **more):
    c = MARConfig(grid=(3, 4), channels=3, num_classes=5, order=order, dim=32, encoder_depth=1, decoder_depth=2,
                  heads=4, buffer=3, head_width=24, head_depth=2, head_steps=8, dropout=0.0, **more)  # fmt: skip
    return shaken(MAR(c), seed)


def ecar(**more):
    c = ECARConfig(grid=(8, 8), channels=3, num_classes=5, dim=32, context_depth=2, flow_depth=1,
                   **{"heads": 4, "dropout": 0.0, "sides": (2, 4, 8), "steps": (4, 3, 2), **more})  # fmt: skip
    return shaken(ECAR(c))


TEXT = {"condition": "text", "text_dim": 6, "text_length": 4}


def conditions(model, n):
    """Five classes, or five captions of one to three embeddings, over and over."""
    rows = torch.arange(n) % 5
    if model.config.condition == "class":
        return rows
    embeds = torch.randn(5, 3, 6, generator=torch.Generator().manual_seed(3))
    return Text(embeds[rows], torch.arange(3) < 1 + (rows % 3)[:, None])


def close(a, b, tolerance=1e-5):
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


# -- xAR ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("entity", ENTITIES)
@torch.no_grad()
def test_xar_cached_equals_block_causal_forward(entity, schedule):
    """Every group's velocity, at two times, against one masked forward over clean groups and the noisy one."""
    model, guidance = xar(entity), SCHEDULES[schedule]
    labels = torch.tensor([0, 3, 3])
    clean = torch.randn(3, model.N, 3, dtype=torch.float64)
    state = model.start(labels, guidance)
    for g in range(model.n_groups):
        span = slice(model.ends[g] - model.sizes[g], model.ends[g])
        flow = model.predict(state)
        for t in (1.0, 0.37):
            x = torch.randn(3, model.sizes[g], 3, dtype=torch.float64)
            whole = torch.cat([clean[:, : span.start], x, torch.zeros(3, model.N - span.stop, 3)], 1).float()
            times = torch.zeros(3, model.n_groups)
            times[:, g] = t
            c = model.velocity(whole, labels, times)[:, span].double()
            u = model.velocity(whole, torch.full_like(labels, 5), times)[:, span].double()
            close(flow.velocity(x, t), u + guidance.at(model.progress(g)) * (c - u))
        model.commit(state, clean[:, span])
    assert torch.equal(model.tokens(state).values, model.unpack(clean).float())


def test_xar_computes_no_unconditional_rows_where_unguided():
    model = xar("cell")
    stats = FlowSampler(FlowConfig(steps=3, guidance=Guidance(scale=2.0))).sample(
        model, torch.arange(4), torch.arange(4)
    )
    plain = FlowSampler(FlowConfig(steps=3, guidance=Guidance(scale=1.0))).sample(
        model, torch.arange(4), torch.arange(4)
    )
    assert plain.stats.rows == 4 * 3 * 4
    assert stats.stats.rows == 4 * 3 + 3 * 3 * 8  # the first cell is unguided


@pytest.mark.parametrize("method", ["euler", "heun", "euler-maruyama"])
def test_xar_reads_the_modulation_of_constant_conditions_once_a_draw(method):
    model, calls = xar("cell").eval(), []
    for block in (*model.encoder_blocks, *model.decoder_blocks):
        block.ada_lin.register_forward_hook(lambda *_: calls.append(1))
    FlowSampler(FlowConfig(method=method, steps=5)).sample(model, torch.tensor([0, 1, 1]), torch.arange(3))
    assert len(calls) == len(model.encoder_blocks) + len(model.decoder_blocks)


@pytest.mark.parametrize("make", [lambda: xar("cell"), lambda: xar("scale"), ecar], ids=["cell", "scale", "ecar"])
@torch.no_grad()
def test_flows_crop_and_refuse_stale(make):
    model = make()
    labels = torch.tensor([1, 2])
    noise = Noise(torch.tensor([7, 8]))
    times = [1.0, 0.6, 0.3, 0.0]

    def draw(state, group):
        return model.predict(state).integrate(noise.at(position=model.where(group)), times)

    state = model.start(labels, Guidance(scale=2.0, schedule="constant"))
    events = []
    for g in range(model.n_groups):
        events.append(draw(state, g))
        model.commit(state, events[-1])
    model.crop(state, [1, 1])
    for g in range(1, model.n_groups):
        again = draw(state, g)
        close(again, events[g], 1e-6)
        model.commit(state, events[g])
    with pytest.raises(ValueError, match="committed already"):
        model.predict(state)
    with pytest.raises(ValueError, match="committed already"):
        model.commit(state, events[-1])
    with pytest.raises(ValueError, match="can't crop"):
        model.crop(state, [1, 2])
    model.crop(state, [0, 0])
    flow = model.predict(state)
    with pytest.raises(ValueError, match="shape"):
        model.commit(state, events[1][:, :-1])
    model.commit(state, events[0])
    with pytest.raises(ValueError, match="older state"):
        flow.velocity(events[0], 0.5)
    with pytest.raises(ValueError, match="are committed"):
        model.tokens(state)


# -- every generator, every batch size ----------------------------------------------------------------------

DRAWS = {
    **{f"xar-{e}": (lambda e=e: xar(e), FlowSampler(FlowConfig(steps=3))) for e in ENTITIES},
    "ecar": (ecar, FlowSampler()),
    "ecar-sde": (ecar, FlowSampler(FlowConfig(method="euler-maruyama"))),
    "mar-masked": (lambda: mar("masked"), ChainSampler(ChainConfig(calls=5, temperature=0.9))),
    "mar-raster": (lambda: mar("raster"), ChainSampler(ChainConfig(denoising_steps=6, last_std=0.1))),
    "xar-cell-text": (lambda: xar("cell", **TEXT), FlowSampler(FlowConfig(steps=3))),
    "xar-image-text": (lambda: xar("image", **TEXT), FlowSampler(FlowConfig(steps=3))),
    "ecar-text": (lambda: ecar(**TEXT), FlowSampler()),
    "mar-masked-text": (lambda: mar("masked", condition="text", text_dim=6), ChainSampler(ChainConfig(calls=5))),
    "mar-raster-text": (lambda: mar("raster", condition="text", text_dim=6), ChainSampler(ChainConfig())),
}


@pytest.mark.parametrize("name", DRAWS)
def test_an_image_depends_on_its_seed_not_its_batch(name):
    """Batches of 1, 8 and 32 agree to 1e-4 of the largest magnitude (float32 sums in another order)."""
    make, sampler = DRAWS[name]
    model = make()
    labels, seeds = conditions(model, 32), torch.arange(32) + 100
    whole = sampler.sample(model, labels, seeds, batch_size=32).tokens.values
    assert bool(whole.isfinite().all())
    close(sampler.sample(model, labels, seeds, batch_size=8).tokens.values, whole, 1e-4)
    some = torch.tensor([3, 31])
    close(sampler.sample(model, labels[some], seeds[some], batch_size=1).tokens.values, whole[some], 1e-4)
    assert not torch.allclose(whole[0], whole[5])  # the same class, another seed


@pytest.mark.parametrize("name", DRAWS)
def test_losses_are_finite_and_train(name):
    model = DRAWS[name][0]().train()
    tokens, labels, noise = torch.randn(6, *model.spec.shape), conditions(model, 6), Noise(torch.arange(6) + 1)
    terms = model.loss(tokens, labels, noise)
    assert all(bool(v.isfinite()) for v in terms.values())
    terms["loss"].backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert not unused
    assert torch.equal(model.loss(tokens, labels, noise)["loss"], terms["loss"])


# -- by text ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entity", ENTITIES)
@torch.no_grad()
def test_xar_by_text_cached_equals_block_causal_forward(entity):
    """As by class: the caption is read once, its keys and values stand before all groups."""
    model = xar(entity, **TEXT)
    condition = model.check_condition(conditions(model, 3))
    nothing = model.no_condition(condition)
    clean = torch.randn(3, model.N, 3, dtype=torch.float64)
    state = model.start(condition, Guidance(scale=2.5, schedule="linear" if model.n_groups > 1 else "constant"))
    assert state.calls == 1
    for g in range(model.n_groups):
        span = slice(model.ends[g] - model.sizes[g], model.ends[g])
        x = torch.randn(3, model.sizes[g], 3, dtype=torch.float64)
        whole = torch.cat([clean[:, : span.start], x, torch.zeros(3, model.N - span.stop, 3)], 1).float()
        times = torch.zeros(3, model.n_groups)
        times[:, g] = 0.37
        c, u = (model.velocity(whole, rows, times)[:, span].double() for rows in (condition, nothing))
        flow = model.predict(state)
        for _ in range(2):  # the second evaluation finds the groups before in the cache
            close(flow.velocity(x, 0.37), u + state.guidance.at(model.progress(g)) * (c - u))
        model.commit(state, clean[:, span])
    model.crop(state, [0, 0, 0])
    if state.cache is not None:
        assert min(state.cache.lengths) == model.prefix == 4


@torch.no_grad()
def test_ecar_by_text_cached_equals_one_masked_context():
    model = ecar(**TEXT)
    condition = model.check_condition(conditions(model, 2))
    lines = model.ends_of(torch.randn(2, 64, 3), Noise(torch.tensor([1, 2])))
    state = model.start(condition, Guidance(scale=2.0, schedule="constant"))
    for s, (start, end) in enumerate(lines):
        t, want = 0.5 * (model.begins[s] + model.config.ends[s]), []
        for rows in (condition, model.no_condition(condition)):
            contexts, keep, vectors = model.read_maps([x for _, x in lines[:-1]], rows)
            mods = model.flow_mods(vectors, torch.full((2,), t))
            want.append(model.velocity(start, s, contexts[s], mods, keep).double())
        close(model.predict(state).velocity(start.double(), t), want[1] + 2 * (want[0] - want[1]))
        model.commit(state, end)


BY_TEXT = [name for name in DRAWS if name.endswith("text")]


@pytest.mark.parametrize("name", BY_TEXT)
def test_captions_count_and_their_padding_does_not(name):
    make, sampler = DRAWS[name]
    model = make()
    text, seeds = conditions(model, 4), torch.arange(4)
    draw = lambda text: sampler.sample(model, text, seeds).tokens.values  # noqa: E731
    whole, mask = draw(text), text.mask_BT[..., None]
    close(draw(Text(text.embeds_BTD.masked_fill(~mask, 9.0), text.mask_BT)), whole)
    swapped = draw(Text(text.embeds_BTD.flip(-1), text.mask_BT))
    assert float((swapped - whole).abs().amax((1, 2)).min()) > 1e-3


@pytest.mark.parametrize("name", BY_TEXT)
def test_dropped_captions_teach_no_caption(name):
    """With every caption dropped the loss doesn't know the captions."""
    model = DRAWS[name][0]()
    object.__setattr__(model, "config", dataclasses.replace(model.config, label_drop=1.0))
    tokens, noise, text = torch.randn(2, *model.spec.shape), Noise(torch.arange(2)), conditions(model, 2)
    other = Text(text.embeds_BTD.flip(0), text.mask_BT.flip(0))
    assert torch.equal(model.loss(tokens, text, noise)["loss"], model.loss(tokens, other, noise)["loss"])


def test_conditions_of_the_other_kind_are_refused():
    text = Text(torch.randn(1, 3, 6))
    with pytest.raises(ValueError, match="draws by class"):
        xar("cell").start(text)
    with pytest.raises(ValueError, match="draws by text"):
        ecar(**TEXT).start(torch.tensor([0]))
    with pytest.raises(ValueError, match="1 to 4 embeddings of 6 channels, got 5 of 6"):
        xar("cell", **TEXT).start(Text(torch.randn(1, 5, 6)))
    with pytest.raises(ValueError, match="got 3 of 7"):
        mar("masked", condition="text", text_dim=6).start(Text(torch.randn(1, 3, 7)))


@torch.no_grad()
def test_clean_context_sees_the_clean_stream():
    """Group by group, it is the block-causal forward over clean groups and a noisy one."""
    for entity in ENTITIES:
        model = xar(entity)
        labels, clean, x = torch.tensor([1, 4]), torch.randn(2, model.N, 3), torch.randn(2, model.N, 3)
        t = torch.rand(2, model.n_groups)
        got = model.velocity_given(clean, torch.zeros_like(t), x, labels, t)
        for g in range(model.n_groups):
            span = slice(model.ends[g] - model.sizes[g], model.ends[g])
            times, whole = torch.zeros_like(t), clean.clone()
            times[:, g], whole[:, span] = t[:, g], x[:, span]
            close(got[:, span], model.velocity(whole, labels, times)[:, span])


# -- the diffusion head -------------------------------------------------------------------------------------


def head(channels=2, condition=5):
    return shaken(DiffusionHead(channels, condition, 16, 2))


@pytest.mark.parametrize("guided", [False, True])
@torch.no_grad()
def test_transitions_take_lead_and_step_axes(guided):
    """One batched call over drafts, steps and rows equals the calls one by one."""
    net, B, G, steps = head(), 3, 4, 7
    z = net.cond_embed(torch.randn(1 + guided, B, G, 5))
    chain = DiffusionChain(net, z, torch.rand(B, G) + 1, steps)
    x = torch.randn(5, steps, B, G, 2, dtype=torch.float64)
    step = torch.arange(steps).expand(5, steps)
    batched = chain.transition(x, step)
    rows = torch.randint(steps, (5, steps, B))
    by_row = chain.transition(x, rows)
    by_position = chain.transition(x, rows[..., None].expand(5, steps, B, G))
    close(by_position.mean, by_row.mean, 1e-6)
    for d in range(5):
        for i in range(steps):
            one = chain.transition(x[d, i], i)
            close(batched.mean[d, i], one.mean, 1e-6)
            close(batched.std[d, i] + 1, one.std + 1, 1e-6)
            for b in range(B):
                close(by_row.mean[d, i, b], chain.transition(x[d, i], int(rows[d, i, b])).mean[b], 1e-6)
    assert bool((batched.std[:, -1] == 0).all())
    assert bool((batched.std[:, :-1] > 0).all())
    with pytest.raises(ValueError, match="don't go with"):
        chain.transition(x, torch.zeros(5, steps, B, G, 2, dtype=torch.long))


@torch.no_grad()
def test_joined_chains_equal_their_parts():
    net = head()
    parts = [DiffusionChain(net, net.cond_embed(torch.randn(2, 3, g, 5)), torch.rand(3, g) + 1, 6) for g in (1, 3)]
    x = torch.randn(3, 4, 2, dtype=torch.float64)
    joined = DiffusionChain.join(parts).transition(x, 2)
    close(joined.mean, torch.cat([parts[0].transition(x[:, :1], 2).mean, parts[1].transition(x[:, 1:], 2).mean], 1))


@torch.no_grad()
def test_chain_transforms():
    net = head()
    chain = DiffusionChain(net, net.cond_embed(torch.randn(1, 2, 3, 5)), torch.ones(2, 3), 5)
    x = torch.randn(2, 3, 2, dtype=torch.float64)
    cold = chain.temperature(0.5).last_std(0.25)
    for i in range(4):
        assert torch.equal(cold.transition(x, i).mean, chain.transition(x, i).mean)
        assert torch.equal(cold.transition(x, i).std, 0.5 * chain.transition(x, i).std)
    assert bool((cold.transition(x, 4).std == 0.25).all())
    noise = Noise(torch.tensor([1, 2]), position=torch.arange(3))
    assert torch.equal(chain.temperature(1.0).sample(noise), chain.sample(noise))
    assert torch.equal(chain.temperature(0.0).path(noise)[0], chain.path(noise)[0])  # the start keeps its noise
    assert chain.respaced(9).steps == 9
    for bad in (lambda: chain.temperature(-1), lambda: chain.last_std(-1), lambda: chain.respaced(1)):
        with pytest.raises(ValueError, match=r"negative|steps"):
            bad()


@pytest.mark.parametrize("n", [2, 25, 250, TRAIN_STEPS])
def test_respaced_process_keeps_the_marginals(n):
    """With the true noise as the guess, one reverse step's mean and posterior variance lead to the next marginal."""
    p, full = process(n, torch.device("cpu")), process(TRAIN_STEPS, torch.device("cpu"))
    assert torch.allclose(p.signal, full.signal[p.t], atol=1e-12)
    assert torch.allclose(p.signal**2 + p.sigma**2, torch.ones(n, dtype=torch.float64))
    assert int(p.t[0]) == 0
    assert int(p.t[-1]) == TRAIN_STEPS - 1
    x0, step = torch.tensor([[0.7]], dtype=torch.float64), n - 1
    # mean of x_{t-1}: linear in x_t, so its expectation and variance follow in closed form
    slope = p.from_xt[step]
    got_mean = p.from_x0[step] * x0 + slope * p.signal[step] * x0
    got_var = slope**2 * p.sigma[step] ** 2 + p.log_posterior[step].exp()
    assert torch.allclose(got_mean, p.signal[step - 1] * x0, atol=1e-9)
    assert torch.allclose(got_var, p.sigma[step - 1] ** 2, atol=1e-9)


def test_head_learns_a_gaussian():
    """Trained for seconds on N(1, 0.5^2), the chain draws it: mean and deviation within a tenth."""
    torch.manual_seed(0)
    net = DiffusionHead(1, 1, 32, 2, clip=4.0)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for i in range(200):
        noise = Noise(torch.tensor([i]))
        x = 1 + 0.5 * noise.at(purpose="data").normal(64, 1).float()
        loss = net.loss(x, torch.zeros(1, 64, 1), noise, 4)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        chain = DiffusionChain(net, net.cond_embed(torch.zeros(1, 1, 2000, 1)), torch.ones(1, 2000), 50)
        x = chain.sample(Noise(torch.tensor([5]), position=torch.arange(2000)))
    assert abs(float(x.mean()) - 1) < 0.1
    assert abs(float(x.std()) - 0.5) < 0.1


# -- MAR ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def raster_conditions(model, tokens, labels):
    """What the causal stack says about every position, from one forward without a cache."""
    T = model.config.buffer + model.L - 1
    x = torch.cat([model.buffer(labels), model.z_proj(tokens[:, :-1])], 1)
    z = model.read(x, slice(0, T), torch.ones(T, T, dtype=torch.bool).tril()[None, None])
    return model.head.cond_embed(z[:, model.config.buffer - 1 :] + model.diffusion_pos)


@torch.no_grad()
def test_mar_raster_cached_equals_one_causal_forward():
    model, labels = mar("raster"), torch.tensor([0, 4])
    tokens = torch.randn(2, model.L, 3)
    c, u = raster_conditions(model, tokens, labels), raster_conditions(model, tokens, torch.full_like(labels, 5))
    state = model.start(labels, Guidance(scale=3.0))
    for i in range(model.L):
        chain = model.predict(state)
        close(chain.embedded_HBGW, torch.stack([c, u])[:, :, i : i + 1])
        assert torch.allclose(chain.scale_BG, torch.tensor(1 + 2 * min(i + 1, model.L - 1) / model.L).double())
        model.commit(state, tokens[:, i : i + 1])
    assert state.calls == model.L
    assert torch.equal(model.tokens(state).values, tokens)


@torch.no_grad()
def test_mar_raster_speculates_over_rows_of_different_lengths():
    """Drafts, crops row by row, accepted drafts that stay cached, complete rows: always the uncached answer."""
    model, labels = mar("raster"), torch.tensor([0, 4, 2])
    tokens = torch.randn(3, model.L, 3)
    c, u = raster_conditions(model, tokens, labels), raster_conditions(model, tokens, torch.full_like(labels, 5))
    whole = torch.stack([c, u])

    def check(chain, at):
        for b, i in enumerate(at):
            if i < model.L:
                close(chain.embedded_HBGW[:, b, 0], whole[:, b, i])

    state, turn = model.start(labels, Guidance(scale=3.0)), 0
    while min(state.n) < model.L:
        K = (0, 3, 2, 3)[turn % 4]
        drafts = []
        for k in range(K):
            good = torch.stack([tokens[b, min(n + k, model.L - 1)] for b, n in enumerate(state.n)])[:, None]
            wrong = torch.tensor([[k > (b + turn) % 3] for b in range(3)])[..., None]
            drafts.append(torch.where(wrong, good + 1, good))
        chains = model.predict_many(state, drafts)
        assert len(chains) == K + 1
        accepted = [min(K, (b + turn) % 3 + 1) for b in range(3)]
        for k, chain in enumerate(chains):
            check(chain, [n + k if k <= a else model.L for n, a in zip(state.n, accepted, strict=True)])
        before = list(state.n)
        index = [[min(n + k, model.L - 1) for k in range(K + 1)] for n in before]
        model.commit(state, torch.stack([tokens[b, i] for b, i in enumerate(index)]))
        model.crop(state, [min(n, m + a + 1) for n, m, a in zip(state.n, before, accepted, strict=True)])
        turn += 1
    assert torch.equal(model.tokens(state).values, tokens)
    assert state.calls == turn


@torch.no_grad()
def test_mar_raster_keeps_accepted_drafts_in_the_cache():
    model, labels = mar("raster"), torch.tensor([1])
    tokens = torch.randn(1, 4, 1, 3)
    state = model.start(labels, Guidance(scale=1.0))
    model.predict_many(state, list(tokens[:, :3].unbind(1)))
    model.commit(state, tokens[0, :3].transpose(0, 1))
    assert state.cache.lengths == [model.config.buffer + 3]
    model.crop(state, [1])
    model.commit(state, tokens[:, 3])
    assert state.cache.lengths == [model.config.buffer + 1]


@torch.no_grad()
def test_mar_masked_sees_what_is_committed_and_nothing_else():
    model, labels = mar("masked"), torch.tensor([0, 4])
    state = model.start(labels, Guidance(scale=1.0))
    order = torch.stack([torch.randperm(model.L) for _ in range(2)])
    tokens = torch.randn(2, model.L, 3)
    take = lambda at: tokens.gather(1, at[..., None].expand(-1, -1, 3))  # noqa: E731
    first, second = order[:, :4], order[:, 4:7]
    model.commit(state, take(first), first)
    got = model.predict(state, second).embedded_HBGW[0]
    buffer = model.buffer(labels)
    z = model.fill(tokens, buffer, first, [4, 4])
    close(got, model.head.cond_embed(z.gather(1, second[..., None].expand(-1, -1, 32))))
    garbage = tokens.scatter(1, order[:, 4:, None].expand(-1, -1, 3), 9.0)
    assert torch.equal(model.fill(garbage, buffer, first, [4, 4]), z)
    with pytest.raises(ValueError, match="committed twice"):
        model.commit(state, take(order[:, 3:5]), order[:, 3:5])
    with pytest.raises(ValueError, match="where"):
        model.predict(state)
    with pytest.raises(ValueError, match="where"):
        model.commit(state, take(second))
    # rows at different lengths: each as if it were alone
    model.crop(state, [1, 4])
    ragged = model.predict(state, second).embedded_HBGW[0]
    alone = model.start(labels[:1], Guidance(scale=1.0))
    model.commit(alone, take(first)[:1, :1], first[:1, :1])
    close(ragged[:1], model.predict(alone, second[:1]).embedded_HBGW[0])
    close(ragged[1:], got[1:])


@torch.no_grad()
def test_mar_masked_drafts_equal_commits_one_by_one():
    model, labels = mar("masked"), torch.tensor([0, 4])
    order = torch.stack([torch.randperm(model.L) for _ in range(2)])
    where = list(order.split([2, 3, 1, 6], 1))
    drafts = [torch.randn(2, w.shape[1], 3) for w in where]
    state = model.start(labels, Guidance(scale=3.0))
    model.commit(state, drafts[0], where[0])
    chains = model.predict_many(state, drafts[1:3], where[1:])
    assert state.n == [2, 2]
    for chain, draft, at in zip(chains, drafts[1:], where[1:], strict=True):
        one = model.predict(state, at)
        close(chain.embedded_HBGW, one.embedded_HBGW)
        assert torch.equal(chain.scale_BG, one.scale_BG)
        model.commit(state, draft, at)
    got = model.tokens(state).values
    for draft, at in zip(drafts, where, strict=True):
        assert torch.equal(got.gather(1, at[..., None].expand(-1, -1, 3)), draft)


def test_mar_guidance_follows_the_known_fraction():
    """As published: 1 + (s - 1) (L - hidden after this call) / L, where at least one counts as hidden."""
    model = mar("masked")
    state = model.start(torch.tensor([1]), Guidance(scale=5.0))
    n = 0
    for G in cosine_counts(model.L, 4):
        where = torch.arange(n, n + G)[None]
        scale = model.predict(state, where).scale_BG
        hidden = max(1, model.L - n - G)
        assert scale.flatten().tolist() == pytest.approx([1 + 4 * (model.L - hidden) / model.L] * G)
        model.commit(state, torch.zeros(1, G, 3), where)
        n += G


@pytest.mark.parametrize(("length", "calls"), [(256, 64), (256, 256), (12, 5), (12, 40), (9, 1)])
def test_cosine_counts(length, calls):
    counts = cosine_counts(length, calls)
    assert sum(counts) == length
    assert min(counts) >= 1
    assert len(counts) <= calls
    for i in range(len(counts) - 1):  # MAR's schedule as its paper's repository states it
        hidden = math.floor(length * math.cos(math.pi / 2 * (i + 1) / calls))
        assert length - sum(counts[: i + 1]) == max(1, min(length - sum(counts[:i]) - 1, hidden))


def test_chain_sampler_refuses_what_it_cant_do():
    with pytest.raises(ValueError, match="flow"):
        ChainSampler().sample(xar("cell"), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="chain"):
        FlowSampler().sample(mar("masked"), torch.tensor([0]), torch.tensor([0]))
    with pytest.raises(ValueError, match="at least one call"):
        cosine_counts(4, 0)
    zero = torch.zeros(1, 1, 1)
    from samplers.chain import prepare

    with pytest.raises(ValueError, match="no other number"):
        prepare(Chain(Gaussian(zero, zero), lambda x, i: Gaussian(x, zero), 3), ChainConfig(denoising_steps=4))


# -- ECAR ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [{"schedule": "linear"}, {"schedule": "constant", "until": 0.4}])
@torch.no_grad()
def test_ecar_cached_equals_one_masked_context(schedule):
    """Also where the first stages go without guidance, or the last ones, whose context then has no unguided rows."""
    model, labels = ecar(), torch.tensor([0, 4])
    noise = Noise(torch.tensor([1, 2]))
    lines = model.ends_of(torch.randn(2, 64, 3), noise)
    maps = [end for _, end in lines[:-1]]
    state = model.start(labels, Guidance(scale=2.0, **schedule))
    for s, (start, end) in enumerate(lines):
        t = 0.5 * (model.begins[s] + model.config.ends[s])
        got = model.predict(state).velocity(start.double(), t)
        want = []
        for rows in (labels, torch.full_like(labels, 5)):
            contexts, _, vectors = model.read_maps(maps, rows)
            mods = model.flow_mods(vectors, torch.full((2,), t))
            want.append(model.velocity(start, s, contexts[s], mods).double())
        close(got, want[1] + state.guidance.at(model.progress(s)) * (want[0] - want[1]))
        model.commit(state, end)


def test_ecar_of_one_stage_is_plain_flow_matching():
    model = ecar(sides=(8,), ends=(0.0,), steps=(4,))
    x, noise = torch.randn(2, 64, 3), Noise(torch.tensor([1, 2]))
    ((start, end),) = model.ends_of(x, noise)
    assert torch.allclose(end, x)
    assert torch.equal(start.double(), noise.at(purpose="noise").normal(64, 3).float().double())
    flow = model.predict(model.start(torch.tensor([0, 1])))
    assert (flow.begin, flow.end, flow.source) == (1.0, 0.0, None)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"sides": (3, 8)}, "multiple"),
        ({"sides": (2, 4)}, "multiple"),
        ({"ends": (0.5, 0.0)}, "stages need"),
        ({"ends": (0.5, 0.2, 0.1)}, "stages need"),
        ({"ends": (0.3, 0.6, 0.0)}, "above"),
        ({"gamma": 1 / 3}, "gamma"),
        ({"heads": 5}, "heads"),
    ],
)
def test_ecar_refuses_stages_that_dont_fit(change, match):
    with pytest.raises(ValueError, match=match):
        ecar(**change)


def test_flow_steps_of_each_group():
    model = ecar()
    labels, seeds = torch.tensor([0]), torch.tensor([0])
    calls = lambda **c: FlowSampler(FlowConfig(**c)).sample(model, labels, seeds).stats.model_calls  # noqa: E731
    assert calls() == 2 + 4 + 3 + 2  # two maps are read
    assert calls(steps=5) == calls(steps=(5,)) == 2 + 15
    assert calls(steps=(1, 2, 6)) == 2 + 9
    assert calls(steps=(1, 2, 6), method="heun") == 2 + 2 + 4 + 11
    with pytest.raises(ValueError, match="names 2 groups"):
        calls(steps=(1, 2))
    with pytest.raises(ValueError, match="at least 1"):
        calls(steps=0)


class Basis:
    """Noise of given values: what stage s draws is `parts[s]`."""

    def __init__(self, parts, stage=0):
        self.parts, self.stage = parts, stage

    def at(self, position=None, step=None, purpose=None):
        return Basis(self.parts, self.stage if step is None else step)

    def normal(self, *shape):
        return self.parts[self.stage].unflatten(-1, (-1, 1))


@torch.no_grad()
@pytest.mark.parametrize(("method", "gamma"), [("heun", None), ("heun", 0.25), ("euler-maruyama", None)])
def test_ecar_with_the_ideal_velocity_draws_the_data(method, gamma):
    """Gaussian data: the ideal velocity is a linear regression, so stages, jumps and samplers are tested without a
    network: what is drawn has the data's covariance."""
    c = ECARConfig(grid=(4, 4), channels=1, num_classes=1, sides=(1, 2, 4), gamma=gamma, dim=8, context_depth=1,
                   flow_depth=1, heads=2)  # fmt: skip
    model = ECAR(c).eval()
    stream = torch.Generator().manual_seed(0)
    factor = torch.randn(16, 16, generator=stream, dtype=torch.float64) / 4 + torch.eye(16) / 2
    sizes = [1, 4, 16]
    # tokens and noises are linear in white coordinates; so are the stages' lines
    white = torch.eye(16 + sum(sizes), dtype=torch.float64)
    parts = list(white[:, 16:].split(sizes, 1))
    lines = [(a[..., 0], b[..., 0]) for a, b in model.ends_of((white[:, :16] @ factor.T)[..., None], Basis(parts))]

    def ideal(s, flow, before):
        start, end = lines[s]

        def velocity(x, t):
            at = end + (t - flow.end) / (flow.begin - flow.end) * (start - end)
            known = torch.cat([at, lines[s - 1][1]], 1) if s else at
            gain = torch.linalg.pinv(known.T @ known, hermitian=True) @ known.T @ (start - end)
            seen = torch.cat([x[..., 0], before[..., 0]], 1) if s else x[..., 0]
            return (seen @ gain / (flow.begin - flow.end))[..., None]

        return dataclasses.replace(flow, velocity=velocity)

    n = 21 if method == "heun" else 3000
    draws = torch.eye(n, dtype=torch.float64) if method == "heun" else None
    state, event = model.start(torch.zeros(n, dtype=torch.long), Guidance()), torch.empty(0)
    seeds, column = Noise(torch.arange(n)), 0
    for s, size in enumerate(sizes):
        flow = ideal(s, model.predict(state), event)
        if draws is not None:  # a response to every unit of noise: the covariance follows exactly
            here = Basis([draws[:, column : column + size]])
            event = flow.integrate(here, torch.linspace(1, 0, 41).tolist(), heun=True)
        else:
            times = [*torch.linspace(1, 0.02, 50).tolist(), 0.0]
            event = flow.chain(times).sample(seeds.at(position=model.where(s)))
        model.commit(state, event)
        column += size
    x = event[..., 0]
    got, want = x.T @ x / (1 if draws is not None else n), factor @ factor.T
    error = float(torch.linalg.matrix_norm(got - want) / torch.linalg.matrix_norm(want))
    assert error < (0.01 if draws is not None else 0.1)


def test_the_guidance_schedule_can_be_chosen_for_a_draw():
    from genlab.commands.sample import SampleConfig, make_sampler
    from genlab.commands.shared import parse

    c = parse(SampleConfig, ["any", "--guidance-schedule", "constant"], prog="genlab sample")
    sampler = make_sampler(xar("cell"), c.sampler, c.set, c.guidance, c.guidance_schedule)
    assert sampler.config.guidance == Guidance(scale=2.7, schedule="constant")
    assert make_sampler(xar("cell"), "", (), 2.0).config.guidance == Guidance(scale=2.0, schedule="linear")
    assert make_sampler(xar("cell"), "").config.guidance is None
