"""The audit of a model: replays of recorded pairs, two-sample tests, broken controls, what is kept and resumed."""

import pytest
import torch

from eval import audit_model
from eval.audit import AuditConfig, run
from genlab.commands.sample import make_sampler
from genlab.generators.llamagen import LlamaGen, LlamaGenConfig
from genlab.generators.mar import MAR, MARConfig
from genlab.hub import save_pretrained
from samplers.base import Sampler
from tests.unit.test_generators_discrete import randomise

FEW = {"images": 400, "replays": 4000, "pairs": 2, "batch_size": 400, "classes": "1-2"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    ids = LlamaGenConfig(vocab=11, grid=(2, 3), num_classes=5, dim=32, depth=1, heads=2)
    small = {"dim": 32, "encoder_depth": 1, "decoder_depth": 1, "heads": 2, "buffer": 4, "head_width": 32}
    vectors = MARConfig(grid=(2, 2), channels=3, num_classes=5, order="raster", head_depth=1, head_steps=6, **small)
    for name, model in (("ids", LlamaGen(ids)), ("vectors", MAR(vectors))):
        save_pretrained(randomise(model), folder / name)
    return folder


CASES = [
    ("ids", "speculative-jacobi", ("coupling=maximal", "window=3", "temperature=0.8")),
    ("vectors", "continuous-speculative", ("window=4", "last=spread", "last_std=0.2")),
]


@pytest.mark.parametrize(("model", "sampler", "options"), CASES)
def test_an_exact_sampler_passes_and_a_broken_one_does_not(models, model, sampler, options, capsys, tmp_path):
    config = AuditConfig(target=str(models / model), sampler=sampler, set=options, guidance=1.5, out=tmp_path, **FEW)
    assert run(config, make_sampler) == 0
    told = capsys.readouterr().out
    for word in (
        "false-alarm rate 0.001",
        "would see",
        "energy distance",
        "acceptance broken: caught",
        "residual broken",
    ):
        assert word in told
    for how in ("acceptance", "residual"):
        broken = AuditConfig(**{**vars(config), "broken": how})
        assert run(broken, make_sampler) == 1
        assert "DIFFERS" in capsys.readouterr().out


def test_draws_are_kept_and_others_differ(models, capsys, tmp_path, monkeypatch):
    """Resumed: what is on disk is not drawn again. A sampler at another temperature is another law."""
    config = AuditConfig(target=str(models / "ids"), sampler="ancestral", out=tmp_path, **FEW)
    assert run(config, make_sampler) == 0
    first = capsys.readouterr().out
    files = sorted(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    files[0].unlink()
    drawn = []
    keep = Sampler.sample
    monkeypatch.setattr(Sampler, "sample", lambda *a, **k: drawn.append(1) or keep(*a, **k))
    assert run(config, make_sampler) == 0
    assert len(drawn) == 1
    cut = lambda text: text.split("\n")[:-2]  # noqa: E731  all but the seconds
    assert cut(capsys.readouterr().out) == cut(first)

    cold = make_sampler(None, "ancestral", ("temperature=1.0",))
    monkeypatch.setattr(audit_model, "plain_of", lambda sampler, generator: cold)
    warm = AuditConfig(**{**vars(config), "set": ("temperature=2.0",)})
    assert run(warm, make_sampler) == 1
    assert "DIFFERS" in capsys.readouterr().out


def test_refusals(models):
    ids = str(models / "ids")
    for options, match in (
        ({"target": ids}, "name the sampler"),
        ({"target": ids, "sampler": "ancestral", "broken": "residual"}, "no verifier to break"),
        ({"target": ids, "sampler": "ancestral", "images": 3}, "at least 100"),
        ({"target": ids, "sampler": "ancestral", "classes": "x"}, "class numbers"),
    ):
        with pytest.raises(ValueError, match=match):
            run(AuditConfig(**options), make_sampler)
    with pytest.raises(FileNotFoundError):
        run(AuditConfig(target="no-such-model", sampler="ancestral"), make_sampler)
