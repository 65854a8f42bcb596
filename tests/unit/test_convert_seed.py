"""Published SEED files: the tokenizer in its variants, SEED-LLaMA merged and as LoRA."""

import json

import pytest
import torch
from safetensors.torch import save_file

from genlab.cli import main
from genlab.convert import seed as keys
from genlab.convert.seed import convert_seed
from genlab.convert.seed_llama import convert_seed_llama, layout
from genlab.generators.seed_llama import SeedLlama, SeedLlamaConfig
from genlab.hub import from_pretrained
from tokenizers_img.seed import SEED, SEEDConfig
from train.documents import learn_pieces

EVA = {"depth": 1, "embed_dim": 88, "num_heads": 1, "mlp_ratio": 2.0, "img_size": 28}
LM = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def tokenizer(**fields):
    torch.manual_seed(0)
    sizes = {"queries": 32, "dim": 64, "depth": 4, "heads": 1, "hidden": 96, "codes": 50, "code_dim": 8, "blocks": 2}
    encoder = {"encoder_args": EVA, "encoder_size": 28, "encoder_dim": 88, "encoder_saved": True}
    model = SEED(
        SEEDConfig(image_size=32, contrastive_dim=0, target_dim=24, stage="codes", **sizes, **encoder, **fields)
    )
    for p in model.parameters():  # zeros and ones would hide what is exchanged
        if p.ndim < 2 or not bool(p.any()):
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def official(model):
    """Its weights under the published names."""
    state = {}
    for name, value in model.state_dict().items():
        top, rest = name.split(".", 1) if "." in name else (name, "")
        if top == "qformer" or (top == "reverse" and model.config.reverse == "qformer"):
            where, tokens = {"qformer": ("Qformer", "query_tokens"), "reverse": ("Reverse_Qformer", "reverse_tokens")}[
                top
            ]
            if rest == "queries":
                state[tokens] = value[None]
            elif rest.startswith("norm."):
                state[f"{where}.bert.embeddings.LayerNorm.{rest[5:]}"] = value
            else:
                _, layer, rest = rest.split(".", 2)
                old, new = next((o, n) for o, n in keys._PARTS.items() if rest.startswith(n))
                state[f"{where}.bert.encoder.layer.{layer}.{old}{rest.removeprefix(new)}"] = value
        elif top in ("blocks", "target_blocks"):
            rest = rest.removeprefix("layers.")
            for old, new in keys._BLOCK.items():
                rest = rest.replace(new, old)
            state[f"{'blocks' if top == 'blocks' else 'blocks_image'}.{rest}"] = value
        elif top.endswith("positions"):
            state["pos_embed" if top == "positions" else "pos_embed_image"] = value[None]
        else:
            old, new = next((o, n) for o, n in keys._TOP.items() if name.startswith(n))
            state[old + name.removeprefix(new)] = value
    return state


@pytest.mark.parametrize("variant", [
    {"reverse": "down"}, {"reverse": "qformer"}, {"reverse": "down", "restores": False},
    {"reverse": "qformer", "target": "sd_text77", "target_tokens": 5},
])  # fmt: skip
def test_the_file_says_its_variant(tmp_path, variant):
    model = tokenizer(**variant)
    state = official(model) | {"Qformer.bert.embeddings.position_ids": torch.arange(3)[None]}
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, tmp_path / "seed_quantizer.pt")
    again = convert_seed(state, image_size=32)
    assert {k: getattr(again.config, k) for k in variant} == variant
    for k, v in model.state_dict().items():
        assert torch.equal(again.state_dict()[k], v), k
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    ids = model.encode(x).values
    assert torch.equal(again.encode(x).values, ids)
    torch.testing.assert_close(again.target(again.codebook[ids]), model.target(model.codebook[ids]))
    if variant["reverse"] == "down" and "restores" not in variant:
        words = ["seed", str(tmp_path / "seed_quantizer.pt"), str(tmp_path / "m"), "--image-size", "32"]
        assert main(["convert", *words]) == 0
        assert from_pretrained(tmp_path / "m").config.codes == 50


def test_foreign_keys_are_refused():
    state = official(tokenizer(reverse="down"))
    with pytest.raises(ValueError, match="unexpected: surprise"):
        convert_seed(state | {"surprise": torch.zeros(1)}, image_size=32)
    with pytest.raises(ValueError, match="missing: "):
        convert_seed({k: v for k, v in state.items() if not k.startswith("encode_task_layer")}, image_size=32)
    with pytest.raises(ValueError, match="neither a second Q-Former"):
        convert_seed({k: v for k, v in state.items() if not k.startswith("image_down")}, image_size=32)


def test_a_checkpoint_of_eva_makes_no_request(tmp_path):
    """The encoder's weights are in the checkpoint: loading it asks no hub."""
    tokenizer(reverse="down").save_pretrained(tmp_path / "m")
    assert from_pretrained(tmp_path / "m").image_encoder().net is not None


# -- the language model -----------------------------------------------------------------------------------------------


@pytest.fixture
def pieces(tmp_path):
    """A folder of word pieces as transformers reads them, the image's words behind them."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer.from_str(learn_pieces(["a red square"], 280))
    words.add_tokens([f"<img_{i:05d}>" for i in range(12)] + ["<img>", "</img>"])
    folder = tmp_path / "pieces"
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder, words.token_to_id("<img_00000>")


def llama(shift, **fields):
    torch.manual_seed(0)
    return SeedLlama(SeedLlamaConfig(grid=(4,), vocab=12, lm=LM, text_vocab=shift, text_length=16, **fields)).eval()


def test_merged_weights(tmp_path, pieces):
    folder, shift = pieces
    model = llama(shift)
    model.lm.save_pretrained(tmp_path / "merged")
    words = ["--pieces", str(folder), "--grid", "4", "4"]
    assert main(["convert", "seed_llama", str(tmp_path / "merged"), str(tmp_path / "m"), *words]) == 0
    again = from_pretrained(tmp_path / "m")
    assert (again.config.text_vocab, again.config.vocab, again.boi, again.eoi) == (shift, 12, shift + 12, shift + 13)
    for k, v in model.state_dict().items():
        assert torch.equal(again.state_dict()[k], v), k
    assert again.pieces.encode("a red square").ids


def test_lora_over_its_base(tmp_path, pieces):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, shift = pieces
    torch.manual_seed(1)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=shift, tie_word_embeddings=False, **{k: v for k, v in LM.items() if k != "model_type"})
    )
    base.save_pretrained(tmp_path / "base")
    model = SeedLlama(llama(shift, lora_rank=4).config, base).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(p, std=0.3)
    model.lm.save_pretrained(tmp_path / "lora")
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["r"] == 4
    words = ["--base", str(tmp_path / "base"), "--pieces", str(folder), "--grid", "4", "4"]
    assert main(["convert", "seed_llama", str(tmp_path / "lora"), str(tmp_path / "m"), *words]) == 0
    again = from_pretrained(tmp_path / "m")
    assert (again.config.lora_rank, again.config.lora_alpha) == (4, 32)
    ids = torch.arange(9)[None] + 60
    assert torch.equal(again.lm(input_ids=ids).logits, model.lm(input_ids=ids).logits)
    assert torch.equal(again.text_log_prob(ids, adapter=False), model.text_log_prob(ids, adapter=False))


def test_refusals(tmp_path, capsys):
    model = llama(300)
    adapters = {f"{k}.lora_A.weight": v.contiguous() for k, v in model.lm.state_dict().items()}
    save_file(adapters, tmp_path / "adapter_model.safetensors")
    assert main(["convert", "seed_llama", str(tmp_path), str(tmp_path / "m")]) == 2
    assert "--base FOLDER-OR-HUB-ID" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main(["convert", "seed_llama", str(tmp_path / "empty"), str(tmp_path / "m")]) == 2
    assert "no weights in" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--base has no effect"):
        convert_seed_llama(model.lm.state_dict(), source=tmp_path, base="x")
    with pytest.raises(ValueError, match="another system's"):
        convert_seed_llama({"x": torch.zeros(1)}, source=tmp_path)


def test_the_published_layout():
    assert layout({}, 40194) == {"text_vocab": 32000, "vocab": 8192, "begin_image": 40192, "end_image": 40193}
