"""Parts of self-contained HTML pages: nothing is fetched from anywhere, every text is escaped, light and dark."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--paper:#fff;--soft:#5b6570;--line:#d8dde3;--warn:#fff3d6;
--warn-ink:#7a5200;--warn-edge:#d99a00;--s0:#1f5fa8;--s1:#b3560b;--s2:#18794e;--s3:#a3337d;--s4:#6b5b00;--s5:#5a4fcf}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--paper:#14171b;--soft:#a4adb8;--line:#39414a;--warn:#3a2e10;
--warn-ink:#f0c877;--warn-edge:#d99a00;--s0:#7ab4f5;--s1:#f0a35e;--s2:#63cf9b;--s3:#ec92cd;--s4:#d8c86a;--s5:#b0a8ff}}
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:var(--ink);
background:var(--paper)}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2.4rem}h3{font-size:1rem;margin-top:1.6rem;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%}a{color:var(--s0)}
th,td{text-align:left;padding:.3rem .7rem;border-bottom:1px solid var(--line);vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}th.n{text-align:right}
.warn{background:var(--warn);border-left:4px solid var(--warn-edge);padding:.5rem .8rem}
.small,figcaption{color:var(--soft);font-size:.87rem}code{overflow-wrap:anywhere}
caption{text-align:left;font-weight:600;padding:.3rem .7rem}th[scope=row]{font-weight:400}
.scroll{overflow-x:auto}:focus-visible{outline:2px solid var(--s0);outline-offset:2px}
.remark{display:inline-block;max-width:8.5rem;white-space:normal;font-size:.75rem;line-height:1.2;color:var(--warn-ink)}
svg{max-width:100%;height:auto}svg text{font:11px system-ui,sans-serif;fill:var(--soft)}
.frame{fill:none;stroke:var(--line)}.grid{stroke:var(--line);stroke-width:.6}
.s0{--c:var(--s0)}.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}.s4{--c:var(--s4)}.s5{--c:var(--s5)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1.2rem;margin:.2rem 0 .6rem;padding:0;font-size:.87rem}
.stroke{stroke:var(--c);fill:none}.fill{fill:var(--c);stroke:var(--c)}.hollow{fill:var(--paper);stroke:var(--c)}
@media(max-width:40rem){th,td{padding:.3rem}th[scope=row]{overflow-wrap:anywhere;min-width:6rem}td.n{white-space:normal}}
"""
COLOURS = 6
"""Classes s0 … s5 of `STYLE`; what a colour says is also said by a dash, a shape or a word."""


def esc(text: object) -> str:
    """Text as HTML, also inside an attribute's quotes."""
    return html.escape(str(text), quote=True)


def document(title: str, parts: Sequence[str], *, style: str = "", script: str = "") -> str:
    """A whole page. Its content policy lets it load nothing, and run no script but this one."""
    allowed = "".join(
        f" 'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'"
        for code in filter(None, [script])
    )
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src{allowed or ' ' + repr('none')}"
    code = f"<script>{script}</script>" if script else ""
    body = "\n".join(parts)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f"<title>{esc(title)}</title><style>{STYLE}{style}</style></head>\n<body><main>{body}</main>{code}</body></html>\n"
    )


def write_page(path: str | Path, text: str) -> Path:
    """Write a page, whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
    return path


def table(caption: str, head: Sequence[str], rows: Sequence[str], numbers: Sequence[int] = ()) -> str:
    """A table that a screen reader can announce and a keyboard can scroll; rows are ready HTML."""
    cells = "".join(
        f'<th scope="col"{" class=n" if i in numbers else ""}>{esc(name)}</th>' for i, name in enumerate(head)
    )
    label = esc(caption)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><caption>{label}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def row(cells: Sequence[object], numbers: Sequence[int] = ()) -> str:
    """A row of texts, the first its head."""
    first, *others = cells
    rest = "".join(f"<td{' class=n' if i in numbers else ''}>{esc(c)}</td>" for i, c in enumerate(others, 1))
    return f'<tr><th scope="row">{esc(first)}</th>{rest}</tr>'


def picture(image: Image.Image, alt: str) -> str:
    """An image inside the page, lossless."""
    image.convert("RGB").save(data := io.BytesIO(), "PNG", optimize=True)
    encoded = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{esc(alt)}" width="{image.width}" height="{image.height}" src="data:image/png;base64,{encoded}">'
