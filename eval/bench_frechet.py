"""Measure the Fréchet distance against scipy and torch-fidelity: `python -m eval.bench_frechet --help`.

Baseline and contender run in one call on one machine; the figures are printed as JSON.

    python -m eval.bench_frechet term                   # the trace term at 2048 dimensions
    python -m eval.bench_frechet end-to-end             # 2,000 PNGs against 2,000, random Inception weights
    python -m eval.bench_frechet parity                 # the same, and how far the figures are apart
    python -m eval.bench_frechet memory                 # peak memory for 2,000 and for 20,000 images
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np


def _timed(function: Callable[[], float], repeats: int, clock: Callable[[], float]) -> tuple[float, float]:
    """Value and the best of some times, in seconds."""
    best, value = np.inf, 0.0
    for _ in range(repeats):
        start = clock()
        value = function()
        best = min(best, clock() - start)
    return value, best


def term(dim: int = 2048, repeats: int = 3, cpu_time: bool = False) -> dict[str, Any]:
    """Seconds and errors of the Fréchet term, on full-rank and rank-deficient covariances and few samples.

    Args:
        dim: feature dimension.
        repeats: the best of so many runs counts (scipy's sqrtm runs once).
        cpu_time: count processor time, not the clock on the wall: for a busy machine, with OMP_NUM_THREADS=1.
    """
    import scipy.linalg
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    from .frechet import frechet_distance, frechet_of_features
    from .statistics import Statistics, statistics_of

    rng = np.random.default_rng(0)
    out: dict[str, Any] = {"dim": dim}

    def sample(n: int) -> np.ndarray:
        spectrum = np.arange(1, dim + 1) ** -0.5
        return rng.standard_normal((n, dim)) * spectrum * rng.uniform(0.8, 1.2, dim) + 0.1 * spectrum

    def scipy_way(a: Statistics, b: Statistics) -> float:
        root = scipy.linalg.sqrtm(a.cov_DD @ b.cov_DD)
        delta = a.mean_D - b.mean_D
        return float(delta @ delta + np.trace(a.cov_DD) + np.trace(b.cov_DD) - 2 * np.trace(root).real)

    def fidelity_way(a: Statistics, b: Statistics) -> float:
        one, two = ({"mu": s.mean_D, "sigma": s.cov_DD} for s in (a, b))
        return fid_statistics_to_metric(one, two, False)[KEY_METRIC_FID]

    for name, n, m in (
        ("full_rank", 2 * dim, 2 * dim),
        ("rank_deficient", dim // 2, dim // 2),
        ("unequal", 300, 3 * dim),
    ):
        x, y = sample(n), sample(m)
        a, b = statistics_of(x), statistics_of(y)
        scale = float(np.trace(a.cov_DD) + np.trace(b.cov_DD))
        row: dict[str, Any] = {"n": n, "m": m}
        ways: dict[str, Callable[[], float]] = {
            "scipy_sqrtm": partial(scipy_way, a, b),
            "torch_fidelity": partial(fidelity_way, a, b),
            "statistics": partial(frechet_distance, a, b),
        }
        if n < dim:
            ways["features_and_statistics"] = partial(frechet_of_features, x, b)
            if m < dim:
                ways["features"] = partial(frechet_of_features, x, y)
        values = {}
        for way, function in ways.items():
            values[way], row[f"{way}_s"] = _timed(
                function, 1 if way == "scipy_sqrtm" else repeats, time.process_time if cpu_time else time.perf_counter
            )
        reference = values["features"] if "features" in values else values["statistics"]
        for way, value in values.items():
            row[f"{way}_error"] = abs(value - reference) / scale
        for way in list(ways)[2:]:
            row[f"{way}_times_faster_than_sqrtm"] = row["scipy_sqrtm_s"] / row[f"{way}_s"]
            row[f"{way}_times_faster_than_torch_fidelity"] = row["torch_fidelity_s"] / row[f"{way}_s"]
        out[name] = row
    return out


def random_inception(path: Path) -> Path:
    """Inception with random weights whose activations stay of order one, in torch-fidelity's file form."""
    from unittest import mock

    import torch
    import torch_fidelity.feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    with (
        mock.patch.object(torch.nn.Module, "load_state_dict"),
        mock.patch.object(module, "load_state_dict_from_url", return_value={}),
    ):
        state = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).state_dict()
    for name, value in state.items():
        if name.endswith("conv.weight"):
            value.normal_(0, (2.0 / value[0].numel()) ** 0.5)
        elif name.endswith("bn.bias"):
            value.normal_(0, 0.3)
    torch.save(state, path)
    return path


def _folders(root: Path, sizes: tuple[int, int]) -> tuple[Path, Path]:
    """Two folders of real images: emoji of the training split, as PNG files."""
    from PIL import Image

    from genlab.data import open_images

    images = open_images("emoji", split="train")
    if max(sizes) > len(images) // 2:
        raise ValueError(f"at most {len(images) // 2} images a set, asked for {max(sizes)}")
    paths = []
    for k in range(2):
        folder = root / f"set{k}"
        folder.mkdir()
        for i in range(sizes[k]):
            pixels = images.batch([2 * i + k])[0].permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(folder / f"{i:05d}.png")
        paths.append(folder)
    return paths[0], paths[1]


_OURS = """
import sys, json, eval
out = eval.evaluate(sys.argv[1], sys.argv[2], metrics=json.loads(sys.argv[4]), weights=sys.argv[3])
print(json.dumps({f.name: f.value for f in out.figures}))
"""
_THEIRS = """
import sys, json, torch_fidelity
flags = {"fid": "fid", "kid": "kid", "is": "isc", "precision": "prc"}
wanted = {flags[m]: True for m in json.loads(sys.argv[4]) if m in flags}
import os
sizes = [len(os.listdir(folder)) for folder in sys.argv[1:3]]
out = torch_fidelity.calculate_metrics(
    input1=sys.argv[1], input2=sys.argv[2], feature_extractor="inception-v3-compat",
    feature_extractor_weights_path=sys.argv[3], cuda=False, cache=False, verbose=False,
    kid_subset_size=min(1000, *sizes), **wanted)
print(json.dumps({k: float(v) for k, v in out.items()}))
"""


BOTH = ("fid", "kid", "is", "precision", "recall")
_THEIR_NAMES = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "is": "inception_score_mean",
    "precision": "precision",
    "recall": "recall",
}


def end_to_end(n: int = 2000, reference_n: int = 2000, metrics: tuple[str, ...] = BOTH) -> dict[str, Any]:
    """Seconds (on the wall and of processor time) and figures of both harnesses on two folders of PNGs.

    Imports and start count. On a machine that does other work too, processor time is what to compare.
    """
    with tempfile.TemporaryDirectory() as scratch:
        return _both(Path(scratch), n, reference_n, metrics)


def _both(root: Path, n: int, reference_n: int, metrics: tuple[str, ...]) -> dict[str, Any]:
    out: dict[str, Any] = {"n": n, "reference_n": reference_n, "threads": os.environ.get("OMP_NUM_THREADS", "all")}
    weights = random_inception(root / "inception.pth")
    one, two = _folders(root, (n, reference_n))
    for name, script in (("torch_fidelity", _THEIRS), ("genlab", _OURS)):
        env = {**os.environ, "GENLAB_CACHE": str(root / "cache")}
        start, spent = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", script, str(one), str(two), str(weights), json.dumps(metrics)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name} failed:\n{done.stderr}")
        out[f"{name}_s"] = time.perf_counter() - start
        now = resource.getrusage(resource.RUSAGE_CHILDREN)
        out[f"{name}_cpu_s"] = now.ru_utime + now.ru_stime - spent.ru_utime - spent.ru_stime
        out[name] = json.loads(done.stdout.strip().splitlines()[-1])
        print(json.dumps({name: out[name], "s": out[f"{name}_s"], "cpu_s": out[f"{name}_cpu_s"]}), file=sys.stderr)
    out["times_faster"] = out["torch_fidelity_s"] / out["genlab_s"]
    out["times_less_cpu"] = out["torch_fidelity_cpu_s"] / out["genlab_cpu_s"]
    return out


def parity(n: int = 2000, reference_n: int = 2000) -> dict[str, Any]:
    """How far both harnesses' figures are apart: each from the files on, and on identical features.

    The Fréchet distance's difference is relative to tr C1 + tr C2, that of the Inception score relative to it, that of
    precision and recall absolute; so is KID's from the files on (a small difference of kernel means of order one,
    which rounding of features moves by about 1e-6 at any value), and relative on identical features. `worst` is to
    stay below 1e-5.
    """
    import torch
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    from .features import Inception2015
    from .harness import open_features

    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        out = _both(root, n, reference_n, BOTH)
        network = Inception2015(root / "inception.pth")
        with (
            open_features(root / "set0", network, ("pool", "logits"), cache=root / "cache") as ours,
            open_features(root / "set1", network, ("pool",), cache=root / "cache") as theirs,
        ):
            x, y, logits = (
                torch.from_numpy(np.array(a))
                for a in (ours.features("pool", ""), theirs.features("pool", ""), ours.features("logits", ""))
            )
            scale = float(np.trace(ours.statistics("pool").cov_DD) + np.trace(theirs.statistics("pool").cov_DD))
    statistics = (fid_features_to_statistics(a) for a in (x, y))
    size = min(1000, n, reference_n)
    same = {
        **fid_statistics_to_metric(*statistics, False),
        **kid_features_to_metric(x, y, kid_subset_size=size, verbose=False),
        **isc_features_to_metric(logits),
        **prc_features_to_metric(x, y, verbose=False),
    }
    for title, figures in (("from_files", out["torch_fidelity"]), ("identical_features", same)):
        rows = {}
        for name in BOTH:
            theirs_value = float(figures[_THEIR_NAMES[name]])
            absolute = ("precision", "recall", "kid") if title == "from_files" else ("precision", "recall")
            unit = scale if name == "fid" else 1.0 if name in absolute else abs(theirs_value)
            rows[name] = abs(out["genlab"][name] - theirs_value) / unit
        out[title] = {**rows, "worst": max(rows.values())}
    return {**out, "trace_sum": scale}


_MEMORY = """
import sys, json, resource, numpy as np, torch
torch.set_num_threads(1)
import eval
from eval import harness
from eval.features import EXTRACTORS, Extractor
from eval.sources import GeneratedImages

class Projection(Extractor):  # stands in for a network: memory of the harness, not of the weights, is measured
    name, resize, size, weights_hash = "projection", "torch-bilinear", 64, "0" * 64
    layers = {"pool": 2048}
    def __init__(self, weights=None, device="cpu"):
        self.weight = torch.randn(3 * 64 * 64, 2048, generator=torch.Generator().manual_seed(0)) / 100
    def forward(self, x, layers):
        return {"pool": torch.relu(x.flatten(1) / 127.5 @ self.weight)}

def sample(indices):
    rng = np.random.default_rng(indices[0])
    return torch.from_numpy(rng.integers(0, 256, (len(indices), 3, 64, 64), dtype=np.uint8))

EXTRACTORS["projection"] = Projection
harness.METRICS["fid"] = harness.Metric("frechet", "projection")
harness.METRICS["sfid"] = harness.Metric("frechet", "projection")
n = int(sys.argv[1])
one, two = GeneratedImages(sample, n, f"a{n}", "a"), GeneratedImages(sample, 2000, "b", "b")
result = eval.evaluate(one, two, metrics=("fid",))
print(json.dumps({"n": n, "peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))
"""


def memory(sizes: tuple[int, ...] = (2000, 20000)) -> dict[str, Any]:
    """Peak memory in MB of a Fréchet distance with its interval, 2048 dimensions, a stand-in for the network."""
    rows = []
    for n in sizes:
        with tempfile.TemporaryDirectory() as scratch:
            env = {**os.environ, "GENLAB_CACHE": scratch}
            command = [sys.executable, "-c", _MEMORY, str(n)]
            text = subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout
            rows.append(json.loads(text.strip().splitlines()[-1]))
    return {"runs": rows, "ratio": rows[-1]["peak_MB"] / rows[0]["peak_MB"]}


def main() -> None:
    """Command line."""
    import tyro

    out = tyro.extras.subcommand_cli_from_dict(
        {"term": term, "end-to-end": end_to_end, "parity": parity, "memory": memory}, description=__doc__
    )
    print(json.dumps({**out, "peak_MB_of_this": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}, indent=2))


if __name__ == "__main__":
    main()
