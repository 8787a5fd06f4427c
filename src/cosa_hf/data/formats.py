"""From a file to the picture in it: photos, images of more than 8 bits, TIFF of many bands, DICOM.

Pillow reads what it can. What it cannot, or reads as 8 bits where there are more, is read by a library of its own, an
extra each; where one is missing, the error of the file names it.
"""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError, features

from cosa_hf.image_processing_cosa import is_deep, to_8_bit, to_rgb

if find_spec("pillow_heif"):
    import pillow_heif

    pillow_heif.register_heif_opener()

ENDINGS = {*Image.registered_extensions(), ".heic", ".heif", ".hif", ".avif", ".dcm", ".dicom"}
"""How the names of image files end, whether or not the library that reads them is installed."""

TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
DEFLATED_DICOM = b"1.2.840.10008.1.2.1.99"
BITS_PER_SAMPLE = 258  # a TIFF tag
MOST_BYTES = 1 << 31
SAMPLED = 1 << 16  # values of an image that its statistics are of
TAILS = (0.1, 99.9)  # percent: a few hot pixels do not make the range


class ReadingError(ValueError):
    """The settings do not fit a file, which is in order; says which to give."""


ValueRange = tuple[float, float] | Literal["window"] | None


@dataclass(frozen=True)
class Reading:
    """How all files of a dataset become RGB; a model's image processor keeps it, for prediction to do the same.

    Attributes:
        value_range: what values of more than 8 bits are scaled from: (low, high), or "window" for the window that each
            DICOM file has; None leaves it to `to_rgb`, image by image.
        bands: one or three numbers, from 1, of the bands that are grey or red, green and blue; None: the file's own.

    Example:
        >>> from cosa_hf import CoSAImageProcessor
        >>> Reading.of(CoSAImageProcessor(value_range=[0, 4095])).value_range
        (0, 4095)
    """

    value_range: ValueRange = None
    bands: tuple[int, ...] | None = None

    @classmethod
    def of(cls, processor: Any) -> "Reading":
        """What an image processor, of CoSA or another network, has of it."""
        value_range, bands = (getattr(processor, name, None) for name in ("value_range", "bands"))
        if value_range is not None and value_range != "window":
            value_range = tuple(value_range)
        return cls(value_range, None if bands is None else tuple(bands))

    @property
    def lossless(self) -> bool:
        """Whether `open_picture` has to keep all bits; without any setting colours are read as Pillow has them."""
        return self != Reading()

    @property
    def settings(self) -> dict[str, Any]:
        """What is not as for photos, for JSON."""
        values = {"value_range": self.value_range, "bands": self.bands}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None
        }

    def keep(self, processor: Any) -> None:
        """Leave it with a processor, to be saved with it."""
        for name, value in self.settings.items():
            setattr(processor, name, value)


class Look(NamedTuple):
    """What the values of one picture are like: nearly the least and the greatest, in percentiles (`TAILS`)."""

    low: float
    high: float
    deep: bool  # more than 8 bits
    window: tuple[float, float] | None
    several: bool
    size: tuple[int, int]  # width, height, upright


@dataclass(frozen=True)
class Picture:
    """The first picture of a file.

    Attributes:
        image: as Pillow has it; or the values, (H, W) or (H, W, bands), where Pillow would lose some.
        window: low and high of a DICOM file's window.
        several: the file has more pictures: pages, or frames of an animation.
        inverted: low values are bright.
    """

    image: Any
    window: tuple[float, float] | None = None
    several: bool = False
    inverted: bool = False

    @property
    def deep(self) -> bool:
        """Whether there are more than 8 bits a value, which need a range."""
        return is_deep(self.image) if isinstance(self.image, Image.Image) else self.image.dtype != np.uint8

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), upright."""
        if isinstance(self.image, Image.Image):
            return ImageOps.exif_transpose(self.image).size
        return self.image.shape[1], self.image.shape[0]

    def rgb(self, reading: Reading) -> Image.Image:
        """As 8-bit RGB.

        Raises:
            ReadingError: bands that are not in the file or have to be chosen, or no range or window.
        """
        value_range = self._range(reading.value_range) if self.deep else None
        if isinstance(self.image, Image.Image) and reading.bands is None:
            return to_rgb(self.image, value_range)
        values = self._bands(reading.bands)
        if self.deep:
            assert value_range is not None
            values = to_8_bit(values, value_range)
        image = Image.fromarray(np.ascontiguousarray(values)).convert("RGB")
        return ImageOps.invert(image) if self.inverted else image

    def look(self, bands: Sequence[int] | None) -> Look:
        """Statistics of the values, decoding them.

        Raises:
            ReadingError: bands that are not in the file or have to be chosen.
        """
        if self.deep:
            values = self._bands(bands)
        else:
            values = np.asarray(self.rgb(Reading(bands=None if bands is None else tuple(bands))).convert("L"))
        size = values.shape[1], values.shape[0]
        values = values.ravel()[:: max(1, values.size // SAMPLED)].astype(np.float64)
        values = values[np.isfinite(values)]
        low, high = np.percentile(values, TAILS, method="nearest") if values.size else (0.0, 0.0)
        return Look(float(low), float(high), self.deep, self.window, self.several, size)

    def _range(self, value_range: ValueRange) -> tuple[float, float] | None:
        if isinstance(value_range, tuple):
            return value_range
        if self.window is not None:
            return self.window
        if value_range == "window":
            raise ReadingError("it names no window; give the range of all images, as in --value_range 0 4095")
        if not isinstance(self.image, Image.Image):
            raise ReadingError(
                f"it has values of type {self.image.dtype} in no known range; give one, as in --value_range 0 4095"
            )
        return None

    def _bands(self, bands: Sequence[int] | None) -> np.ndarray:
        if isinstance(self.image, Image.Image):
            image = ImageOps.exif_transpose(self.image)
            values = np.asarray(image.convert() if image.mode == "P" else image)
        else:
            values = self.image
        if values.ndim == 3 and values.shape[2] == 1:
            values = values[:, :, 0]
        count = 1 if values.ndim == 2 else values.shape[2]
        if bands is None:
            if count not in (1, 3):
                example = "1" if count == 2 else "3 2 1"
                raise ReadingError(f"it has {count} bands; choose one or three, as in --bands {example}")
            return values
        if max(bands) > count:
            raise ReadingError(f"it has {count} bands, so there is no band {max(bands)} (--bands)")
        chosen = values.reshape(*values.shape[:2], count)[:, :, [band - 1 for band in bands]]
        return chosen[:, :, 0] if len(bands) == 1 else chosen


@contextmanager
def open_picture(source: str | Path | bytes, bands: Sequence[int] | None, lossless: bool) -> Iterator[Picture]:
    """The first picture of a file, or of its bytes; the file is closed afterwards.

    Args:
        source: path or bytes.
        bands: those that will be asked for.
        lossless: keep all bits of colours that have more than 8, where Pillow drops the low ones.

    Raises:
        ValueError: not an image, or too large.
        ImportError: a library is missing; says what to install.
        Exception: whatever decoders raise.

    Example:
        >>> Image.new("RGB", (4, 3)).save("photo.png")
        >>> with open_picture("photo.png", bands=None, lossless=False) as picture:
        ...     picture.size
        (4, 3)
    """
    with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
        head = file.read(4096)
        file.seek(0)
        if head[128:132] == b"DICM":
            yield _dicom(file, head)
            return
        try:
            image = Image.open(file)
        except UnidentifiedImageError as error:
            if not head.startswith(TIFF):
                raise _unknown(head) from error
            image = None
        if image is None or (head.startswith(TIFF) and lossless and (bands is not None or _loses_bits(image))):
            file.seek(0)
            yield _tiff(file, bands)
            return
        # A phone's photo may carry a depth or gain map behind it, of format MPO: no page.
        yield Picture(image, several=bool(getattr(image, "is_animated", False)) and image.format != "MPO")


def _loses_bits(image: Any) -> bool:
    bits = image.tag_v2.get(BITS_PER_SAMPLE, (1,))
    return len(bits) > 1 and max(bits) > 8


def _unknown(head: bytes) -> Exception:
    if head[4:8] == b"ftyp":
        brands = head[8:64]
        if (b"avif" in brands or b"avis" in brands) and not features.check("avif"):
            return ImportError('AVIF needs a newer Pillow: pip install "pillow>=11.3"')
        if b"avi" not in brands and not find_spec("pillow_heif"):
            return ImportError('HEIC needs pillow_heif: pip install "cosa-hf[heif]"')
    return ValueError("no image, or of an unknown format")


def _require(module: str, what: str, extra: str) -> None:
    if not find_spec(module):
        raise ImportError(f'{what} needs {module}: pip install "cosa-hf[{extra}]"')


def _require_size(width: int, height: int, bands: int, bytes_each: int) -> None:
    """The limits of Pillow, for what it does not read: a small file may claim to be a huge image."""
    pixels = 2 * (Image.MAX_IMAGE_PIXELS or 1 << 62)
    if width * height > pixels or width * height * bands * bytes_each > MOST_BYTES:
        raise ValueError(
            f"{width}x{height} with {bands} bands is beyond {pixels / 1e6:.0f} megapixels or {MOST_BYTES / 1e9:.1f} GB"
        )


def _tiff(file: BinaryIO, bands: Sequence[int] | None) -> Picture:
    _require("tifffile", "TIFF of several bands with more than 8 bits, or of a kind that Pillow does not know,", "tiff")
    import tifffile

    with tifffile.TiffFile(file) as tiff:
        page: Any = tiff.pages[0]
        found, several = page, len(tiff.pages) > 1
        if several and bands is not None and page.samplesperpixel == 1:
            found, several = tiff.series[0], len(tiff.series) > 1  # a page for each band
        axes = found.axes
        if not {"Y", "X"} <= set(axes) or len(axes) > 3:
            raise ValueError(f"a TIFF with the axes {axes}, which is not a picture with bands")
        lengths = dict(zip(axes, found.shape, strict=True))
        count = next((length for axis, length in lengths.items() if axis not in "YX"), 1)
        _require_size(lengths["X"], lengths["Y"], count, found.dtype.itemsize)
        if (orientation := page.tags.get("Orientation")) is not None and orientation.value != 1:
            raise ValueError("a TIFF that is stored turned; save it upright")
        values = found.asarray()
        if len(axes) == 3:
            values = np.moveaxis(values, next(place for place, axis in enumerate(axes) if axis not in "YX"), -1)
            if page.photometric == tifffile.PHOTOMETRIC.RGB and bands is None:
                values = values[:, :, :3]  # what follows is no colour
        if (nodata := page.tags.get("GDAL_NODATA")) is not None:
            values = np.where(values == float(nodata.value), np.float32(np.nan), values)
    return Picture(values, several=several)


def _dicom(file: BinaryIO, head: bytes) -> Picture:
    _require("pydicom", "DICOM", "dicom")
    from pydicom import dcmread
    from pydicom.pixels import apply_modality_lut, pixel_array

    if DEFLATED_DICOM in head:
        raise ValueError("deflated DICOM, which could grow without bound as it is read; save it uncompressed")
    dataset = dcmread(file)
    frames, samples = int(dataset.get("NumberOfFrames") or 1), int(dataset.get("SamplesPerPixel", 1))
    _require_size(dataset.Columns, dataset.Rows, samples, max(1, dataset.BitsAllocated // 8))
    values = pixel_array(dataset, index=0)
    if samples > 1:
        return Picture(values, several=frames > 1)
    values = apply_modality_lut(values, dataset)
    window = None
    if "WindowCenter" in dataset and "WindowWidth" in dataset:
        # Several windows are alternatives. The bounds are those of PS3.3 C.11.2.1.2.1.
        center, width = (
            float(np.atleast_1d(np.asarray(dataset[name].value, dtype=float))[0])
            for name in ("WindowCenter", "WindowWidth")
        )
        reach = max(width - 1, 1) / 2
        window = (center - 0.5 - reach, center - 0.5 + reach)
        values = values.astype(np.float32)  # a window is for values of any depth
    return Picture(values, window, frames > 1, inverted=dataset.get("PhotometricInterpretation") == "MONOCHROME1")


__all__ = ["ENDINGS", "Look", "Picture", "Reading", "ReadingError", "open_picture"]
