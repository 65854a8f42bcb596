"""SEED-LLaMA's weights to `SeedLlama`: merged ones in transformers' format, or peft's LoRA over a base LM.

Published: word pieces below 32000, then 8192 codes, `<img>` and `</img>`; the tokenizer's own table, where it is given,
says where they are.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from genlab.config import load_json
from genlab.generators.seed_llama import SeedLlama, SeedLlamaConfig, lm_config
from genlab.hub import load_strict

State = dict[str, torch.Tensor]
_ADAPTED = re.compile(r"\.lora_[AB]\.")
_BUFFER = re.compile(r"\.rotary_emb\.inv_freq$")  # older transformers saved these tables
CODES, SHIFT = 8192, 32000


def convert_seed_llama(
    state: State, *, source: Path | None = None, base: str = "", pieces: str = "", grid: tuple[int, ...] = (32,)
) -> SeedLlama:
    """A `SeedLlama` with these weights.

    Args:
        state: official names and tensors.
        source: the file or folder they came from; its config.json or adapter_config.json is read.
        base: for LoRA: the LM it was trained on, a folder or Hub id of transformers.
        pieces: its tokenizer, a folder or Hub id of transformers; empty: looked for beside the weights.
        grid: places of an image.

    Raises:
        ValueError: for missing or unexpected keys, or where the base or a config is missing.
        FileNotFoundError: if base or tokenizer is not there.
    """
    folder = source if source is None or source.is_dir() else source.parent
    state = {k: v for k, v in state.items() if not _BUFFER.search(k)}
    lora = any(_ADAPTED.search(k) for k in state)
    if lora and not base:
        raise ValueError("these are LoRA adapters: name the LM they were trained on, --base FOLDER-OR-HUB-ID")
    if base and not lora:
        raise ValueError("--base has no effect: these weights are whole, no LoRA adapters")
    table = [v for k, v in state.items() if k.endswith("embed_tokens.weight")]
    if not table:
        raise ValueError(
            f"the checkpoint has no embed_tokens: another system's? It holds {', '.join(list(state)[:5])}, …"
        )
    if folder is None:
        raise ValueError("the config beside the weights is needed: name their file or folder")
    words, ids = read_pieces(pieces or str(folder), required=bool(pieces))
    places = layout(ids, len(table[0]))
    common: dict[str, Any] = {"grid": grid, **places}
    if not lora:
        config = load_config(folder)
        model = SeedLlama(SeedLlamaConfig(lm=lm_config(config), **common))
        load_strict(model, {f"lm.{k}": v for k, v in state.items()}, where=str(source))
    else:
        model = adapt(state, base, folder, common)
    if words:
        model.extra["word_pieces"] = words
    return model.eval()


def adapt(state: State, base: str, folder: Path, common: dict[str, Any]) -> SeedLlama:
    """A base LM under the adapters of `state`."""
    from transformers import AutoModelForCausalLM

    try:
        lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"no causal LM at {base!r} ({str(error).splitlines()[0]})") from error
    note = folder / "adapter_config.json"
    said = load_json(note) if note.is_file() else {}
    rank = next(v for k, v in state.items() if ".lora_A." in k).shape[0]
    model = SeedLlama(
        SeedLlamaConfig(
            lm=lm_config(lm.config),
            lora_rank=rank,
            lora_alpha=int(said.get("lora_alpha", 2 * rank)),
            lora_dropout=float(said.get("lora_dropout", 0.05)),
            **common,
        ),
        lm,
    )
    whole = model.state_dict()
    learned = {k for k in whole if _ADAPTED.search(k) or ".modules_to_save." in k}
    ours: State = {}
    for key, value in state.items():
        key = key.replace(".modules_to_save.", ".").replace(".default.", ".")
        stem, kind = key.rsplit(".", 1)
        ours[f"lm.{stem}.default.{kind}" if _ADAPTED.search(key) else f"lm.{stem}.modules_to_save.default.{kind}"] = (
            value
        )
    if missing := sorted(learned - ours.keys()):
        raise ValueError(f"the adapters lack {', '.join(missing[:5])} ({len(missing)} in all)")
    load_strict(model, {k: v for k, v in whole.items() if k not in learned} | ours, where="the adapters")
    return model


def load_config(folder: Path) -> Any:
    """The transformers config in a folder.

    Raises:
        ValueError: if there is none.
    """
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: keep transformers' beside the weights")
    return AutoConfig.from_pretrained(folder)


def read_pieces(name: str, *, required: bool) -> tuple[str, dict[str, int]]:
    """Word pieces as the JSON of the library tokenizers, and the ids of the image's words; empty where there are none.

    Raises:
        FileNotFoundError: if they are required and not there.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        words = tokenizer.backend_tokenizer.to_str()
    except (OSError, ValueError, AttributeError, ImportError) as error:
        if required:
            raise FileNotFoundError(f"no tokenizer at {name!r} ({str(error).splitlines()[0]})") from error
        return "", {}
    vocab = tokenizer.get_vocab()
    return words, {w: vocab[w] for w in ("<img>", "</img>", "<img_00000>") if w in vocab}


def layout(ids: dict[str, int], rows: int) -> dict[str, int]:
    """Where words, codes and marks are among so many ids.

    Raises:
        ValueError: if so many ids have no room for them.
    """
    shift = ids.get("<img_00000>", SHIFT if rows > SHIFT + CODES else rows - CODES - 2)
    codes = min(CODES, rows - shift - 2)
    if shift < 1 or codes < 1:
        raise ValueError(f"{rows} ids have no room for words, codes, <img> and </img>: give --pieces, its tokenizer")
    begin = ids.get("<img>", shift + codes)
    return {"text_vocab": shift, "vocab": codes, "begin_image": begin, "end_image": ids.get("</img>", begin + 1)}
