"""Tables of tags as people and tools write them: each is read rightly, or refused by name."""

import csv
import io
import json
import unicodedata
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cosa_hf.data import class_names, load_folder

FILES = ("a.jpg", "b.png", "sub/c.jpg", "Fluß ä.png", "1.jpg")
CLASSES = ("cat", "dog", "garden chair", "café", "Gänse", "猫", "bird (flying)", "rock 'n' roll", "C++", "T-shirt", "7")
SPACES = (" ", "  ", "\t", "\u00a0", "\u200b", "\ufeff")


def _one_hot(separator, one="1", zero="0"):
    return lambda tags: separator.join(one if name in tags else zero for name in CLASSES)


#: How a cell says its tags so that there is one meaning.
PLAIN = {
    "commas": ",".join,
    "semicolons": "; ".join,
    "bars": "|".join,
    "lines": "\n".join,
    "stray separators": lambda tags: " , ".join(["", *tags, ""]),
    "JSON": json.dumps,
    "JSON in Unicode": lambda tags: json.dumps(tags, ensure_ascii=False),
    "list": lambda tags: str(list(tags)),
    "tuple": lambda tags: str(tuple(tags)),
    "choices": lambda tags: json.dumps({"choices": tags}),
    "choices of Python": lambda tags: str({"choices": list(tags)}),
}
#: And what is found in tables, or has been.
ODD = {
    "array": lambda tags: str(np.array(tags)),
    "set": lambda tags: str(set(tags)),
    "series": lambda tags: f"{list(tags)}\nName: labels, dtype: object",
    "bare list": lambda tags: f"[{', '.join(tags)}]",
    "bare braces": lambda tags: "{" + ",".join(tags) + "}",
    "bare brackets": lambda tags: f"({', '.join(tags)})",
    "cut list": lambda tags: str(list(tags))[:-1],
    "JSON twice": lambda tags: json.dumps(json.dumps(tags)),
    "quotes": lambda tags: ",".join(f"'{tag}'" for tag in tags),
    "double quotes": lambda tags: " ".join(f'"{tag}"' for tag in tags),
    "printed quotes": lambda tags: "; ".join(f"“{tag}”" for tag in tags),
    "bytes": lambda tags: str([tag.encode() for tag in tags]),
    "escaped bytes": lambda tags: ",".join(str(tag.encode()) for tag in tags),
    "object": lambda tags: json.dumps(dict.fromkeys(tags, 1)),
    "objects": lambda tags: json.dumps([{"name": tag} for tag in tags]),
    "regions": lambda tags: json.dumps([{"x": 1, "rectanglelabels": [tag]} for tag in tags]),
    "nested list": lambda tags: json.dumps([list(tags)]),
    "ones and zeros": _one_hot(" "),
    "ones and zeros with commas": _one_hot(","),
    "ones and zeros in a list": lambda tags: f"[{_one_hot(', ')(tags)}]",
    "truths": _one_hot(" ; ", "True", "False"),
    "floats": _one_hot(" ", "1.", "0."),
    "ids": lambda tags: ",".join(f"{CLASSES.index(tag)}.0" for tag in tags),
    "nan": lambda tags: ",".join(tags) or "nan",
    "None": lambda tags: ";".join(tags) or "None",
    "null": lambda tags: "|".join(tags) or "null",
    "N/A": lambda tags: ",".join(tags) or "#N/A",
    "a null among them": lambda tags: ",".join([*tags, "nan"]),
    "NaN in a list": lambda tags: str([*tags, float("nan")]),
    "file": lambda tags: "a.jpg",
}
#: What happens to a table on its way that leaves its meaning as it is.
HARMLESS = (
    "signature", "CRLF", "blank lines", "quoted", "other columns", "wide header", "index", "decomposed", "spaces",
    "padded header", "columns in another order",
)  # fmt: skip
#: And what may cost it its meaning.
HARMFUL = (
    "CR", "semicolon table", "tab table", "latin-1", "UTF-16", "swapped columns", "column twice", "row twice",
    "empty row", "header gone", "other header", "capital header", "unquoted", "open quote", "lost row end",
)  # fmt: skip


class Table(NamedTuple):
    kind: str  # the name of the file
    tags: dict[str, list[str]]
    notation: str
    damage: tuple[str, ...]
    seed: int

    @property
    def harmless(self):
        return self.notation in PLAIN and set(self.damage) <= set(HARMLESS)


def tables():
    tags = st.lists(st.sampled_from(CLASSES), unique=True, max_size=4)
    images = st.dictionaries(st.sampled_from(FILES), tags, min_size=1).filter(lambda images: any(images.values()))
    damage = st.lists(st.sampled_from(HARMLESS), unique=True, max_size=3)
    more = st.lists(st.sampled_from(HARMFUL), unique=True, max_size=1)
    return st.builds(
        lambda kind, tags, notation, damage, more, seed: Table(kind, tags, notation, (*damage, *more), seed),
        st.sampled_from(("metadata.csv", "metadata.csv", "metadata.jsonl", "tags.json")),
        images,
        st.sampled_from((*PLAIN, *PLAIN, *ODD)),
        damage,
        more,
        st.integers(0, 2**32 - 1),
    )


def cells_of(table):
    rng = np.random.default_rng(table.seed)

    def space():
        return "".join(rng.choice(SPACES, rng.integers(0, 3)))

    for file, tags in table.tags.items():
        spaced = [f"{space()}{tag}{space()}" for tag in tags] if "spaces" in table.damage else tags
        text = (PLAIN | ODD)[table.notation](spaced if table.notation in PLAIN else tags)
        if "decomposed" in table.damage:
            file, text = unicodedata.normalize("NFD", file), unicodedata.normalize("NFD", text)
        yield file, text


def content_of(table):
    """The bytes of a table."""
    if table.kind == "metadata.csv":
        text = as_csv(table)
    else:
        keys = ("labels", "file_name") if "swapped columns" in table.damage else ("file_name", "labels")
        rows = [dict(zip(keys, cells, strict=True)) for cells in cells_of(table)]
        rows += [{"file_name": None, "labels": None}] if "empty row" in table.damage else []
        rows += rows[:1] if "row twice" in table.damage else []
        if table.kind == "tags.json":
            text = json.dumps({row["file_name"]: row["labels"] for row in rows if row["file_name"]})
            if "row twice" in table.damage:
                text = text[:-1] + ", " + text[1:]
        else:
            text = "".join(json.dumps(row, ensure_ascii="quoted" in table.damage) + "\n" for row in rows)
        if "lost row end" in table.damage:
            text = text.rstrip()[:-1]
    encoding = next((name for name in ("latin-1", "UTF-16") if name in table.damage), "utf-8")
    content = text.encode(encoding, "replace")
    return b"\xef\xbb\xbf" + content if "signature" in table.damage and encoding == "utf-8" else content


def as_csv(table):
    damage = table.damage
    header, rows = ["file_name", "labels"], [list(cells) for cells in cells_of(table)]
    if "swapped columns" in damage:
        header.reverse()
    if "capital header" in damage:
        header = ["File_Name", "Labels"]
    if "other header" in damage:
        header = ["filename", "tags"]
    if "other columns" in damage:
        header, rows = [*header, "width"], [[*row, "640"] for row in rows]
    if "column twice" in damage:
        header, rows = [*header, "labels"], [[*row, "dog"] for row in rows]
    if "columns in another order" in damage:
        header, rows = header[::-1], [row[::-1] for row in rows]
    if "index" in damage:
        header, rows = ["", *header], [[str(number), *row] for number, row in enumerate(rows)]
    if "wide header" in damage:
        header = [*header, "", ""]
    if "padded header" in damage:
        header = [f" {name}" for name in header]
    if "row twice" in damage:
        rows.append(rows[0])
    if "empty row" in damage:
        rows.insert(len(rows) // 2, [""] * len(header))
    if "header gone" not in damage:
        rows.insert(0, header)
    end = "\r" if "CR" in damage else "\r\n" if "CRLF" in damage else "\n"
    delimiter = ";" if "semicolon table" in damage else "\t" if "tab table" in damage else ","
    if "unquoted" in damage:
        text = "".join(delimiter.join(row) + end for row in rows)
    else:
        file = io.StringIO(newline="")
        quoting = csv.QUOTE_ALL if "quoted" in damage else csv.QUOTE_MINIMAL
        csv.writer(file, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(rows)
        text = file.getvalue()
    if "blank lines" in damage:
        text = end + text + end * 2
    if "open quote" in damage:
        text = text.rstrip() + f'{end}a.jpg,"cat{end}'
    cut = "lost row end" in damage and text.rstrip().endswith(('"', "]", "}"))  # a name cut short is a name
    return text.rstrip()[:-1] if cut else text


def outcome_of(table, root):
    """ "read" or "refused"; fails if a table is read wrongly, or refused without a name."""
    for name in ("metadata.csv", "metadata.jsonl", "tags.json"):
        (root / name).unlink(missing_ok=True)
    (root / table.kind).write_bytes(content_of(table))
    refusal = None
    try:
        dataset = load_folder(root)
    except (ValueError, FileNotFoundError) as error:
        refusal = unicodedata.normalize("NFC", str(error))
    if refusal is not None:
        assert any(name in refusal for name in (table.kind, *FILES, *CLASSES)), refusal
        assert not table.harmless, refusal
        return "refused"
    names = class_names(dataset)
    read = {
        image: {names[label] for label in labels}
        for image, labels in zip(dataset["image_id"], dataset["labels"], strict=True)
    }
    expected = {file.rpartition(".")[0].replace("/", "_"): set(tags) for file, tags in table.tags.items()}
    assert read == expected
    assert set(names) == set().union(*expected.values())
    return "read"


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for number, file in enumerate(FILES):
        (root / file).parent.mkdir(exist_ok=True)
        Image.new("RGB", (2 + number, 2)).save(root / file)
    return root


@given(tables())
def test_tables_are_read_rightly_or_refused_by_name(photos, table):
    outcome_of(table, photos)


@pytest.mark.slow
def test_two_thousand_tables(photos):
    counts = Counter()

    @settings(max_examples=2000)
    @given(tables())
    def count(table):
        counts[outcome_of(table, photos)] += 1

    count()
    print(dict(counts))
    assert counts["read"] >= 500
    assert counts["refused"] >= 500
