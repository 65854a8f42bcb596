"""What README.md and docs/ show is true: every command line parses, every Python block compiles and imports."""

import ast
import importlib
import itertools
import json
import re
import shlex
from pathlib import Path

import pytest
import tyro

from genlab import cli
from genlab.commands import shared
from genlab.config import to_json
from genlab.hub import shipped
from genlab.registry import SAMPLERS
from train.presets import PRESETS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
INDENTED = re.compile(r"^ {4}(genlab .*)$", re.MULTILINE)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHELL = ("bash", "sh", "shell", "console", "")


def blocks(page, *languages):
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands(text):
    """Command lines of a shell block, as words: continued lines joined, comments and prompts gone, pipes cut."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True)
        for operator, part in itertools.groupby(words, lambda w: w in ("|", "&&", ";", ">", "2>", "&")):
            part = [w for w in part if not re.match(r"^[A-Z_]+=", w)]  # NAME=value in front of a command
            if not operator and part:
                yield part


LINES = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)[:60]}")
    for page in PAGES
    for body in [*blocks(page, *SHELL), *INDENTED.findall(FENCE.sub("", page.read_text(encoding="utf-8")))]
    for words in commands(body)
]
GENLAB = [p for p in LINES if p.values[0][0] == "genlab"]


class Parsed(BaseException):
    """Raised in place of running the command; no `except` of the command line takes it."""


@pytest.fixture
def parse_only(monkeypatch, tmp_path):
    """`genlab` words to the config they give, and nothing more."""
    real, real_tyro = shared.parse, tyro.cli

    def spy(cls, argv, **options):
        argv = list(argv)
        if "--config" in argv:  # the file is an example's
            at = argv.index("--config")
            del argv[at : at + 2]
        raise Parsed(real(cls, argv, **options))

    def own(*args, **options):  # benches that parse their own words
        raise Parsed(real_tyro(*args, **options))

    monkeypatch.setattr(shared, "parse", spy)
    monkeypatch.setattr(tyro, "cli", own)
    monkeypatch.chdir(tmp_path)

    def call(words):
        words = list(words)
        if words[0] == "train" and "--config" in words:
            example = tmp_path / "example.json"
            example.write_text(to_json(PRESETS["xar-cell-emoji64"]()))
            words[words.index("--config") + 1] = str(example)
        try:
            code = cli.main(words)
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit as stop:
            code = stop.code or 0
        assert code == 0, f"genlab {' '.join(words)} exits with {code}"
        return None

    return call


def test_pages_are_read():
    """The collection finds what it is for."""
    assert len(GENLAB) > 8
    assert {words[1] for words in (p.values[0] for p in GENLAB)} >= {"demo", "list", "sample", "train", "eval", "stats"}
    text = "FOO=1 genlab sample x \\\n  --seeds 0 # why\n$ genlab list | head && make demo > log\n\n# genlab none"
    assert list(commands(text)) == [
        ["genlab", "sample", "x", "--seeds", "0"],
        ["genlab", "list"],
        ["head"],
        ["make", "demo"],
        ["log"],
    ]


@pytest.mark.parametrize(
    "words", ["sample xar --sedes 0", "train xar-nothing", "smaple x", "list extra", "eval --generted a"]
)
def test_a_wrong_line_would_be_noticed(parse_only, words):
    with pytest.raises((AssertionError, ValueError)):
        parse_only(words.split())


@pytest.mark.parametrize("words", GENLAB)
def test_command_lines_parse(parse_only, words):
    config = parse_only(words[1:])
    model = getattr(config, "model", None)
    if isinstance(model, str) and "/" not in model:
        assert model in PRESETS or model in shipped(), f"no model {model!r}"
    sampler = getattr(config, "sampler", "")
    if words[1] == "sample" and sampler:
        assert sampler in SAMPLERS
    for option in ("--model", "--sampler"):  # `eval` takes these itself
        if option in words and words[1] == "eval":
            name = words[words.index(option) + 1]
            assert "/" in name or name in (SAMPLERS if option == "--sampler" else {*PRESETS, *shipped()})


@pytest.mark.parametrize("words", [p for p in LINES if p.values[0][0] == "make"])
def test_make_targets_exist(words):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(words[1:]) <= set(targets)


INLINE = sorted({line for page in PAGES for line in re.findall(r"`(genlab [^`]+)`", page.read_text(encoding="utf-8"))})


@pytest.mark.parametrize("line", INLINE)
def test_commands_in_the_text_exist(line):
    """In running text: the command, and its options by name."""
    from genlab.cli import COMMANDS

    _, command, *rest = line.split()
    assert command in COMMANDS or command == "COMMAND"
    for option in [w for w in rest if w.startswith("--") and w != "--help"]:
        source = Path(importlib.import_module(f"genlab.commands.{command}").__file__).read_text()
        field = option.lstrip("-").replace("-", "_").split(".")[0]
        sources = source + (ROOT / "eval" / "config.py").read_text() * (command in ("eval", "stats"))
        if command == "bench":
            benches = [*(ROOT / "genlab" / "commands").glob("bench_*.py"), *(ROOT / "eval").glob("*.py")]
            sources += "".join(path.read_text() for path in benches)
        assert option in sources or re.search(rf"^    {field}: ", sources, re.MULTILINE), option


PYTHON = [
    pytest.param(body, id=f"{page.name} {i}") for page in PAGES for i, body in enumerate(blocks(page, "python", "py"))
]


@pytest.mark.parametrize("body", PYTHON)
def test_python_compiles_and_its_names_exist(body):
    tree = ast.parse(body)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (page.parent / target).exists(), target


def test_shipped_models_have_cards():
    assert shipped()
    for folder in shipped().values():
        assert len((folder / "README.md").read_text()) > 100
        assert json.loads((folder / "config.json").read_text())["sha256"]
