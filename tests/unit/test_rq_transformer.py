"""Autoregression over stacks: cached drawing is the teacher-forced forward, and nothing looks ahead."""

import pytest
import torch

from genlab.generators.base import Guidance
from genlab.generators.elm import ELM, ELMConfig
from genlab.generators.rq_transformer import RQTransformer, RQTransformerConfig
from genlab.noise import Noise
from genlab.tokens import TokenSpec
from samplers.ancestral import AncestralConfig, AncestralSampler
from samplers.speculative_jacobi import SpeculativeJacobiSampler

STYLES = pytest.mark.parametrize("style", ["stack", "flat", "codes"])
L, D, V, C = 6, 3, 11, 5


class Codes:
    """A tokenizer's codebooks."""

    kind, codebooks = "stacks", torch.randn(D, V, C, generator=torch.Generator().manual_seed(2))
    spec = TokenSpec(kind="residual", grid=(2, 3), vocab=V, depth=D)


def build(style, **changes):
    torch.manual_seed(0)
    sizes = {"grid": (2, 3), "vocab": V, "codes_depth": D, "num_classes": 2, "dim": 32, "depth": 2, "heads": 2}
    if style == "codes":  # the stacked kind, which reads the tokenizer's codes
        style, changes = "stack", {"code_dim": C, **changes}
    model = RQTransformer(RQTransformerConfig(style=style, stack_depth=2, **{**sizes, **changes})).eval()
    model.adopt(Codes)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return model.requires_grad_(False)


def ids(B=3):
    return torch.randint(V, (B, L, D), generator=torch.Generator().manual_seed(1))


def forced(model, tokens, labels, state, start=0):
    """Commit `tokens` code by code; the log-probabilities predicted on the way."""
    out = []
    for g in range(start, L * D):
        dist = model.predict(state)
        out.append(dist.logits_BGKV[:, 0, 0])
        model.commit(state, tokens.flatten(1)[:, g, None, None])
    return torch.stack(out, 1)


@STYLES
def test_cached_equals_teacher_forced_also_behind_a_crop(style):
    model, tokens, labels = build(style), ids(), torch.tensor([0, 1, 2])
    whole = model.logits(tokens, labels).flatten(1, 2)
    state = model.start(labels, Guidance(scale=1.0))
    torch.testing.assert_close(forced(model, tokens, labels, state), whole, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.tokens(state).values, tokens)
    for n in (7, 6, 1, 0):
        model.crop(state, [n] * 3)
        torch.testing.assert_close(forced(model, tokens, labels, state, n), whole[:, n:], rtol=1e-5, atol=1e-5)
    model.crop(state, [4] * 3)
    twice = [model.predict(state).logits_BGKV for _ in range(2)]
    torch.testing.assert_close(*twice)


@STYLES
def test_guidance_mixes_the_two_halves(style):
    model, tokens, labels = build(style), ids(), torch.tensor([0, 1, 1])
    cond = model.logits(tokens, labels).flatten(1, 2)
    free = model.logits(tokens, torch.full_like(labels, 2)).flatten(1, 2)
    state = model.start(labels, Guidance(scale=2.0, schedule="constant"))
    torch.testing.assert_close(forced(model, tokens, labels, state), 2 * cond - free, rtol=1e-4, atol=1e-4)
    assert state.rows_computed == 6 * L * D


@STYLES
def test_nothing_looks_ahead(style):
    model, tokens, labels = build(style), ids(1), torch.tensor([0])
    whole = model.logits(tokens, labels).flatten(1, 2)
    for g in (0, 4, 11):
        other = tokens.clone().flatten(1)
        other[:, g] = (other[:, g] + 1) % V
        moved = (model.logits(other.view(1, L, D), labels).flatten(1, 2) - whole).abs().amax((0, 2)) > 0
        assert not moved[: g + 1].any()
        assert moved[g + 1]


@STYLES
def test_it_learns_and_draws_what_it_learned(style):
    torch.manual_seed(0)
    model = RQTransformer(build(style).config).train()
    model.adopt(Codes)
    kinds = ids(2)  # each class is one stack of codes
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(120):
        labels = torch.arange(8) % 2
        loss = model.loss(kinds[labels], labels, Noise(torch.arange(8) + 8 * step))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    out = AncestralSampler().sample(model.eval(), torch.tensor([1, 0]), torch.arange(2))
    assert float((out.tokens.values == kinds[[1, 0]]).float().mean()) > 0.9
    assert out.stats.model_calls == L * D


def test_elm_takes_stacks_too():
    """ELM's parallel heads, one a depth."""
    model = ELM(
        ELMConfig(tokens="residual", grid=(2, 3), sub_tokens=3, bits=4, num_classes=2, dim=32, depth=1, heads=2)
    )
    assert model.spec.describe() == "residual 2x3 raster, 3 x 16 codes"
    out = AncestralSampler().sample(model, torch.tensor([0, 1]), torch.arange(2))
    assert out.tokens.values.shape == (2, 6, 3)
    assert out.stats.model_calls == 6


@STYLES
def test_wrong_events_are_refused(style):
    model = build(style)
    state = model.start(torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="one code a row"):
        model.commit(state, torch.zeros(2, 1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="crop"):
        model.crop(state, [1, 0])
    with pytest.raises(ValueError, match="only 0 of 18"):
        model.tokens(state)


def test_codes_that_are_missing_or_of_another_size_are_named():
    model = RQTransformer(build("codes").config)
    with pytest.raises(ValueError, match="call adopt"):
        model.logits(ids(), torch.tensor([0, 1, 0]))

    class Wide(Codes):
        codebooks = torch.zeros(D, V, C + 1)

    with pytest.raises(ValueError, match=r"set --model\.code-dim 6"):
        model.adopt(Wide)


@STYLES
def test_codes_may_be_given_without_asking_between(style):
    model, tokens, labels = build(style), ids(), torch.tensor([0, 1, 2])
    whole = model.logits(tokens, labels).flatten(1, 2)
    state = model.start(labels, Guidance(scale=1.0))
    model.predict(state)
    for g in range(D + 1):
        model.commit(state, tokens.flatten(1)[:, g, None, None])
    torch.testing.assert_close(model.predict(state).logits_BGKV[:, 0, 0], whole[:, D + 1], rtol=1e-5, atol=1e-5)


@STYLES
def test_the_first_positions_may_be_given_and_an_image_is_seen_as_it_forms(style):
    model, tokens, labels = build(style), ids(), torch.tensor([0, 1, 2])
    known = torch.arange(L).expand(3, L) < 2
    drawn = AncestralSampler().sample(model, labels, torch.arange(3), known=(tokens, known)).tokens.values
    assert torch.equal(drawn[:, :2], tokens[:, :2])
    assert not torch.equal(drawn[:, 2:], tokens[:, 2:])
    state = model.start(labels)
    model.hold(state, tokens, known)
    model.commit(state, tokens[:, 2, 0, None, None])
    seen = model.peek(state).values
    assert torch.equal(seen[:, 2, 0], tokens[:, 2, 0])
    assert not bool(seen[:, 2, 1:].any() or seen[:, 3:].any())


def test_no_speculation_code_by_code():
    c = RQTransformerConfig(grid=(2, 2), vocab=V, codes_depth=1, num_classes=2, dim=32, depth=1, stack_depth=1, heads=2)
    model = RQTransformer(c)
    assert not SpeculativeJacobiSampler.supports(model)
    with pytest.raises(ValueError, match="no way without its cache"):
        AncestralSampler(AncestralConfig(naive=True)).sample(model, torch.tensor([0]), torch.tensor([0]))
