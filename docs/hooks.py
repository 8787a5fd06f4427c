"""What the site needs beyond Markdown: a hook of MkDocs for the pages, an extension of Griffe for the docstrings."""

import re
from pathlib import Path
from typing import Any

from griffe import Extension, Object

DOCS = Path(__file__).resolve().parent
SOURCE = DOCS.parent / "src"


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fits a page written for the repository to the site.

    `[text](../src/file.py)`, which is not a page of the site, becomes the text and the file's name; a missing file
    fails the build. `::: package` becomes a `:::` for each of its modules, so that no list of them has to be kept.
    """

    def named(link: re.Match[str]) -> str:
        path = (DOCS / page.file.src_uri).parent.joinpath(link[2]).resolve()
        if path.is_relative_to(DOCS):
            return link[0]
        if not path.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {link[2]}, which is not in the repository")
        name = path.relative_to(DOCS.parent).as_posix()
        return link[1] if name in link[1] else f"{link[1]} (`{name}`)"

    def modules(line: re.Match[str]) -> str:
        files = sorted((SOURCE / line[1].replace(".", "/")).glob("[!_]*.py"))
        return "\n\n".join(f"::: {line[1]}.{file.stem}" for file in files) or line[0]

    markdown = re.sub(r"\[([^\]]+)\]\((\.\./[^)#]+)\)", named, markdown)
    return re.sub(r"^::: (\S+)$", modules, markdown, flags=re.MULTILINE)


class Examples(Extension):
    """Reads the section `Example:` of a docstring as code; Griffe knows the plural only."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:(?=\n +>>>)", "Examples:", obj.docstring.value, flags=re.MULTILINE)
