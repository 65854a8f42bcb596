"""FlexAR's published transformer: the converter against an independent reading of the official names, and drawing."""

import copy

import pytest
import torch
import torch.nn.functional as F
import yaml

from genlab.cli import main
from genlab.convert.flexar import convert_flexar
from genlab.generators.base import Guidance
from genlab.generators.flexar import DecoderConfig, FlexAR, FlexARConfig
from genlab.hub import from_pretrained
from genlab.noise import Noise
from genlab.text import Text
from samplers.ancestral import AncestralConfig, AncestralSampler
from samplers.speculative_jacobi import SpeculativeJacobiConfig, SpeculativeJacobiSampler

D, H, LAYERS, V, N, TEXT, LENGTH = 32, 2, 2, 20, 6, 384, 7
SEEDS = torch.tensor([5, 6, 7])
GELU = {"_target_": "torch.nn.GELU", "_partial_": True}
TANH = GELU | {"approximate": "tanh"}


def official(text, *, bias=False, gated=False, qk_norm=False, head_norm=False, post=True):
    """A checkpoint by the official names, random."""
    g = torch.Generator().manual_seed(0)

    def linear(name, out, into, with_bias=bias):
        state[f"{name}.weight"] = torch.randn(out, into, generator=g) / into**0.5
        if with_bias:
            state[f"{name}.bias"] = torch.randn(out, generator=g)

    def norm(name, dim=D):
        state[f"{name}.weight"] = 1 + torch.randn(dim, generator=g) / 4
        state[f"{name}.bias"] = torch.randn(dim, generator=g) / 4

    image = "models.ar_image_model."
    state = {
        f"{image}preprocessor.embedding.weight": torch.randn(V, D, generator=g),
        f"{image}preprocessor.sos_token_embed": torch.randn(1, 1, D, generator=g),
        f"{image}preprocessor.positional_embedding": torch.randn(N, D, generator=g),
        "models.image_tokenizer.flextok_model.decoder.weight": torch.zeros(3),
    }
    if text:
        linear("models.text_encoder.mlp.fc1", TEXT, TEXT, False)
        linear("models.text_encoder.mlp.fc2", D, TEXT, False)
        state["models.text_encoder.t5_embedder.model.shared.weight"] = torch.zeros(2, 2)
    else:
        state[f"{image}preprocessor.cls_embedding.weight"] = torch.randn(3, D, generator=g)
    for i in range(LAYERS):
        block = f"{image}trunk.blocks.{i}."
        attention = f"{block}{'self_attn' if text else 'attn'}."
        linear(f"{attention}qkv", 3 * D, D)
        linear(f"{attention}proj", D, D)
        attentions = [attention]
        if text:
            attentions.append(f"{block}cross_attn.")
            for part in ("Wq", "Wk", "Wv", "proj"):
                linear(f"{block}cross_attn.{part}", D, D)
        for name in attentions if qk_norm else ():
            norm(f"{name}q_norm", D // H)
            norm(f"{name}k_norm", D // H)
        for j in range(3 if text else 2):
            norm(f"{block}norm_{j + 1}")
        linear(f"{block}mlp.fc1", 2 * D, D)
        linear(f"{block}mlp.fc2", D, 2 * D)
        if gated:
            linear(f"{block}mlp.fc3", 2 * D, D)
    if post:
        norm(f"{image}trunk.post_trunk_norm")
    if head_norm:
        norm(f"{image}head.norm")
    linear(f"{image}head.linear", V, D)
    return state


def settings(text, *, gated=False, qk_norm=False, scale=None, **trunk):
    """Their config.yaml, with references and a sum, as the framework writes them."""
    layer_norm = {"_target_": "torch.nn.LayerNorm", "_partial_": True, "eps": 1e-3}
    own = {
        "_target_": "l3m.model.layers.attention.EfficientAttention", "_partial_": True, "dim": "${constants.dim}",
        "num_heads": "${div_int:${constants.dim},16}", "is_causal": True, "qk_scale": scale,
        "qk_norm": layer_norm if qk_norm else None,
    }  # fmt: skip
    ffn = {"_target_": "hydra.utils.get_class", "path": f"l3m.model.layers.ffn.{'SwiGLUFFN' if gated else 'MLP'}"}
    made = {"embed_dim": "${constants.dim}", "norm_layer": layer_norm, "ffn_target": ffn, "act_layer": TANH}
    made["self_attn_target" if text else "attn_target"] = own
    models = {"ar_image_model": {"preprocessor": {}, "trunk": made | trunk}}
    if text:
        cross = own | {"_target_": "flextok_ar.model.attention.GeneralizedAttentionWithMask"}
        models["ar_image_model"]["trunk"] = {"cross_attn_target": cross} | made | trunk
        embedder = {"hf_hub_path": "minilm", "encoder_seqlen_max": LENGTH}
        models["text_encoder"] = {"t5_embedder": embedder, "mlp": {"act_layer": TANH}}
    return {
        "constants": {"dim": D},
        "model": {"meta_model": {"models": models}},
        "generation": {"cfg_factor": 2.5, "model_type": "ar_text_to_image_model"},
    }


def expected(state, ids, *, label=None, caption=None, qk_norm=False, scale=None):
    """Logits (T + 1, V) of one row's ids, by the official names, head by head."""
    s = {k.removeprefix("models.ar_image_model."): v for k, v in state.items()}
    gated, text = any(".fc3." in k for k in s), caption is not None

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s.get(f"{name}.bias", 0)

    def norm(x, name, eps=1e-3):
        if f"{name}.weight" not in s:
            return x
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        return (x - mean) / (var + eps).sqrt() * s[f"{name}.weight"] + s[f"{name}.bias"]

    def attention(name, q, k, v, causal, factor):
        out = []
        for h in range(H):
            part = slice(h * D // H, (h + 1) * D // H)
            qh, kh = q[:, part], k[:, part]
            if qk_norm:
                qh, kh = norm(qh, f"{name}q_norm"), norm(kh, f"{name}k_norm")
            scores = qh @ kh.T * factor
            if causal:
                scores = scores + torch.full_like(scores, -torch.inf).triu(1)
            out.append(scores.softmax(-1) @ v[:, part])
        return linear(torch.cat(out, -1), f"{name}proj")

    x = torch.cat([s["preprocessor.sos_token_embed"][0], s["preprocessor.embedding.weight"][ids]])
    x = x + s["preprocessor.positional_embedding"][: len(x)]
    if label is not None and label >= 0:
        x = torch.cat([x[:1] + s["preprocessor.cls_embedding.weight"][label], x[1:]])
    if text:
        c = F.gelu(caption @ state["models.text_encoder.mlp.fc1.weight"].T, approximate="tanh")
        c = c @ state["models.text_encoder.mlp.fc2.weight"].T
    for i in range(LAYERS):
        block = f"trunk.blocks.{i}."
        name = f"{block}{'self_attn' if text else 'attn'}."
        q, k, v = linear(norm(x, f"{block}norm_1"), f"{name}qkv").chunk(3, -1)
        x = x + attention(name, q, k, v, True, scale or (D // H) ** -0.5)
        if text:
            name, h = f"{block}cross_attn.", norm(x, f"{block}norm_2")
            q, k, v = linear(h, f"{name}Wq"), linear(c, f"{name}Wk"), linear(c, f"{name}Wv")
            x = x + attention(name, q, k, v, False, (D // H) ** -0.5)
        h = norm(x, f"{block}norm_{3 if text else 2}")
        inner = linear(h, f"{block}mlp.fc1")
        if gated:
            inner = F.silu(inner) * linear(h, f"{block}mlp.fc3")
        else:  # the official decoder trunk forgets act_layer, the encoder trunk doesn't
            inner = F.gelu(inner) if text else F.gelu(inner, approximate="tanh")
        x = x + linear(inner, f"{block}mlp.fc2")
    return linear(norm(norm(x, "trunk.post_trunk_norm"), "head.norm", 1e-5), "head.linear")


def convert(folder, state, said):
    (folder / "config.yaml").write_text(yaml.safe_dump(said))
    return convert_flexar(state, source=folder / "model.safetensors")


def captions():
    torch.manual_seed(1)
    return Text(torch.randn(3, 4, TEXT), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool())


@pytest.mark.parametrize("text", [True, False])
@pytest.mark.parametrize("shape", [{}, {"bias": True, "head_norm": True}, {"gated": True, "post": False}])
@pytest.mark.parametrize("how", [{}, {"qk_norm": True, "scale": 0.4}])
def test_a_converted_model_says_what_the_official_one_does(tmp_path, text, shape, how):
    shape = shape | ({"qk_norm": True} if how else {})
    state = official(text, **shape)
    model = convert(tmp_path, state, settings(text, gated=shape.get("gated", False), **how))
    assert (model.config.heads, model.config.guidance, model.by_text) == (H, 2.5, text)
    ids = torch.randint(0, V, (3, N - 1), generator=torch.Generator().manual_seed(2))
    condition = captions() if text else torch.tensor([0, 2, 3])  # 3: no class
    got = model.logits(ids[..., None], model.check_condition(condition))[:, :, 0]
    for i in range(3):
        if text:
            row = {"caption": condition.embeds_BTD[i][condition.mask_BT[i]]}
        else:
            row = {"label": int(condition[i]) if i < 2 else -1}
        torch.testing.assert_close(got[i], expected(state, ids[i], **row, **how), atol=2e-5, rtol=1e-4)


def tiny(text):
    torch.manual_seed(0)
    sizes = {"grid": (1, N), "vocab": V, "dim": D, "depth": LAYERS, "heads": H, "num_classes": 3}
    sizes |= {"text_dim": TEXT, "text_length": LENGTH}
    how = DecoderConfig(caption_hidden=16)
    model = FlexAR(FlexARConfig(condition="text" if text else "class", decoder=how, **sizes)).eval()
    torch.nn.init.normal_(model.output[0].weight, std=0.5)
    return model


@pytest.mark.parametrize("text", [True, False])
def test_it_draws_with_a_cache_as_without_one(text):
    model, condition = tiny(text), captions() if text else torch.tensor([0, 1, 2])
    ids = torch.randint(0, V, (3, N, 1), generator=torch.Generator().manual_seed(2))
    states = [model.start(condition, Guidance(scale=2.0, schedule="linear"), cached=cached) for cached in (True, False)]
    for i in range(N):
        a, b = (model.predict(state).logits_BGKV for state in states)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        for state in states:
            model.commit(state, ids[:, i : i + 1])
    whole = model.logits(ids[:, :-1], model.check_condition(condition))
    free = model.logits(ids[:, :-1], model.no_condition(model.check_condition(condition)))
    torch.testing.assert_close(a, 2 * whole[:, -1:] - free[:, -1:], atol=1e-4, rtol=1e-4)  # the last: full strength


@pytest.mark.parametrize("text", [True, False])
def test_samplers_draw_it_and_it_stops(text):
    model, condition = tiny(text), captions() if text else torch.tensor([0, 1, 2])
    one, many = (
        SpeculativeJacobiSampler(SpeculativeJacobiConfig(coupling="gumbel", init="random", window=window))
        for window in (1, 4)
    )
    drawn = [sampler.sample(model, condition, SEEDS).tokens.values for sampler in (one, many)]
    assert torch.equal(*drawn)
    sampler = AncestralSampler(AncestralConfig(guidance=Guidance(scale=2.0, schedule="constant")))
    full, short = (sampler.sample(g, condition, SEEDS).tokens for g in (model, model.first(2)))
    assert torch.equal(full.values[:, :2], short.values[:, :2])
    alone = sampler.sample(model, condition[1:2], SEEDS[1:2]).tokens.values
    assert torch.equal(full.values[1:2], alone)  # whatever captions are drawn beside it


@pytest.mark.parametrize("text", [True, False])
def test_a_tree_of_drafts_is_read_as_its_paths(text):
    model, condition = tiny(text), captions() if text else torch.tensor([0, 1, 2])
    ids = torch.randint(0, V, (3, 3, 1), generator=torch.Generator().manual_seed(3))
    parent = torch.tensor([[-1, 0, 0]]).expand(3, -1)
    guidance = Guidance(scale=2.0, schedule="constant")
    cached, plain = model.start(condition, guidance), model.start(condition, guidance, cached=False)
    torch.testing.assert_close(
        model.predict_tree(cached, ids, parent).logits_BGKV,
        model.predict_tree(plain, ids, parent).logits_BGKV,
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("text", [True, False])
def test_it_learns(text):
    model, condition = tiny(text).train(), captions() if text else torch.tensor([0, 1, 2])
    ids = torch.randint(0, V, (3, N), generator=torch.Generator().manual_seed(2))
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        loss = model.loss(ids, condition, Noise(SEEDS + 3 * step))["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
    assert all(p.grad is not None for p in model.parameters())


def test_the_empty_caption_is_read_by_its_encoder(tmp_path):
    model = convert(tmp_path, official(True), settings(True))
    with pytest.raises(ValueError, match="how its text encoder reads"):
        model.start(captions())
    model.start(captions(), Guidance())  # without guidance nothing is missing
    text = model.read_captions(["a red apple"])
    want = model.text_encoder.encode("")
    assert torch.equal(model.cls_embedding.nothing, want)
    assert model.config.decoder.nothing_length == len(want)
    sampler = AncestralSampler()
    drawn = sampler.sample(model, text, SEEDS[:1]).tokens.values
    again = from_pretrained(model.save_pretrained(tmp_path / "saved"))
    assert torch.equal(sampler.sample(again, text, SEEDS[:1]).tokens.values, drawn)


def changed(path, value):
    """Settings of a model by text with one value in another place of the trunk."""
    made = copy.deepcopy(settings(True))
    node = made["model"]["meta_model"]["models"]["ar_image_model"]["trunk"]
    for name in path[:-1]:
        node = node[name]
    node[path[-1]] = value
    return made


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        (("self_attn_target", "_target_"), "mine.LinearAttention", "attention 'LinearAttention'"),
        (("self_attn_target", "is_causal"), False, "isn't causal"),
        (("self_attn_target", "rope_pos_embed"), {"_target_": "x.RoPE"}, "relative positions"),
        (("self_attn_target", "num_kv_heads"), 1, "fewer heads"),
        (("cross_attn_target", "num_heads"), 4, "other heads"),
        (("cross_attn_target", "qk_norm"), {"_target_": "x.RMSNorm"}, "differently"),
        (("norm_layer",), {"_target_": "x.BatchNorm"}, "norm 'BatchNorm'"),
        (("ffn_target",), {"_target_": "x.MoE"}, "MLP 'MoE'"),
        (("block",), {"act_layer": {"_target_": "torch.nn.Tanh"}}, "activation 'tanh'"),
        (("self_attn_target",), None, "nothing of the trunk's self-attention"),
        (("embed_dim",), "${nowhere}", "can't be read"),
    ],
)
def test_settings_that_are_not_known_are_refused(tmp_path, path, value, complaint):
    with pytest.raises(ValueError, match=complaint):
        convert(tmp_path, official(True), changed(path, value))


def test_foreign_weights_are_refused(tmp_path):
    state = official(True)
    state["models.ar_image_model.trunk.blocks.0.gate.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"trunk\.blocks\.0\.gate|layers\.0\.gate"):
        convert(tmp_path, state, settings(True))
    with pytest.raises(ValueError, match="another system's"):
        convert(tmp_path, {"weight": torch.zeros(3)}, settings(True))


def test_nothing_named_in_the_settings_is_run(tmp_path):
    made = settings(False)
    made["model"]["meta_model"]["models"]["evil"] = {"_target_": "pathlib.Path.touch", "_args_": [str(tmp_path / "x")]}
    convert(tmp_path, official(False), made)
    assert not (tmp_path / "x").exists()


def test_the_command(tmp_path, capsys):
    from safetensors.torch import save_file

    source = tmp_path / "model.safetensors"
    save_file({k: v.contiguous() for k, v in official(True).items()}, source)
    words = ["convert", "flexar", str(source), str(tmp_path / "out")]
    assert main(words) != 0
    said = capsys.readouterr().err
    assert said.index("research only") < said.index("no config.yaml beside")
    assert not (tmp_path / "out").exists()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings(True)))
    assert main(words) == 0
    model = from_pretrained(tmp_path / "out")
    assert model.extra["text_encoder"] == "minilm"
    assert "research only" in (tmp_path / "out" / "README.md").read_text()
    ids = AncestralSampler().sample(model, model.read_captions(["red apple"]), SEEDS[:1]).tokens.values
    assert ids.shape == (1, N)
