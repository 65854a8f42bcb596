"""Published checkpoints into genlab's: one file a system, each `(state dict) -> model`, every key accounted for."""

from genlab.registry import Registry

CONVERTERS = Registry(
    "system to convert",
    {
        "xar": "genlab.convert.xar:convert_xar",
        "mar": "genlab.convert.mar:convert_mar",
        "llamagen": "genlab.convert.llamagen:convert_llamagen",
        "elm": "genlab.convert.elm:convert_elm",
        "var": "genlab.convert.var:convert_var",
        "kl_vae": "genlab.convert.kl_vae:convert_kl_vae",
        "vq": "genlab.convert.vq:convert_vq",
        "bae": "genlab.convert.bae:convert_bae",
        "msvq": "genlab.convert.msvq:convert_msvq",
        "flextok": "genlab.convert.flextok:convert_flextok",
        "divot": "genlab.convert.divot:convert_divot",
        "divot_lm": "genlab.convert.divot:convert_divot_lm",
        "seed": "genlab.convert.seed:convert_seed",
        "seed_llama": "genlab.convert.seed_llama:convert_seed_llama",
        "flexar": "genlab.convert.flexar:convert_flexar",
        "flextok-vae": "genlab.convert.flextok:convert_flextok_vae",
    },
)
