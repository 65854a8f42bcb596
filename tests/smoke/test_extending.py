"""docs/extending.md, followed word for word: its blocks are one file that becomes a command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CHECK = """
import torch
import mine
from genlab.hub import from_pretrained
from genlab.noise import Noise
from samplers import default_sampler
from samplers.speculative_jacobi import SpeculativeJacobiConfig, SpeculativeJacobiSampler

x = torch.rand(2, 3, 64, 64) * 2 - 1
whole = mine.DCT(mine.DCTConfig(keep=8))
assert (whole.decode(whole.encode(x)) - x).abs().max() < 1e-5
smooth = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
few = mine.DCT(mine.DCTConfig())
assert (few.decode(few.encode(smooth)) - smooth).abs().max() < 0.02
assert few.encode(x).values.shape == (2, 64, 48)

torch.manual_seed(0)
model = mine.Bigram(mine.BigramConfig(grid=(2, 2), vocab=5, num_classes=2, dim=8)).eval()
model.save_pretrained("bigram")
again = from_pretrained("bigram")
labels, seeds = torch.arange(400) % 3, torch.arange(400)
plain = default_sampler(again).sample(again, labels, seeds)
fast = SpeculativeJacobiSampler(SpeculativeJacobiConfig(window=3)).sample(again, labels, seeds, batch_size=400)
assert fast.stats.model_calls < 4 * 400, fast.stats
a, b = (torch.stack([(t == i).float().mean(0) for i in range(5)]) for t in (plain.tokens.values, fast.tokens.values))
assert (a - b).abs().max() < 0.14, (a - b).abs().max()  # 4 standard errors of a difference of two shares of 400
sure = mine.MinPSampler(mine.MinPConfig(min_p=1.0)).sample(again, labels, seeds).tokens.values
assert all(len(sure[labels == c].unique(dim=0)) == 1 for c in range(3))
print("all is well")
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("mine")
    (folder / "mine.py").write_text("\n\n".join(re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)))
    return folder


def run(folder, *words):
    done = subprocess.run([sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_new_parts_do_what_the_page_says(mine):
    (mine / "check.py").write_text(CHECK)
    assert "all is well" in run(mine, "check.py")


def test_its_command_line_knows_them(mine):
    assert "bigram-emoji64" in run(mine, "mine.py", "list")
    config = json.loads(run(mine, "mine.py", "train", "bigram-emoji64", "--model.dim", "7", "--print-config"))
    assert config["model"] == {"kind": "bigram", "grid": [16, 16], "vocab": 1024, "num_classes": 10, "dim": 7}
