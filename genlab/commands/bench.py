"""`genlab bench NAME`: measured comparisons, one a row of the table below; only the one that is called is imported."""

from __future__ import annotations

from . import shared

BENCHES = {
    "baseline": (
        "genlab.commands.bench_baseline:main",
        "a diffusers U-Net DDPM on the same tokens, for the same CPU time, beside MODEL",
    ),
    "flextok": (
        "eval.bench_flextok:main",
        "what each further token of a FlexTok buys, for simple things and for complex ones",
    ),
}
"""Name to `module:function`, which takes the words behind the name and returns the exit code, and what it shows."""


def main(argv: list[str]) -> int:
    """Run one bench.

    Raises:
        ValueError: for an unknown name.
    """
    if not argv or argv[0] in ("-h", "--help"):
        width = max(map(len, BENCHES))
        print("usage: genlab bench NAME [options]      genlab bench NAME --help explains one\n")
        print("\n".join(f"  {name:<{width}}  {what}" for name, (_, what) in BENCHES.items()))
        return 0
    if argv[0] not in BENCHES:
        raise ValueError(f"unknown bench {argv[0]!r}. Known: {', '.join(BENCHES)}")
    module, function = BENCHES[argv[0]][0].split(":")
    return int(getattr(shared.load(module), function)(argv[1:]) or 0)
