"""Residual quantisation: depths, their order, their training."""

import pytest
import torch
import torch.nn.functional as F

from genlab.hub import from_pretrained
from genlab.noise import Noise
from genlab.tokens import Tokens
from tests.unit.test_tokenizers_discrete import SIZES, pictures
from tokenizers_img.losses import AutoencoderLoss, AutoencoderLossConfig
from tokenizers_img.rvq import RVQ, RVQConfig
from tokenizers_img.usage import codebook_usage
from train.tasks import freeze


def build(**changes):
    torch.manual_seed(0)
    return RVQ(RVQConfig(**{**SIZES, "codes": 16, "depth": 4, "dim": 6, **changes})).eval()


@torch.no_grad()
def started(**changes):
    model = build(shortcut=True, **changes)
    model.before_training(pictures(64))
    return model


@torch.no_grad()
def test_tokens_and_back(tmp_path):
    model = started()
    tokens = model.encode(pictures(3))
    assert tokens.values.shape == (3, 16, 4)
    assert model.spec.describe() == "residual 4x4 raster, 4 x 16 codes"
    torch.testing.assert_close(model.decode(tokens), model.decode(tokens.first_depths(4)))
    model.save_pretrained(tmp_path / "m")
    again = from_pretrained(tmp_path / "m")
    assert torch.equal(again.encode(pictures(3)).values, tokens.values)
    assert torch.equal(again.decode(tokens), model.decode(tokens))


@torch.no_grad()
def test_each_depth_is_the_nearest_code_to_what_is_left():
    model = started()
    z = model.analyse(pictures(2)).flatten(2).mT
    ids, rest = model.encode(pictures(2)).values, z
    for d, codes in enumerate(model.codebooks):
        assert torch.equal(torch.cdist(rest, codes).argmin(-1), ids[..., d])
        rest = rest - codes[ids[..., d]]
    torch.testing.assert_close(model.embed(ids), z - rest)


@pytest.mark.parametrize("shortcut", [True, False])
@torch.no_grad()
def test_encoding_changes_no_weights(shortcut):
    """Nor does it start the codes of an untrained tokenizer, which waits for the pictures it trains on."""
    model = build(shortcut=shortcut)
    before, codes = {k: v.clone() for k, v in model.state_dict().items()}, model.codebooks.clone()
    model.encode(pictures(2))
    model.train().encode(pictures(2))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.before_training(pictures(64))
    assert torch.equal(model.codebooks, codes) != shortcut


@pytest.mark.parametrize("frozen", [True, False])
def test_codes_stay_where_the_encoder_is_frozen(frozen):
    model = started().train()
    freeze(model, ("encoder", "pre", "to_map") if frozen else ("decoder",))
    before, ids = model.codebooks.clone(), model.encode(pictures(4)).values
    outputs, terms = model.reconstruct(pictures(4), Noise(torch.arange(4)))
    (outputs.square().mean() + terms["prior"]).backward()
    assert torch.equal(model.codebooks, before) == frozen
    assert torch.equal(model.encode(pictures(4)).values, ids) or not frozen
    assert (model.decoder.conv_out.weight.grad is not None) == frozen


@torch.no_grad()
def test_rows_keep_their_own_depths_and_every_depth_helps():
    model, x = started(), pictures(16)
    tokens = model.encode(x)
    mixed = model.decode(tokens[:4].first_depths(torch.tensor([1, 2, 3, 4])))
    for row, d in enumerate((1, 2, 3, 4)):
        torch.testing.assert_close(mixed[row], model.decode(tokens[:4].first_depths(d))[row], rtol=1e-5, atol=1e-5)
    errors = [float(F.mse_loss(model.decode(tokens.first_depths(d)), x)) for d in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    deeper = Tokens(tokens.values.clone(), tokens.spec)
    deeper.values[..., 2:] = 0  # what is not kept does not count
    torch.testing.assert_close(model.decode(deeper.first_depths(2)), model.decode(tokens.first_depths(2)))


def test_reconstruct_reaches_every_parameter_and_the_dropped_rows_are_those_of_the_noise():
    model, x = build(depth_drop=0.0), pictures(3)
    recon, terms = model.reconstruct(x, Noise(torch.arange(3)))
    torch.testing.assert_close(recon.clamp(-1, 1), model.decode(model.encode(x)), rtol=1e-4, atol=1e-5)
    (recon.square().mean() + terms["prior"]).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not bool(p.grad.isfinite().all())]
    some = build(depth_drop=1.0)
    assert not torch.allclose(some.reconstruct(x, Noise(torch.arange(3)))[0], recon)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_training_learns_and_keeps_every_depth_in_use(precision):
    model, x = started().train(), pictures(64)
    with torch.no_grad():
        first = F.mse_loss(model.decode(model.encode(x)), x)
    before = model.codebooks.clone()
    criterion = AutoencoderLoss(AutoencoderLossConfig(l1=0.0, l2=4.0, perceptual=0.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(60):
        torch.manual_seed(step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == torch.bfloat16):
            losses = criterion(model, x[(step % 4) * 16 :][:16], Noise(torch.arange(16) + 16 * step), 0)
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert not torch.equal(model.codebooks, before)
    with torch.no_grad():
        tokens = model.eval().encode(x)
        last = F.mse_loss(model.decode(tokens), x)
    assert float(last) < 0.95 * float(first)
    assert codebook_usage([tokens])["usage"] > 0.5


@torch.no_grad()
def test_weights_and_images_of_any_floating_point_type():
    model, x = started(refine=8), pictures(2)
    want = model.encode(x)
    assert torch.equal(model.encode(x.double()).values, want.values)
    model.bfloat16()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert float((model.encode(x.to(dtype)).values == want.values)[..., 0].float().mean()) > 0.5
    assert model.decode(want).dtype == torch.float32


@pytest.mark.parametrize("changes", [{"depth": 0}, {"depth_drop": 1.5}])
def test_odd_sizes_are_refused(changes):
    with pytest.raises(ValueError, match="depth"):
        build(**changes)
