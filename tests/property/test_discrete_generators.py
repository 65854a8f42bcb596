"""Whatever the history of a state, its predictions are the full forward's; the plain sampler draws what it says."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from genlab.generators.base import Guidance
from genlab.generators.elm import ELM, ELMConfig
from genlab.generators.llamagen import LlamaGen, LlamaGenConfig
from genlab.generators.var import VAR, VARConfig
from samplers.ancestral import AncestralConfig, AncestralSampler

B = 3


def randomise(model, size=1.0):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            fan_in = p[0].numel() if p.ndim > 1 else 4
            p.copy_(size * torch.randn(p.shape, generator=generator) / fan_in**0.5 + (p.ndim == 1))
    return model.eval()


SIZES = {"num_classes": 4, "dim": 16, "depth": 2, "heads": 2}
LM = randomise(ELM(ELMConfig(grid=(2, 4), sub_tokens=2, bits=2, hidden=32, **SIZES)))
NEXT_SCALE = randomise(VAR(VARConfig(scales=(1, 2, 3), vocab=5, code_dim=4, **SIZES)))
LABELS = torch.tensor([0, 3, 1])
GUIDANCE = Guidance(scale=2.5, schedule="linear", until=0.8)

rows = st.lists(st.integers(0, 8), min_size=B, max_size=B)
steps = st.one_of(
    st.tuples(st.just("predict"), st.just(0)),
    st.tuples(st.just("commit"), st.integers(0, 99)),
    st.tuples(st.just("many"), st.integers(1, 5)),
    st.tuples(st.just("accept"), st.integers(1, 4)),
    st.tuples(st.just("crop"), rows),
)


def causal_logits(ids_BLK):
    """Guided logits (B, L, K, V) of the ids, as they stand."""
    free = torch.full_like(LABELS, LM.num_classes)
    s = torch.tensor([GUIDANCE.at(LM.progress(g)) for g in range(LM.n_groups)]).view(1, -1, 1, 1)
    c, u = LM.logits(ids_BLK[:, :-1], LABELS), LM.logits(ids_BLK[:, :-1], free)
    return u + s * (c - u)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, min_size=3, max_size=14), st.booleans())
@torch.no_grad()
def test_a_causal_state_is_its_ids(history, cached):
    L, K, V = LM.n_groups, LM.K, LM.V
    state = LM.start(LABELS, GUIDANCE, cached=cached)
    n, ids = [0] * B, torch.zeros(B, L, K, dtype=torch.long)
    draws = torch.Generator().manual_seed(1)
    for step, value in history:
        if step == "crop":
            n = [min(a, b) for a, b in zip(n, value, strict=True)]
            LM.crop(state, n)
            continue
        if min(n) == L:
            break
        drafts = torch.randint(0, V, (B, value if step in ("many", "accept") else 1, K), generator=draws)
        if step in ("predict", "many", "accept"):
            guess = ids.clone()
            if step != "predict":
                for b in range(B):
                    room = max(0, min(drafts.shape[1], L - n[b]))
                    guess[b, n[b] : n[b] + room] = drafts[b, :room]
            want = causal_logits(guess)
            have = LM.predict_many(state, drafts) if step != "predict" else [LM.predict(state)]
            assert len(have) == (1 if step == "predict" else drafts.shape[1] + 1)
            for i, p in enumerate(have):
                for b in range(B):
                    at = min(n[b] + i, L - 1)
                    if n[b] + i < L:
                        error = (p.logits_BGKV[b, 0] - want[b, at]).abs().max()
                        assert error <= 1e-5 * want.abs().max()
        if step in ("commit", "accept"):
            for event in drafts.split(1, 1):
                if min(n) == L:
                    break
                LM.commit(state, event)
                for b in range(B):
                    if n[b] < L:
                        ids[b, n[b]] = event[b, 0]
                        n[b] += 1
        assert state.n == n
        for b in range(B):
            assert torch.equal(state.ids_BLK[b, : n[b]], ids[b, : n[b]])


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["predict", "commit", "crop"]), st.integers(0, 2)), max_size=12))
@torch.no_grad()
def test_a_next_scale_state_is_its_ids(history):
    state, n = NEXT_SCALE.start(LABELS, GUIDANCE), 0
    ids = torch.zeros(B, 14, dtype=torch.long)
    draws = torch.Generator().manual_seed(1)
    for step, value in history:
        if step == "crop":
            n = min(n, value)
            NEXT_SCALE.crop(state, [n] * B)
        elif n == 3:
            break
        elif step == "commit":
            where = NEXT_SCALE.where(n)
            ids[:, where] = torch.randint(0, 5, (B, len(where)), generator=draws)
            NEXT_SCALE.commit(state, ids[:, where, None])
            n += 1
        else:
            free, x = torch.full_like(LABELS, NEXT_SCALE.num_classes), NEXT_SCALE.inputs(ids)
            s = GUIDANCE.at(NEXT_SCALE.progress(n))
            c, u = NEXT_SCALE.logits(LABELS, x), NEXT_SCALE.logits(free, x)
            want = (u + s * (c - u))[:, NEXT_SCALE.where(n)]
            have = NEXT_SCALE.predict(state).logits_BGKV[:, :, 0]
            assert (have - want).abs().max() <= 1e-5 * want.abs().max()


TINY = randomise(LlamaGen(LlamaGenConfig(grid=(2, 2), vocab=3, hidden=32, **SIZES)))


@torch.no_grad()
def law(label, config):
    """Every sequence of TINY and its probability under a sampler's config, by teacher forcing."""
    ids = torch.tensor(list(itertools.product(range(3), repeat=4)))
    cond = torch.full((81,), label)
    c = TINY.logits(ids[:, :-1, None], cond)
    u = TINY.logits(ids[:, :-1, None], torch.full_like(cond, TINY.num_classes))
    s = torch.tensor([config.guidance.at(TINY.progress(g)) for g in range(4)]).view(1, -1, 1, 1)
    logits = (u + s * (c - u)).double() / config.temperature
    if config.top_k:
        logits = logits.masked_fill(logits < logits.topk(config.top_k, -1).values[..., -1:], -torch.inf)
    each = logits.log_softmax(-1)[:, :, 0].gather(-1, ids[..., None])[..., 0]
    return ids, each.sum(1).exp()


def p_value(config, claimed, n=6_000):
    """Chi-squared test of the sampler's draws against what is claimed of them; rare sequences are merged."""
    out = AncestralSampler(config).sample(TINY, torch.full((n,), 2), torch.arange(n), batch_size=3_000)
    ids, probs = law(2, claimed)
    counts = torch.bincount((out.tokens.values * torch.tensor([27, 9, 3, 1])).sum(1), minlength=81).double()
    expected = probs * n
    rare = expected < 5
    assert bool((counts[probs == 0] == 0).all())
    have = torch.cat([counts[~rare], counts[rare].sum()[None]])
    want = torch.cat([expected[~rare], expected[rare].sum()[None]])
    have, want = have[want > 0], want[want > 0]
    return float(chi2.sf(((have - want) ** 2 / want).sum().item(), len(want) - 1))


@pytest.mark.parametrize("settings_", [{}, {"temperature": 0.7}, {"top_k": 2}])
def test_the_plain_sampler_draws_from_the_models_law(settings_):
    config = AncestralConfig(guidance=Guidance(scale=2.0, schedule="linear"), **settings_)
    assert p_value(config, config) > 1e-4


def test_the_test_can_fail():
    config = AncestralConfig(guidance=Guidance(scale=2.0, schedule="linear"))
    other = AncestralConfig(guidance=Guidance(scale=1.8, schedule="linear"))
    assert p_value(config, other) < 1e-4
