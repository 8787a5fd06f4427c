"""CVAT's XML "for images": tags of images, and the labels of boxes, polygons and every other shape."""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from cosa_hf.data.importers.rows import ImportOptions, Row


def read(path: Path, options: ImportOptions) -> Iterator[Row]:
    """The images of an export, with their subset as the split.

    Raises:
        ValueError: no such XML, or one of a video.

    Example:
        >>> xml = '<annotations><image name="a.jpg"><tag label="cat"/><box label="dog"/></image></annotations>'
        >>> _ = Path("annotations.xml").write_text(xml)
        >>> [(row.files, row.tags) for row in read(Path("annotations.xml"), ImportOptions())]
        [(['a.jpg'], ['cat', 'dog'])]
    """
    try:
        root = ElementTree.parse(path).getroot()
    except ElementTree.ParseError as error:
        raise ValueError(f"{path} is not valid XML: {error}") from error
    if root.tag != "annotations" or root.find("track") is not None:
        raise ValueError(f'{path} is not XML of images: export from CVAT as "CVAT for images 1.1"')
    for image in root.iter("image"):
        subset = image.get("subset", "")
        yield Row(
            f"{path}, image {image.get('id', '')}",
            [image.get("name", "")],
            options.tags([mark.get("label", "") for mark in image]),
            split="" if subset == "default" else subset,
        )


def recognises(path: Path) -> bool:
    """Whether the outermost element is CVAT's."""
    return path.suffix.lower() == ".xml" and "<annotations>" in path.read_text("utf-8", "replace")[:500]
