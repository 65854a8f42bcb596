"""Floors: no import runs up, `import genlab` is light, and a user's own train.py and eval.py break nothing."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import genlab

ROOT = Path(__file__).parents[2]
PACKAGES = ("genlab", "tokenizers_img", "samplers", "train", "eval")


def python(*arguments, cwd, **environment):
    run = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=600,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


LINT = "import sys; from importlinter.cli import lint_imports; print('exit', lint_imports(no_cache=True))"


def lint(root):
    return python("-c", LINT, cwd=root)


def test_no_import_runs_up():
    out = lint(ROOT)
    assert "No import runs up KEPT" in out
    assert out.rstrip().endswith("exit 0")


def test_the_contract_would_notice(tmp_path):
    """Each line below breaks the contract, the one inside a function too."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            target = tmp_path / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for path, line in [
        ("genlab/hub.py", "import genlab.generators.base"),
        ("genlab/noise.py", "def later():\n    from train import loop"),
        ("tokenizers_img/base.py", "from samplers.base import Stats"),
        ("samplers/flow.py", "import eval.result"),
        ("eval/result.py", "import train.config"),
        ("train/tasks.py", "from genlab.commands import shared"),
        ("genlab/commands/shared.py", "import genlab.cli"),
    ]:
        assert (tmp_path / path).is_file()
        with (tmp_path / path).open("a") as file:
            file.write(f"\n{line}\n")
    out = lint(tmp_path)
    assert "No import runs up BROKEN" in out
    assert out.rstrip().endswith("exit 1")
    for low, high in [
        ("genlab.hub", "genlab.generators"),
        ("genlab.noise", "train"),
        ("tokenizers_img", "samplers"),
        ("samplers", "eval"),
        ("eval", "train"),
        ("train", "genlab.commands"),
        ("genlab.commands", "genlab.cli"),
    ]:
        assert f"{low} is not allowed to import {high}" in out


LIGHT = """
import json, sys, time
clock = time.process_time()
import genlab, genlab.cli, genlab.config, genlab.data, genlab.registry, genlab.tokens
seconds = time.process_time() - clock
assert genlab.TokenSpec(kind="discrete", grid=(2,), vocab=3).length == 2
names = {m.split(".")[0] for m in sys.modules}
loaded = sorted(names & {"torch", "numpy", "PIL", "diffusers", "timm", "pydantic", "tyro", "train", "eval", "samplers"})
genlab.Noise
after = sorted({m.split(".")[0] for m in sys.modules} & {"torch", "train", "eval", "diffusers", "timm", "transformers"})
print(json.dumps([loaded, seconds, after]))
"""


def test_importing_genlab_is_light(tmp_path):
    loaded, seconds, after = json.loads(python("-c", LIGHT, cwd=tmp_path))
    assert loaded == []
    assert seconds < 0.5  # CPU time, of which this takes a tenth
    assert after == ["torch"]  # which loads when it is first used, and nothing else with it
    assert set(genlab.__all__) >= {"Tokens", "TokenSpec", "Noise", "from_pretrained", "open_images"}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        genlab.nothing  # noqa: B018


OWN = "MINE = True\nprint('a module of the user')\n"
SCRIPT = """
import sys
import train, eval  # the user's own
import genlab, genlab.cli
assert train.MINE and eval.MINE
mine = train
from genlab.commands import shared
loop, harness = shared.load("train.loop"), shared.load("eval.harness")
assert callable(loop.train) and callable(harness.evaluate)
assert shared.load("train.loop") is loop
assert genlab.cli.main(["list", "--json"]) == 0
assert train is mine and train.MINE  # what the script holds stays its own
assert sys.path[0] != shared.Path(genlab.__file__).parents[1].as_posix()
"""


@pytest.fixture
def users_folder(tmp_path):
    for name in ("train.py", "eval.py"):
        (tmp_path / name).write_text(OWN)
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def test_a_users_own_modules_beside_the_command(users_folder):
    out = python("-m", "genlab.cli", "list", cwd=users_folder)
    assert "presets (genlab train PRESET)" in out
    assert "xar-cell-emoji64" in out
    assert "a module of the user" not in out


def test_a_users_own_modules_in_their_script(users_folder):
    out = python("script.py", cwd=users_folder)
    table = json.loads(out[out.index("{") :])
    assert "xar-cell-emoji64" in [p["name"] for p in table["presets"]]
    assert out.count("a module of the user") == 2  # loaded by the user, once each
