"""Keywords inside the photos, as Lightroom, digiKam and others write them: IPTC "Keywords" and XMP "dc:subject"."""

from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageFile, IptcImagePlugin

from cosa_hf.data.importers.rows import ImportOptions, Row

_IPTC_KEYWORDS = (2, 25)
_XMP_SUBJECT = "{http://purl.org/dc/elements/1.1/}subject"
_RDF_ITEM = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}li"


def read(path: Path, options: ImportOptions) -> Iterator[Row]:
    """The photos below a directory, in the order of their names.

    Raises:
        ValueError: a photo that cannot be read.

    Example:
        >>> Image.new("RGB", (4, 4)).save("a.png")
        >>> [(row.files, row.tags) for row in read(Path("."), ImportOptions())]
        [(['a.png'], [])]
    """
    endings = Image.registered_extensions()
    for file in sorted(path.rglob("*")):
        if file.suffix.lower() in endings:
            try:
                with Image.open(file) as image:
                    words = [*_iptc(image), *_xmp(image)]
            except (OSError, SyntaxError, ValueError) as error:
                raise ValueError(f"{file} cannot be read: {error}; replace it or take it out") from error
            yield Row(str(file), [str(file.relative_to(path))], options.tags(words))


def recognises(path: Path) -> bool:
    """Whether the first photo of a directory has keywords."""
    endings = Image.registered_extensions()
    file = next((file for file in sorted(path.rglob("*")) if file.suffix.lower() in endings), None)
    if file is None:
        return False
    try:
        with Image.open(file) as image:
            return bool(_iptc(image) or _xmp(image))
    except SyntaxError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _iptc(image: ImageFile.ImageFile) -> list[str]:
    found = (IptcImagePlugin.getiptcinfo(image) or {}).get(_IPTC_KEYWORDS, [])
    return [_text(word) for word in (found if isinstance(found, list) else [found])]


def _text(word: bytes) -> str:
    try:
        return word.decode("utf-8")
    except UnicodeDecodeError:  # IPTC is older than UTF-8
        return word.decode("cp1252", "replace")


def _xmp(image: Image.Image) -> list[str]:
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp") or ""
    if not packet:
        return []
    text = packet if isinstance(packet, str) else packet.decode("utf-8", "replace")
    try:
        root = ElementTree.fromstring(text.strip("\0 \n\ufeff"))
    except ElementTree.ParseError as error:
        raise ValueError(f"its XMP is broken ({error})") from error
    return [item.text or "" for subject in root.iter(_XMP_SUBJECT) for item in subject.iter(_RDF_ITEM)]
