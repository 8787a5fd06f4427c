"""A directory of annotations in VOC's XML, with classes of your own: the names of an image's objects are its tags."""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from cosa_hf.data.importers.rows import ImportOptions, Row


def read(path: Path, options: ImportOptions) -> Iterator[Row]:
    """The files of a directory, each of the image with its name; where there is none, of the one that it names.

    Raises:
        ValueError: no XML files, or one that is not VOC's.

    Example:
        >>> Path("Annotations").mkdir()
        >>> xml = "<annotation><filename>a.jpg</filename><object><name>cat</name></object></annotation>"
        >>> _ = Path("Annotations/a.xml").write_text(xml)
        >>> [(row.files, row.tags) for row in read(Path("Annotations"), ImportOptions())]
        [(['a', 'a.jpg'], ['cat'])]
    """
    files = sorted(path.rglob("*.xml")) if path.is_dir() else [path]
    if not files:
        raise ValueError(f"{path} has no XML files: pass the directory of the annotations")
    for file in files:
        try:
            annotation = ElementTree.parse(file).getroot()
        except ElementTree.ParseError as error:
            raise ValueError(f"{file} is not valid XML: {error}") from error
        if annotation.tag != "annotation":
            raise ValueError(f"{file} is not an annotation of VOC: its outermost element is {annotation.tag}")
        # Direct children only: the body parts of a person have names too.
        names = [element.text or "" for element in annotation.findall("object/name")]
        named = annotation.findtext("filename", "").strip()
        yield Row(str(file), [file.stem, *([named] if named else [])], options.tags(names))


def recognises(path: Path) -> bool:
    """Whether a directory's first XML file, or a file, is an annotation of VOC."""
    file = next(iter(sorted(path.glob("*.xml"))), None) if path.is_dir() else path
    return bool(file and file.suffix.lower() == ".xml" and "<annotation>" in file.read_text("utf-8", "replace")[:500])
