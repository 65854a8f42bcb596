"""`genlab audit toy --sampler all`, `genlab audit MODEL --sampler S`: is a sampler's distribution the plain one's?"""

from __future__ import annotations

from . import shared


def main(argv: list[str]) -> int:
    """Run the audit; 1 where it finds a difference."""
    from .sample import make_sampler

    audit = shared.load("eval.audit")
    argv = ["--target", *argv] if argv and not argv[0].startswith("-") else list(argv)
    return int(audit.run(shared.parse(audit.AuditConfig, argv, prog="genlab audit"), make_sampler))
