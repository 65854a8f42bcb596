"""Names to things: the kinds a checkpoint may hold, and the presets a command line may name.

Entries are `module:attribute` strings, so that listing costs no import, and a checkpoint's `kind` reaches
only what stands here or was registered by the user's own code: never a class path out of a file.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterator
from typing import Any


class Registry:
    """A table of names, each a `module:attribute` string or the thing itself."""

    def __init__(self, what: str, entries: dict[str, Any]) -> None:
        """`what` names the table's content in messages, e.g. "sampler"."""
        self.what = what
        self._entries: dict[str, Any] = dict(entries)

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator that adds a thing of the user's own under `name`.

        Raises:
            ValueError: if the name is taken.
        """

        def add(thing: Any) -> Any:
            if name in self._entries:
                raise ValueError(f"{self.what} {name!r} is registered already")
            self._entries[name] = thing
            return thing

        return add

    def __getitem__(self, name: str) -> Any:
        if name not in self._entries:
            close = difflib.get_close_matches(name, self._entries, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, close))}? " if close else ""
            raise ValueError(f"unknown {self.what} {name!r}; {hint}Known: {', '.join(self._entries)}")
        entry = self._entries[name]
        if isinstance(entry, str):
            module, attribute = entry.split(":")
            entry = self._entries[name] = getattr(importlib.import_module(module), attribute)
        return entry

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


TOKENIZERS = Registry(
    "tokenizer",
    {
        "kl_vae": "tokenizers_img.kl_vae:KLVAE",
        "pixels": "tokenizers_img.pixels:Pixels",
        "vq": "tokenizers_img.vq:VQ",
        "bae": "tokenizers_img.bae:BAE",
        "msvq": "tokenizers_img.msvq:MSVQ",
        "rvq": "tokenizers_img.rvq:RVQ",
        "flextok": "tokenizers_img.flextok:FlexTok",
        "seed": "tokenizers_img.seed:SEED",
        "divot": "tokenizers_img.divot:Divot",
    },
)
GENERATORS = Registry(
    "generator",
    {
        "xar": "genlab.generators.xar:XAR",
        "llamagen": "genlab.generators.llamagen:LlamaGen",
        "flexar": "genlab.generators.flexar:FlexAR",
        "elm": "genlab.generators.elm:ELM",
        "elm_masked": "genlab.generators.elm:ELMMasked",
        "var": "genlab.generators.var:VAR",
        "mar": "genlab.generators.mar:MAR",
        "ecar": "genlab.generators.ecar:ECAR",
        "resgen": "genlab.generators.resgen:ResGen",
        "rq_transformer": "genlab.generators.rq_transformer:RQTransformer",
        "ddpm_unet": "genlab.generators.ddpm_unet:DDPMUNet",
        "distilled": "genlab.generators.distilled:Distilled",
        "divot_lm": "genlab.generators.divot_lm:DivotLM",
        "seed_llama": "genlab.generators.seed_llama:SeedLlama",
    },
)
SAMPLERS = Registry(
    "sampler",
    {
        "flow": "samplers.flow:FlowSampler",
        "ancestral": "samplers.ancestral:AncestralSampler",
        "masked": "samplers.masked:MaskedSampler",
        "chain": "samplers.chain:ChainSampler",
        "mixture": "samplers.mixture:MixtureSampler",
        "speculative-jacobi": "samplers.speculative_jacobi:SpeculativeJacobiSampler",
        "speculative-draft": "samplers.speculative_draft:SpeculativeDraftSampler",
        "multi-draft": "samplers.token_tree:MultiDraftSampler",
        "distilled": "samplers.distilled:DistilledSampler",
        "continuous-speculative": "samplers.continuous_speculative:ContinuousSpeculativeSampler",
        "auto": "samplers.auto:AutoSampler",
        "until-settled": "samplers.until_settled:UntilSettledSampler",
    },
)


def model_class(kind: str) -> Any:
    """The class that reads checkpoints of this kind.

    Raises:
        ValueError: for a kind that is not registered.
    """
    for table in (TOKENIZERS, GENERATORS):
        if kind in table:
            return table[kind]
    known = ", ".join([*TOKENIZERS, *GENERATORS])
    raise ValueError(
        f"unknown model kind {kind!r}. Known: {known}. A newer genlab may know it: `pip install -U genlab`"
    )
