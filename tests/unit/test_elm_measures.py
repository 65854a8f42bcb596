"""The ELM study: n-grams, locality, likelihood bounds, verdicts."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from eval import elm_findings, elm_measures, locality, ngrams
from eval.elm_findings import Difference, Measured, verdict
from eval.elm_study import ElmStudyConfig, rows_of
from genlab.generators.elm import ELM, ELMConfig, ELMMasked, ELMMaskedConfig
from genlab.noise import Noise
from tokenizers_img.vq import VQ, VQConfig

# -- n-grams --------------------------------------------------------------------------------------------------------


def test_ngram_probabilities_sum_to_one():
    rng = np.random.default_rng(0)
    documents = [ngrams.text_document(rng.integers(0, 5, 40).tolist()) for _ in range(4)]
    grams = ngrams.NGrams(documents, vocab=7)
    for context in ((-1, -1), (0, 1), (3, 6), (4, 4)):
        for j in range(3):
            bits = grams.bits([([w], [context]) for w in range(7)], j)
            assert np.exp2(-bits).sum() == pytest.approx(1)


def test_witten_bell_by_hand():
    grams = ngrams.NGrams([ngrams.text_document([0, 1, 0, 0], order=1)], vocab=4)
    # no context: counts 3 and 1, two kinds: (3 + 2/4) / 6; behind 0: once 1 and once 0, two kinds
    plain = (3 + 2 * 0.25) / 6
    assert grams.bits([([0], [(-1,)])], 0)[0] == pytest.approx(-math.log2(plain))
    assert grams.bits([([0], [(0,)])], 1)[0] == pytest.approx(-math.log2((1 + 2 * plain) / 4))
    assert grams.bits([([0], [(3,)])], 1)[0] == pytest.approx(-math.log2(plain))  # an unseen context tells nothing


def test_randomness_of_known_streams():
    rng = np.random.default_rng(0)
    coin = [ngrams.text_document(rng.integers(0, 4, 200).tolist()) for _ in range(20)]
    cycle = [ngrams.text_document([(i + k) % 4 for i in range(200)]) for k in range(20)]
    c, d = (ngrams.randomness(x[:10], x[10:], 4) for x in (coin, cycle))
    for value, error in (c.entropies[0], d.entropies[0]):
        assert value == pytest.approx(2, abs=0.02)
        assert error < 0.02
    assert c.evenness[0] == pytest.approx(1, abs=0.01)
    assert c.kl_uniform[0] == pytest.approx(0, abs=0.02)
    assert c.unpredictable[0] > 0.99
    assert d.unpredictable[0] < 0.05
    with pytest.raises(ValueError, match="no tokens"):
        ngrams.randomness([], coin, 4)


def test_raster_documents_see_left_and_above():
    ids, contexts = ngrams.raster_document(np.arange(6).reshape(2, 3))
    assert ids == list(range(6))
    assert contexts == [(-1, -1), (0, -1), (1, -1), (-1, 0), (3, 1), (4, 2)]
    assert ngrams.without((ids, contexts), 3) == ([0, 1, 2, 4, 5], contexts[:3] + contexts[4:])
    assert [len(x) for x, _ in ngrams.take([(ids, contexts)] * 3, 8)] == [6, 2]


def test_ratio_of_equal_documents_is_a_mean():
    x = np.array([1.0, 2.0, 4.0])
    assert ngrams.ratio(x, np.ones(3)) == pytest.approx((x.mean(), x.std(ddof=1) / 3**0.5))


# -- where models look ------------------------------------------------------------------------------------------------


def small_elm(**changes):
    torch.manual_seed(0)
    sizes = {"grid": (4, 4), "num_classes": 3, "dim": 32, "depth": 2, "heads": 2, "dropout": 0.0} | changes
    model = ELM(ELMConfig(sub_tokens=2, bits=3, **sizes)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def test_attention_layers_are_the_models_own():
    model, read, made = small_elm(), [], []
    for layer in model.gpt.layers:
        layer.wo.register_forward_pre_hook(lambda _, args: read.append(args[0]))
        layer.wqkv.register_forward_hook(lambda _, __, out: made.append(out))
    ids, labels = torch.randint(0, 8, (3, 16, 2)), torch.tensor([0, 1, 2])
    layers = list(locality.attention_layers(model, ids, labels))
    assert len(layers) == 2
    for mass, qkv, h in zip(layers, made, read, strict=True):
        v = qkv.unflatten(-1, (3, 2, -1))[:, :, 2].transpose(1, 2)
        torch.testing.assert_close((mass @ v).transpose(1, 2).flatten(2), h)


def test_even_attention_has_the_uniform_figures():
    model = small_elm()
    for layer in model.gpt.layers:
        torch.nn.init.zeros_(layer.wqkv.weight)
    ids = torch.randint(0, 8, (3, 16, 2))
    for row in locality.attention_locality(model, ids, torch.tensor([0, 1, 2])):
        assert row["distance"][0] == pytest.approx(row["uniform_distance"], rel=1e-4)
        assert row["near"][0] == pytest.approx(row["uniform_near"], rel=1e-4)
        assert row["condition"] == pytest.approx(float((1 / torch.arange(2, 17)).mean()), rel=1e-4)


class Copies:
    """A "model" that expects each place to repeat the place `back` before it, or the first one."""

    config = SimpleNamespace(grid=(8, 8))

    def __init__(self, back):
        self.back = back

    def logits(self, ids_BTK, labels):
        T = ids_BTK.shape[1]
        source = torch.zeros_like(ids_BTK[:, :1]).expand(-1, T + 1, -1).clone()
        for g in range(T + 1):
            at = 0 if self.back is None else g - self.back
            if 0 <= at < T:
                source[:, g] = ids_BTK[:, at]
        return 3.0 * torch.nn.functional.one_hot(source, 5).float()


@pytest.mark.parametrize(("back", "which"), [(1, "near"), (None, "far")])
def test_context_gain_finds_what_is_used(back, which):
    ids = torch.arange(4)[:, None, None].expand(4, 64, 1).clone()  # every image of one id of its own
    gain = locality.context_gain(Copies(back), ids, torch.zeros(4).long(), places=8)
    other = "far" if which == "near" else "near"
    # of these eight places none starts a row, where the place before is far, and one is near the first one
    assert bool((gain[which] > 2).all())
    assert bool((gain[other] == 0).all()) if back == 1 else bool((gain[other] < 1).all())


# -- likelihoods ---------------------------------------------------------------------------------------------------


def test_any_order_bound_of_a_model_without_context():
    model = ELMMasked(ELMMaskedConfig(grid=(4, 4), num_classes=3, dim=32, depth=1, heads=2, sub_tokens=2, bits=3))
    log_p = torch.randn(2, 8).log_softmax(-1)
    counts = []

    def logits(ids, labels, where):
        counts.append((ids[..., 0] == model.V).sum(-1))
        return log_p.expand(*where.shape, 2, 8)

    fake = SimpleNamespace(any_order=True, V=model.V, logits=logits)
    ids = torch.randint(0, 8, (5, 16, 2))
    bits = elm_measures.bits_a_token(fake, ids, torch.zeros(5).long(), torch.arange(5))
    counts = torch.stack(counts)
    assert bool(((counts >= 2 * torch.arange(8)[:, None] + 1) & (counts <= 2 * torch.arange(8)[:, None] + 2)).all())
    want = -(log_p[0].mean() + log_p[1].mean()) / math.log(2)
    many = torch.cartesian_prod(torch.arange(8), torch.arange(8))[None].expand(1, 64, 2)  # every pair once
    fake_all = SimpleNamespace(V=8, logits=lambda ids, y, w: log_p.expand(*w.shape, 2, 8))
    noise = Noise(torch.arange(200))
    bound = elm_measures.any_order_nats(fake_all, many.expand(200, 64, 2), torch.zeros(200), noise).mean() / math.log(2)
    assert float(bound) == pytest.approx(float(want), rel=0.02)
    assert len(bits) == 5


def test_elm_takes_codebook_ids():
    sizes = {"grid": (4, 4), "num_classes": 2, "dim": 16, "depth": 1, "heads": 1, "bits": 4, "tokens": "discrete"}
    vq = VQ(VQConfig(image_size=16, patch=4, channels=(8,), features=8, norm_groups=4, codes=16, attention_levels=()))
    for cls in (ELM, ELMMasked):
        model = cls(cls.Config(sub_tokens=1, **sizes))
        assert model.spec.fits(vq.spec)
        loss = model.loss(torch.randint(0, 16, (2, 16)), torch.tensor([0, 1]), Noise(torch.tensor([1, 2])))["loss"]
        assert bool(loss.isfinite())
        with pytest.raises(ValueError, match="needs sub_tokens 1"):
            cls(cls.Config(sub_tokens=2, **sizes))


# -- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "want"),
    [
        ([(1, 0.1), (2, 0.5)], "confirmed"),
        ([(1, 0.1), (0.5, 0.5)], "not decidable here"),
        ([(1, 0.1), (-1, 0.1)], "not decidable here"),
        ([(-1, 0.1), (0.5, 0.5)], "not confirmed"),
        ([(-1, 0.1)], "not confirmed"),
        ([(0, 0.1)], "not decidable here"),
        ([], "not decidable here"),
    ],
)
def test_verdicts(differences, want):
    assert verdict([Difference("x", v, se) for v, se in differences]) == want


def fake_rows(*trainings):
    rows = {
        name: {"trainings": [{"bits": [b, b + 2], "distance": {"value": d, "se": 0.3}} for b, d in values]}
        for name, values in zip("ab", trainings, strict=True)
    }
    floor = {"distance": {"metric": "fd", "value": 1.0, "se": 0.1}}
    return Measured({"rows": rows, "floors": {"held-out images": floor}})


def test_errors_cover_trainings_where_there_are_several():
    once = fake_rows([(4, 10)], [(5, 12)])
    assert once.distance("a") == (10, 0.3)
    d = once.closer("a", "b")
    assert (d.value, d.se) == (2, pytest.approx(0.3 * 2**0.5))
    assert (once.shorter("a", "b").value, once.shorter("a", "b").se) == (1, 0)
    twice = fake_rows([(4, 10), (4, 12)], [(5, 12), (5, 12)])
    spread = math.sqrt((2 / 11**2 + 0) / 2)
    want = math.hypot(0.3 / 2**0.5, spread * 11 / 2**0.5)
    assert twice.distance("a") == (11, pytest.approx(want))


def test_rows_and_refusals():
    names = [row.name for row in rows_of(ElmStudyConfig())]
    assert names == [
        "ar-bae-1x12", "mlm-bae-1x12", "ar-bae-2x6", "mlm-bae-2x6", "ar-bae-3x4", "mlm-bae-3x4", "ar-vq", "mlm-vq",
        "ar-bae-2x6-xs", "ar-bae-2x6-s", "ar-bae-2x6-l",
    ]  # fmt: skip
    for wrong, message in (
        ({"minutes": 21.0}, "--minutes must lie between"),
        ({"vocabularies": ("1x12", "2x5")}, "of one product"),
        ({"vocabularies": ("twelve",)}, "of one product"),
        ({"sizes": ("xxl",)}, "unknown sizes xxl"),
        ({"n": 2}, "--n must lie"),
    ):
        with pytest.raises(ValueError, match=message):
            ElmStudyConfig(**wrong).checked()
    assert ElmStudyConfig(quick=True).checked().n == 8


def test_pages_need_their_markers(tmp_path):
    with pytest.raises(FileNotFoundError, match="no page"):
        elm_findings.fill_page(tmp_path / "none.md", {})
    (tmp_path / "page.md").write_text("no markers")
    with pytest.raises(ValueError, match="has no lines"):
        elm_findings.fill_page(tmp_path / "page.md", {})
