"""Divot's cases: temporal encoder, spatial-temporal resampler, the de-tokenizer's resampler and U-Net, the mixture."""

from __future__ import annotations

from genlab.convert.divot_keys import resampler, spatial_temporal, video_unet, video_unet_config
from genlab.convert.divot_keys import temporal_encoder as temporal_names
from genlab.convert.keys import count
from genlab.hub import load_strict
from genlab.nn.mixture import mixture_loss, split_mixture
from tokenizers_img.divot_nets import Resampler, SpatialTemporalResampler, TemporalEncoder
from tokenizers_img.video_unet import VideoUNet


def temporal_encoder(config, state, inputs):
    model = TemporalEncoder(
        config["input_dim"],
        config["output_dim"],
        width=config["width"],
        layers=config["layers"],
        heads=config["heads"],
        frames=config["context_length"],
    )
    load_strict(model, temporal_names(state), where="the case")
    return {"out": model.eval()(inputs["features"])}


def spatial_temporal_resampler(config, state, inputs):
    frames, inner = config["num_frames"], state["down_sampler.layers.0.0.to_q.weight"].shape[0]
    dim_head = config.get("dim_head", 64)
    model = SpatialTemporalResampler(
        config["dim"],
        frames=frames,
        places=config["num_queries"] // frames,
        depth=config["transformer_depth"],
        heads=config["num_heads"],
        resampler_depth=config["resampler_depth"],
        resampler_heads=inner // dim_head,
        dim_head=dim_head,
        queries=config["num_queries_down"],
        output_dim=config["dim_down"],
    )
    load_strict(model, spatial_temporal(state), where="the case")
    return {"out": model.eval()(inputs["tokens"])}


def decoder_resampler(config, state, inputs):
    model = Resampler(
        config["embedding_dim"],
        config["output_dim"],
        dim=config["dim"],
        depth=count(state, r"layers\.(\d+)"),
        heads=config["heads"],
        dim_head=config["dim_head"],
        queries=config["num_queries"],
    )
    load_strict(model, resampler(state), where="the case")
    return {"out": model.eval()(inputs["tokens"])}


def unet(config, state, inputs):
    x = inputs["x"]
    c = video_unet_config(state, config["num_head_channels"])
    model = VideoUNet(c, channels=x.shape[1], side=x.shape[-1], context=inputs["context"].shape[-1])
    load_strict(model, video_unet(state), where="the case")
    return {"v": model.eval()(x.transpose(1, 2), inputs["t"], inputs["context"]).transpose(1, 2)}


def gmm(config, state, inputs):
    k = config["components"]
    means, variances, logits = split_mixture(inputs["params"], k)
    loss = mixture_loss(inputs["params"], inputs["target"], k)
    return {"means": means, "variances": variances, "logits": logits, "loss": loss.reshape(1)}
