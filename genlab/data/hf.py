"""Hugging Face data sets: `hf:name[:config]`, or `hf:PATH` for one saved with `save_to_disk`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genlab.data.records import Listing, Record


@dataclass(frozen=True, slots=True)
class InRow:
    """The image of one row of a data set, undecoded."""

    table: Any
    column: str
    row: int

    def read(self) -> bytes:
        """Return the file's bytes: those in the table, or those of the file it names."""
        cell = self.table[self.row][self.column]
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise OSError("the row has no image")
        return Path(cell["path"]).read_bytes() if cell["bytes"] is None else cell["bytes"]


def list_hf(name: str) -> Listing:
    """List the images of a Hugging Face data set.

    The image column is the first of type `Image`; the class the first `ClassLabel` column, else one called
    `label` or `class`; the caption one called `caption`, `text` or `prompt` (of several captions the first; all stay
    in `meta`); the key one called `key`, else split and row number.

    Args:
        name: what follows `hf:`: a Hub name with an optional `:config`, or a path.

    Raises:
        ImportError: the library `datasets` is not installed.
        FileNotFoundError: neither on this machine nor to be had from the Hub.
        ValueError: no image column.
    """
    listing = Listing(records=[])
    for split, table in _load(name).items():
        _list_table(table, split, listing, name)
    return listing


def _load(name: str) -> dict[str | None, Any]:
    """Return the data set's tables by split; one that was saved without splits goes by None."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("hf: sources need the library datasets: pip install 'genlab[hf]'") from error
    path = Path(name).expanduser()
    try:
        if path.is_dir() and any((path / f).is_file() for f in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(str(path))
        else:
            hub, _, config = name.partition(":")
            args = (str(path),) if path.exists() else (hub, config or None)
            loaded = datasets.load_dataset(*args)
    except Exception as error:  # no such name, no connection, a damaged folder: each has its own type
        raise FileNotFoundError(
            f"hf:{name}: neither a folder made by save_to_disk nor a data set to be had from the Hub "
            f"({type(error).__name__}: {error})"
        ) from error
    return loaded if isinstance(loaded, dict) else {None: loaded}


def _list_table(table: Any, split: str | None, listing: Listing, name: str) -> None:
    import datasets

    features = table.features
    column = next((c for c, f in features.items() if isinstance(f, datasets.Image)), None)
    if column is None:
        raise ValueError(f"hf:{name}: no image column among {', '.join(features)}")
    label = next((c for c, f in features.items() if isinstance(f, datasets.ClassLabel)), None)
    label = label or next((c for c in ("label", "class") if c in features), None)
    if isinstance(features.get(label), datasets.ClassLabel):
        listing.classes = tuple(features[label].names)
    text = next((c for c in ("caption", "captions", "text", "prompt") if c in features), None)

    table = table.cast_column(column, datasets.Image(decode=False))
    words = table.remove_columns(column)
    table = table.select_columns(column)
    for row in range(len(table)):
        meta = words[row] if words.column_names else {}
        cls, caption = meta.pop(label, None), meta.pop(text, None)
        if isinstance(caption, list):
            meta["captions"], caption = caption, caption[0] if caption else None
        key = str(meta.pop("key", f"{split or 'row'}-{row:08d}"))
        listing.records.append(
            Record(
                key=key,
                where=f"hf:{name}, {split or 'row'} {row}",
                blob=InRow(table, column, row),
                cls=None if cls is None or cls == -1 else cls,
                caption=str(caption or ""),
                meta=meta,
                split=split,
            )
        )
