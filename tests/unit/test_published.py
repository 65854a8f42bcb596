"""`genlab list --published`, and converting a published checkpoint by its name."""

import inspect
import json

import pytest
import torch

from genlab.cli import main
from genlab.convert import CONVERTERS
from genlab.convert import published as table
from genlab.convert.llamagen import convert_llamagen
from genlab.generators.llamagen import LlamaGen, LlamaGenConfig
from genlab.hub import from_pretrained

ROWS = table.published()


def test_the_table_is_whole():
    assert {row.system for row in ROWS.values()} == set(CONVERTERS)
    for row in ROWS.values():
        accepted = inspect.signature(CONVERTERS[row.system]).parameters
        assert set(row.options) <= set(accepted), row.name
        assert row.millions > 1, row.name
        assert row.licence
        assert row.paper
        assert not row.vae or ROWS[row.vae].system == "msvq"


def test_list_shows_licences_and_figures(capsys):
    assert main(["list", "--published"]) == 0
    out = capsys.readouterr().out
    for words in ("c2i_B_256", "FID 5.46", "MIT", "hf:FoundationVision/LlamaGen/c2i_B_256.pt", "no commercial use"):
        assert words in out
    assert main(["list", "--published", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(ROWS)
    assert {"name", "system", "source", "licence", "millions", "figures", "paper"} <= set(rows[0])


def official(model):
    """A LlamaGen's weights under the official names."""
    state = {}
    for name, value in model.state_dict().items():
        name = name.replace("gpt.layers.", "layers.").replace("gpt.norm", "norm")
        for ours, theirs in (("wqkv", "attention.wqkv"), ("wo.", "attention.wo."), ("mlp.fc1_g", "feed_forward.w1"),
                             ("mlp.fc1_x", "feed_forward.w3"), ("mlp.fc2", "feed_forward.w2"),
                             ("tok_embeddings.0", "tok_embeddings"), ("output.0", "output")):  # fmt: skip
            name = name.replace(ours, theirs)
        name = name.replace("cls_embedding.fc", "cls_embedding.cap_proj.fc")
        state[name.replace("cls_embedding.uncond", "cls_embedding.uncond_embedding")] = value
    return state


@pytest.fixture
def text_model():
    torch.manual_seed(0)
    return LlamaGen(LlamaGenConfig(
        grid=(4, 4), vocab=11, dim=768, depth=1, heads=12, hidden=8, condition="text", text_dim=6, text_length=5
    ))  # fmt: skip


def test_by_name(tmp_path, text_model, monkeypatch, capsys):
    file = tmp_path / "t2i.pt"
    torch.save({"model": official(text_model)}, file)
    asked = []

    def download(repository, name):
        asked.append((repository, name, capsys.readouterr().err))
        return str(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert main(["convert", "llamagen", "t2i_XL_stage2_512", str(tmp_path / "a")]) == 0
    (repository, name, shown), *rest = asked
    assert (repository, name, rest) == ("peizesun/llamagen_t2i", "t2i_XL_stage2_512.pt", [])
    assert "MIT" in shown  # before the download
    model = from_pretrained(tmp_path / "a")
    assert model.config.grid == (32, 32)  # the table's; no shape tells
    assert model.extra["text_encoder"] == "google/flan-t5-xl"
    assert "MIT" in (tmp_path / "a" / "README.md").read_text()
    words = ["--grid", "4", "4", "--text-encoder", "mine"]
    assert main(["convert", "llamagen", "t2i_XL_stage2_512", str(tmp_path / "b"), *words]) == 0
    assert from_pretrained(tmp_path / "b").config.grid == (4, 4)
    assert from_pretrained(tmp_path / "b").extra["text_encoder"] == "mine"
    again = convert_llamagen(official(text_model), grid=(4, 4))
    for k, v in text_model.state_dict().items():
        assert torch.equal(again.state_dict()[k], v)


def test_refusals(tmp_path, text_model, monkeypatch, capsys):
    def no_network(*_):
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", no_network)
    for words, complaint in (
        (["llamagen", "var_d16"], "genlab convert var var_d16"),
        (["llamagen", "c2i_B_256"], "fetch c2i_B_256.pt by other means"),
        (["mar", "mar_base"], "fetch it by hand"),
        (["llamagen", "c2i_B_256", "--vae", "x.pth"], "--vae has no effect on llamagen"),
    ):
        assert main(["convert", *words[:2], str(tmp_path / "m"), *words[2:]]) != 0
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "m").exists()


def test_var_takes_its_codebook_from_a_file(tmp_path, capsys):
    from genlab.convert.var import convert_var
    from tests.parity.fill import fill
    from tests.unit.test_tokenizers_discrete import official as shapes_of

    vae = shapes_of("var-vq")
    codes = vae["quantize.embedding.weight"]
    state = fill(var_shapes(len(codes), codes.shape[1]), 0)
    torch.save(state, tmp_path / "var.pth")
    torch.save(vae, tmp_path / "vae.pth")
    words = ["--vae", str(tmp_path / "vae.pth"), "--scales", "1", "2", "3"]
    assert main(["convert", "var", str(tmp_path / "var.pth"), str(tmp_path / "m"), *words]) == 0
    model = from_pretrained(tmp_path / "m")
    assert torch.equal(model.codes.codebook, codes)
    want = convert_var(state, vae=vae, scales=(1, 2, 3))
    assert all(torch.equal(v, want.state_dict()[k]) for k, v in model.state_dict().items())


def var_shapes(codes, code_dim, dim=64, length=14, scales=3):
    """Names and shapes of a VAR of one block, as published."""
    block = {
        "attn.scale_mul_1H11": [1, 1, 1, 1], "attn.q_bias": [dim], "attn.v_bias": [dim], "attn.zero_k_bias": [dim],
        "attn.mat_qkv.weight": [3 * dim, dim], "attn.proj.weight": [dim, dim], "attn.proj.bias": [dim],
        "ffn.fc1.weight": [4 * dim, dim], "ffn.fc1.bias": [4 * dim], "ffn.fc2.weight": [dim, 4 * dim],
        "ffn.fc2.bias": [dim], "ada_lin.1.weight": [6 * dim, dim], "ada_lin.1.bias": [6 * dim],
    }  # fmt: skip
    top = {
        "word_embed.weight": [dim, code_dim], "word_embed.bias": [dim], "class_emb.weight": [6, dim],
        "pos_start": [1, 1, dim], "pos_1LC": [1, length, dim], "lvl_embed.weight": [scales, dim],
        "head_nm.ada_lin.1.weight": [2 * dim, dim], "head_nm.ada_lin.1.bias": [2 * dim],
        "head.weight": [codes, dim], "head.bias": [codes],
    }  # fmt: skip
    return top | {f"blocks.0.{k}": v for k, v in block.items()}
