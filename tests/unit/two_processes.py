"""What `test_processes` runs as two processes: `torchrun --nproc-per-node 2 tests/unit/two_processes.py FOLDER`.

Trains every run that FOLDER/runs.json lists ([config file, output folder, images to stop after; 0: none]), calls the
commands of FOLDER/commands.json, and caches the tokens that FOLDER/tokens.json asks for ([tokenizer, source of
images]). How many images a process encoded, how many it drew, and which it read for each batch of a run from images
(not from tokens) go to FOLDER/did-RANK.json.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from genlab.cli import main as command
from genlab.commands.models import Line
from genlab.config import load_json
from genlab.data import cache, open_images
from genlab.data.cache import cached_tokens
from genlab.hub import from_pretrained
from train.config import read_config
from train.loop import train
from train.tasks import TokenizerTask, build_task


def train_until(config, out, stop):
    """Train on a CPU; with `stop`, the first process gets a SIGTERM as it loads the batch of that many images.

    Returns the files that were read for each load, by the number of its first image; nothing decoded is kept.
    """
    task = build_task(config)
    load, read, loads = task.load, [], {}
    if type(task) is TokenizerTask:
        decode, task.images._cache_bytes = task.images._decode, 0
        task.images._decode = lambda record: (read.append(record.where), decode(record))[1]

    def interrupted(start, n):
        if 0 < stop <= start and os.environ.get("RANK", "0") == "0":
            os.kill(os.getpid(), signal.SIGTERM)
        before = len(read)
        batch = load(start, n)
        loads[start] = read[before:]
        return batch

    task.load = interrupted
    try:
        train(config, out, device="cpu", task=task)
    except SystemExit as end:
        if not stop or end.code != 143:
            raise
    return loads


def counted(cls, name, rows, counts):
    """Have a method note how many rows a call of it is given."""
    method = getattr(cls, name)

    def noted(self, *args, **options):
        counts.append(len(args[rows]))
        return method(self, *args, **options)

    setattr(cls, name, noted)


def main(folder):
    """Every run in turn."""
    torch.set_num_threads(1)
    read = {}
    for config, out, stop in json.loads((folder / "runs.json").read_text()):
        read[Path(out).name] = train_until(read_config(load_json(config)), Path(out), stop)
    encoded, drawn = [], []
    tokenizer, source = json.loads((folder / "tokens.json").read_text())
    tokenizer, images = from_pretrained(tokenizer), open_images(source, "heldout", 16)
    counted(type(tokenizer), "encode", 0, encoded)
    cache.BATCHES = 1
    cached_tokens(tokenizer, images, flip=True, batch_size=5)
    counted(Line, "draw", 1, drawn)
    for words in json.loads((folder / "commands.json").read_text()):
        assert command(words) == 0, words
    (folder / f"did-{os.environ['RANK']}.json").write_text(
        json.dumps({"encoded": encoded, "drawn": drawn, "read": read})
    )
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
