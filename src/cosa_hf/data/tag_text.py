"""Text where tags are expected: the names in it, and what cannot be the name of a class."""

import ast
import functools
import json
import re
import unicodedata
from pathlib import PurePosixPath
from typing import Any

from cosa_hf.data.formats import ENDINGS

NONE_OF_THE_CLASSES = "-"
"""Alone in place of tags: somebody looked, and the image has none of the classes. No tags: nobody looked."""

SEPARATORS = "[,;|\n\r\t]"

_INVISIBLE = dict.fromkeys(map(ord, "\u00ad\u200b\u200e\u200f\u2060\ufeff"))
_STRING = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')"""
# Commas are asked for here since Python reads ['cat' 'dog'], as NumPy prints it, as ['catdog'].
_LIST = re.compile(rf"[\[({{]\s*(?:{_STRING}\s*(?:,\s*{_STRING}\s*)*,?\s*)?[\])}}]", re.DOTALL)
_CHOICES = re.compile(r"""\{\s*(["'])choices\1\s*:(.*)\}""", re.DOTALL)
_NUMBER = r"[+-]?\d+(?:\.\d*)?"
_NOTHING = ("nan", "none", "null", "nat", "n/a", "#n/a", "<na>", "true", "false")
_QUOTES = "\"'`“”„‘’«»"
_IMPORT = "an export of another tool goes through `cosa-hf import`"


def names_in(text: str) -> list[str]:
    """The names in a text: a list as JSON or Python write one, Label Studio's choices, or names with separators.

    Raises:
        ValueError: numbers, as in a row of zeros and ones, or brackets that are not such a list.

    Example:
        >>> names_in("cat; garden chair"), names_in("['cat', 'dog']"), names_in('{"choices": ["cat"]}'), names_in("[]")
        (['cat', ' garden chair'], ['cat', 'dog'], ['cat'], [])
    """
    text = text.strip()
    if text[:1] in ("[", "{", "("):
        choices = _CHOICES.fullmatch(text)
        if (names := _literal(choices[2].strip() if choices else text)) is not None:
            return names
    names = re.split(SEPARATORS, text)
    numbers = [part for name in names for part in name.split()]
    if len(numbers) > 1 and all(re.fullmatch(_NUMBER, number) for number in numbers):
        in_one = any(len(name.split()) > 1 for name in names)
        if in_one or all(float(number) in (0, 1) for number in numbers):
            raise ValueError(
                f"{text!r} are numbers, not tags: write the names of the classes that are in the image (a table with "
                "a column for each class goes through `cosa-hf import one-hot`; of digits, write a list of texts)"
            )
    return names


def _literal(text: str) -> list[str] | None:
    if not _LIST.fullmatch(text):
        return None
    for read in (json.loads, ast.literal_eval):  # JSON first: the two differ in what a backslash means
        try:
            value: Any = read(text)
        except (ValueError, SyntaxError):
            continue
        if isinstance(value, list | tuple | set):
            return list(value)
    return None


@functools.lru_cache(maxsize=4096)
def as_tag(name: str) -> str:
    """A name without what cannot be seen: blanks around it, repeated ones, marks of zero width.

    Raises:
        ValueError: it cannot be the name of a class, and what to write instead.

    Example:
        >>> as_tag(" garden\\u00a0 chair\\ufeff"), as_tag("bird (flying)")
        ('garden chair', 'bird (flying)')
        >>> as_tag("[cat")
        Traceback (most recent call last):
        ValueError: '[cat' is not a tag: it has brackets; write tags as cat; dog or as ["cat", "dog"] ...
    """
    tag = " ".join(name.translate(_INVISIBLE).split())
    if not tag or tag == NONE_OF_THE_CLASSES:
        return tag
    if problem := _problem(tag):
        raise ValueError(f"{tag!r} is not a tag: {problem}")
    return tag


def _problem(tag: str) -> str | None:
    """Why no one would call a class so, and what to do."""
    lists = f'write tags as cat; dog or as ["cat", "dog"] ({_IMPORT})'
    if re.search(r"[\[\]{}]", tag) or tag.count("(") != tag.count(")") or re.search(r"^\(.*\)$|\(\)", tag):
        return f"it has brackets; {lists}"
    if tag[0] in _QUOTES or tag[-1] in _QUOTES:
        return f"it has quotes at its ends; {lists}"
    if tag.casefold() in _NOTHING or tag == "NA":
        return (
            "leave it empty where an image was not tagged, and write - where somebody looked and it has none of the "
            "classes"
        )
    if re.fullmatch(r"[+-]?\d+\.\d*(e[+-]?\d+)?", tag) or re.search(r"^/[a-z]/\w+$", tag):
        return f"it is a number or an id; write the name of the class ({_IMPORT} csv --names)"
    if PurePosixPath(tag).suffix.lower() in ENDINGS:
        return "it is the name of a file; are two columns swapped?"
    if not any(character.isalnum() or unicodedata.category(character) == "So" for character in tag):
        return "it has neither letters nor digits; write the name of the class"
    if "\ufffd" in tag or any(unicodedata.category(character) == "Cc" for character in tag):
        return "it has characters that were damaged; save the file again as UTF-8"
    return None


def combined_names(classes: list[str]) -> dict[str, list[str]]:
    """Classes that are made of the words of at least two others, as where spaces separate the tags of a table.

    Example:
        >>> combined_names(["haze", "haze primary", "primary", "garden chair"])
        {'haze primary': ['haze', 'primary']}
    """
    by_words = {tuple(name.casefold().split()): name for name in classes}
    several = [words for words in by_words if len(words) > 1]
    # No more words than classes of several: they are likely put together, though the words never stand alone.
    put_together = len({word for words in several for word in words}) <= len(several)

    @functools.cache
    def parts(words: tuple[str, ...], longest: int) -> list[str] | None:
        for length in range(min(longest, len(words)), 0, -1):
            rest = parts(words[length:], len(words)) if words[:length] in by_words else None
            if rest is not None:
                return [by_words[words[:length]], *rest]
        return None if words else []

    found = {
        by_words[words]: parts(words, len(words) - 1) or (list(words) if put_together else []) for words in several
    }
    return {name: names for name, names in found.items() if names}


__all__ = ["NONE_OF_THE_CLASSES", "SEPARATORS", "as_tag", "combined_names", "names_in"]
