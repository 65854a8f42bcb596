"""SEED's causal Q-Former."""

from __future__ import annotations

from genlab.convert.seed import below, qformer
from genlab.hub import load_strict
from tokenizers_img.qformer import QFormer


def causal_qformer(config, state, inputs):
    queries = inputs["queries"]
    model = QFormer(
        queries=queries.shape[1],
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        hidden=config["intermediate_size"],
        context_dim=config["encoder_width"],
        cross_every=config["cross_attention_freq"],
        causal=queries.shape[1] == 32,  # any other number is not masked in the official code
    ).eval()
    load_strict(model, qformer(below(state, "Qformer."), queries[:1]), where="the recorded case")
    return {"hidden": model(inputs["image_features"], queries)}
