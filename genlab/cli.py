"""The command line: `genlab COMMAND --help` explains each command.

Commands live in `genlab/commands/`, one a file: a frozen dataclass whose fields are the options, and `run`.
Only the command that is called is imported.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

COMMANDS = {
    "list": "models, presets, tokenizers, generators and samplers there are",
    "data": "write a set of images as a plain folder",
    "train": "train a tokenizer or a generator by a preset",
    "plan": "memory, arithmetic and days of a training on GPUs, and its command",
    "reconstruct": "images through a tokenizer and back",
    "sample": "draw images: a grid, or single PNGs",
    "caption": "say in words what images show",
    "inpaint": "draw a part of a picture anew, or variations of it",
    "story": "a story in words and clips, as one HTML file",
    "stats": "reference statistics of a set of images",
    "eval": "Fréchet distance and its kin, with intervals and protocol",
    "report": "runs, pictures, comparisons and figures as one HTML page",
    "convert": "a published checkpoint into genlab's format",
    "bench": "measured comparisons (baseline, …)",
    "audit": "is a sampler's distribution the plain one's?",
    "app": "a page in the browser to draw from models (needs gradio)",
    "demo": "reconstructions, samples, figures, and a page that shows them",
}

BAD_INPUT = (
    ValueError,
    FileExistsError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
)


def usage() -> str:
    """The top-level help."""
    from genlab import __version__

    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return (
        f"genlab {__version__}: images from learned visual tokens\n\n"
        "usage: genlab COMMAND [options]      genlab COMMAND --help explains one\n\n" + "\n".join(lines) + "\n\n"
        "start here:\n"
        "  genlab demo --out demo/                              a page of reconstructions and samples\n"
        "  genlab sample xar-cell-emoji64 --grid out.png        draw a grid\n"
        "  genlab train xar-cell-emoji64 --out runs/mine        train your own\n"
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit code: 0, 1 where a check fails, 2 for bad input."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        from genlab import __version__

        print(__version__)
        return 0
    name = argv[0]
    if name not in COMMANDS:
        import difflib

        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean `genlab {close[0]}`?" if close else ""
        print(f"genlab: unknown command {name!r}{hint}\nCommands: {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        command: Any = importlib.import_module(f"genlab.commands.{name}")
        return int(command.main(argv[1:]) or 0)
    except (
        ValueError,
        FileExistsError,
        FileNotFoundError,
        PermissionError,
        IsADirectoryError,
        NotADirectoryError,
    ) as error:
        if os.environ.get("GENLAB_TRACEBACK"):
            raise
        said = str(error)
        if isinstance(error, OSError) and error.filename and error.strerror:  # the system's own
            said = f"{error.filename}: {error.strerror}"
        print(f"genlab {name}: {said}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `genlab … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print(f"genlab {name}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
