"""Images as no camera writes them: files of all formats, damaged from a seed, and what each reader makes of them."""

import io
import struct
import zlib
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import torch
from datasets import Dataset
from images_of import image_of
from PIL import Image, features

from cosa_hf import CoSAImageProcessor
from cosa_hf.data import TrainingDataset, Views
from cosa_hf.data.check import check_splits
from cosa_hf.data.images import UnreadableImageError
from cosa_hf.data.options import PictureConfig
from cosa_hf.data.tags import tag_features
from cosa_hf.data.value_range import settled_reading
from cosa_hf.inference import Segmenter

SIDE = 40


def saved(image, format, **options) -> bytes:
    buffer = io.BytesIO()
    image.copy().save(buffer, format, **options)  # saving leaves options with an image
    return buffer.getvalue()


def dicom(values, **fields) -> bytes:
    """A file as a scanner writes it: 12 bits, or 16 with a sign."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["hostile"])
    made = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    made.Rows, made.Columns = values.shape
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    signed = values.dtype.kind == "i"
    made.BitsAllocated, made.BitsStored, made.HighBit = 16, *((16, 15) if signed else (12, 11))
    made.PixelRepresentation = int(signed)
    for name, value in fields.items():
        setattr(made, name, value)
    made.PixelData = values.tobytes()
    buffer = io.BytesIO()
    made.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def tiff(values, **options) -> bytes:
    import tifffile

    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png_of(width: int, height: int, content: bytes, depth: int = 1) -> bytes:
    """One that claims a size, whatever its content is."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def whole_files() -> list[bytes]:
    """An image in every format that can be written here."""
    photo, other = image_of(SIDE, SIDE), image_of(SIDE, SIDE - 1)
    deep = np.random.default_rng(0).integers(0, 4096, (SIDE, SIDE), dtype=np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [saved(photo.convert(mode), "PNG") for mode in ("RGB", "P", "LA", "1", "RGBA")]
    files += [saved(Image.fromarray(deep), format) for format in ("PNG", "TIFF")]
    files += [saved(Image.fromarray(deep.astype(np.float32)), "TIFF"), saved(photo, "TIFF", compression="tiff_lzw")]
    files += [
        saved(photo, "JPEG", exif=exif),
        saved(photo, "JPEG", progressive=True),
        saved(photo.convert("L"), "JPEG"),
    ]
    files += [saved(photo.convert("CMYK"), "JPEG"), saved(photo, "MPO", save_all=True, append_images=[other.copy()])]
    files += [saved(photo, "GIF", save_all=True, append_images=[photo.rotate(90)]), saved(photo, "WEBP")]
    files += [saved(photo, format) for format in ("BMP", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS")]
    files += [saved(photo, "TIFF", save_all=True, append_images=[other.copy()])]
    if features.check("jpg_2000"):
        files.append(saved(photo, "JPEG2000"))
    if features.check("avif"):
        files.append(saved(photo, "AVIF"))
    if find_spec("pillow_heif"):
        files.append(saved(photo, "HEIF"))
    if find_spec("tifffile"):
        bands = np.stack([deep] * 3, axis=-1)
        files += [tiff(bands, photometric="rgb"), tiff(bands, photometric="rgb", compression="zlib")]
    if find_spec("pydicom"):
        window = {"WindowCenter": 2000, "WindowWidth": 3000}
        files += [dicom(deep), dicom(deep.astype(np.int16), RescaleSlope=1, RescaleIntercept=-1024, **window)]
    return files


def damaged(seed: int, files: list[bytes]) -> bytes:
    """One of the files after an accident or two; one in five hundred is a bomb."""
    rng = np.random.default_rng(seed)
    if seed % 500 == 7:
        return bomb(seed // 500)
    content = bytearray(files[rng.integers(len(files))])
    for _ in range(1 + int(rng.random() < 0.3)):
        place = int(rng.integers(max(1, len(content))))
        match rng.integers(7):
            case 0:  # flipped bits
                for at in rng.integers(len(content), size=rng.integers(1, 9)) if content else ():
                    content[at] ^= 1 << rng.integers(8)
            case 1:  # flipped bits of the header
                for at in rng.integers(min(128, len(content)), size=rng.integers(1, 3)) if content else ():
                    content[at] ^= 1 << rng.integers(8)
            case 2:  # cut short
                del content[place:]
            case 3:  # the start of another file
                other = files[rng.integers(len(files))]
                length = int(rng.integers(1, 64))
                content[:length] = other[:length]
            case 4:  # a piece of zeros, or of ones
                content[place : place + 64] = bytes([rng.choice([0, 255])]) * len(content[place : place + 64])
            case 5:  # a piece twice
                content[place:place] = content[place : place + int(rng.integers(1, 256))]
            case 6:  # a piece missing
                del content[place : place + int(rng.integers(1, 64))]
    return bytes(content)


def bomb(number: int) -> bytes:
    """A few bytes that claim or hold a great many pixels."""
    match number % 5:
        case 0:
            return png_of(2**31 - 1, 2**31 - 1, b"")
        case 1:
            return png_of(60_000, 60_000, bytes(1_000_000))
        case 2:  # 36 megapixels of nothing, which is allowed
            return png_of(6000, 6000, bytes(751 * 6000))
        case 3:
            return b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0)
    return (
        b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0)
    )


class Bands(torch.nn.Module):
    """The least network that segments: its logits are the colours."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.config = SimpleNamespace(model_type="bands", num_labels=3, id2label=dict(enumerate("abc")))

    def forward(self, pixel_values):
        return SimpleNamespace(logits=pixel_values * self.weight)


def readers_on(seeds, directory) -> dict[str, set[str]]:
    """The images of `seeds` that check, training and prediction call unreadable, each by name, all others read."""
    files, paths = whole_files(), []
    for seed in seeds:
        paths.append(directory / f"{seed}.img")
        paths[-1].write_bytes(damaged(seed, files))
    names = [path.stem for path in paths]
    columns = {"image": [str(path) for path in paths], "labels": [[0]] * len(paths), "image_id": names}
    dataset = Dataset.from_dict(columns, features=tag_features(["cat"]))

    found = check_splits({"train": dataset}, progress=False)
    reading = settled_reading(PictureConfig(), dataset, 0, say=lambda line: None)
    refused = {"check": {name for name in names if any(f"'{name}'" in line for line in found.errors["unreadable"])}}
    assert len(refused["check"]) == len(found.errors["unreadable"])

    items = TrainingDataset(dataset, Views(16, (0.5,) * 3, (0.5,) * 3), len(dataset), seed=0, reading=reading)
    told = [items[position]["unreadable"] for position in range(len(items))]
    refused["training"] = {name for name in names if any(f"'{name}'" in line for line in told)}

    processor = CoSAImageProcessor(size={"height": 16, "width": 16}, **reading.settings)
    segmenter = Segmenter(Bands(), processor)
    refused["predict"] = set()
    for path in paths:
        try:
            one = segmenter(path)
            assert one.mask.shape == (one.image.height, one.image.width)
        except UnreadableImageError as error:
            refused["predict"] |= {path.stem} if str(path) in str(error) else set()
    return refused
