"""Files of more than 8 bits, of many bands and of formats that need a library of their own."""

import importlib.util
import re
import tomllib
from pathlib import Path

import numpy as np
import PIL
import pytest
from hostile import dicom, saved, tiff
from images_of import image_of
from packaging.requirements import Requirement
from PIL import Image, features

import cosa_hf.data.formats
from cosa_hf.data import undecoded
from cosa_hf.data.formats import Reading, open_picture
from cosa_hf.data.images import UnreadableImageError, look_at, open_image, read_image, upright_size

BANDS = np.random.default_rng(0).integers(0, 4096, (6, 9, 5), dtype=np.uint16)
RANGE = Reading((0.0, 4095.0))


def grey(image) -> np.ndarray:
    rgb = np.asarray(image)
    assert (rgb[..., :1] == rgb).all()
    return rgb[..., 0]


def expected(values, low=0.0, high=4095.0) -> np.ndarray:
    return np.rint((np.clip(values.astype(float), low, high) - low) / (high - low) * 255)


@pytest.fixture
def without(monkeypatch):
    """Makes a library one that is not installed."""
    find = importlib.util.find_spec
    return lambda module: monkeypatch.setattr(
        cosa_hf.data.formats, "find_spec", lambda name: None if name == module else find(name)
    )


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_12_bits_in_16_are_scaled_from_their_range(tmp_path, format):
    values = BANDS[..., 0]
    Image.fromarray(values).save(tmp_path / "photo", format)
    assert np.array_equal(grey(open_image(tmp_path / "photo", RANGE)), expected(values))
    assert grey(open_image(tmp_path / "photo")).max() <= 16, "without a range from all 16 bits"


def test_floats_just_beyond_1_are_not_black(tmp_path):
    values = np.linspace(0, 1.02, 54, dtype=np.float32).reshape(6, 9)
    Image.fromarray(values).save(tmp_path / "photo.tif")
    read = grey(open_image(tmp_path / "photo.tif", Reading((0.0, 1.02))))
    assert np.array_equal(read, np.rint(values / 1.02 * 255))


@pytest.mark.parametrize("planar", [False, True])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_bands_of_a_tiff(tmp_path, planar, compression):
    pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    values = np.ascontiguousarray(np.moveaxis(BANDS, -1, 0)) if planar else BANDS
    config = {"planarconfig": "separate" if planar else "contig", "compression": compression}
    (tmp_path / "field.tif").write_bytes(tiff(values, photometric="minisblack", **config))
    read = np.asarray(open_image(tmp_path / "field.tif", Reading((0.0, 4095.0), (4, 3, 2))))
    assert np.array_equal(read, expected(BANDS[..., [3, 2, 1]]))
    read = open_image(tmp_path / "field.tif", Reading((0.0, 4095.0), (5,)))
    assert np.array_equal(grey(read), expected(BANDS[..., 4]))


def test_a_page_for_each_band(tmp_path):
    pytest.importorskip("tifffile")
    (tmp_path / "field.tif").write_bytes(
        tiff(np.ascontiguousarray(np.moveaxis(BANDS, -1, 0)), photometric="minisblack")
    )
    read = np.asarray(open_image(tmp_path / "field.tif", Reading((0.0, 4095.0), (4, 3, 2))))
    assert np.array_equal(read, expected(BANDS[..., [3, 2, 1]]))


def test_colours_of_16_bits_keep_all_of_them_where_a_range_needs_them(tmp_path):
    pytest.importorskip("tifffile")
    (tmp_path / "photo.tif").write_bytes(tiff(BANDS[..., :3], photometric="rgb"))
    assert np.array_equal(np.asarray(open_image(tmp_path / "photo.tif", RANGE)), expected(BANDS[..., :3]))
    assert np.array_equal(np.asarray(open_image(tmp_path / "photo.tif")), BANDS[..., :3] >> 8), "as before"


def test_missing_data_is_not_part_of_the_range(tmp_path):
    pytest.importorskip("tifffile")
    values = BANDS[..., 0].astype(np.float32)
    values[0] = -9999
    tags = [(42113, 2, 6, "-9999", True)]  # GDAL_NODATA
    bands = np.stack([values] * 3, -1)
    content = tiff(bands, photometric="minisblack", planarconfig="contig", extratags=tags)
    (tmp_path / "field.tif").write_bytes(content)
    example = {"image_id": "field", "image": {"path": str(tmp_path / "field.tif"), "bytes": None}}
    assert look_at(example, None).low >= 0
    assert (grey(read_image(example, RANGE))[0] == 0).all()


def test_bands_that_are_not_there_or_have_to_be_chosen(tmp_path):
    pytest.importorskip("tifffile")
    (tmp_path / "field.tif").write_bytes(tiff(BANDS, photometric="minisblack", planarconfig="contig"))
    (tmp_path / "two.tif").write_bytes(tiff(BANDS[..., :2], photometric="minisblack", planarconfig="contig"))
    for name, bands in (("field", (3, 2, 1)), ("two", (1,))):
        advised = rf"bands; choose one or three, as in --bands {' '.join(map(str, bands))}$"
        with pytest.raises(UnreadableImageError, match=advised):
            open_image(tmp_path / f"{name}.tif", RANGE)
        with pytest.raises(UnreadableImageError, match=r"no known range; give one, as in --value_range 0 4095"):
            open_image(tmp_path / f"{name}.tif", Reading(None, bands))
        assert open_image(tmp_path / f"{name}.tif", Reading((0.0, 4095.0), bands)).size == (9, 6), "as advised"
    image_of(4, 3).save(tmp_path / "photo.png")
    with pytest.raises(UnreadableImageError, match="has 3 bands, so there is no band 4"):
        open_image(tmp_path / "photo.png", Reading(None, (4, 3, 2)))


def test_bands_of_a_photo(tmp_path):
    image = image_of(4, 3)
    image.save(tmp_path / "photo.png")
    read = np.asarray(open_image(tmp_path / "photo.png", Reading(None, (3, 2, 1))))
    assert np.array_equal(read, np.asarray(image)[..., ::-1])


def test_dicom_has_its_own_window_or_the_sets_range(tmp_path):
    pytest.importorskip("pydicom")
    stored = BANDS[..., 0].astype(np.int16)
    units = stored - 1024
    made = dicom(stored, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=[40.5, 500], WindowWidth=[401, 2000])
    (tmp_path / "slice.dcm").write_bytes(made)
    for reading in (Reading("window"), Reading()):
        assert np.array_equal(grey(open_image(tmp_path / "slice.dcm", reading)), expected(units, -160, 240))
    read = open_image(tmp_path / "slice.dcm", Reading((-1024.0, 3071.0)))
    assert np.array_equal(grey(read), expected(units, -1024, 3071))
    (tmp_path / "bright.dcm").write_bytes(dicom(BANDS[..., 0], PhotometricInterpretation="MONOCHROME1"))
    assert np.array_equal(grey(open_image(tmp_path / "bright.dcm", RANGE)), 255 - expected(BANDS[..., 0]))


def test_dicom_without_a_window(tmp_path):
    pytest.importorskip("pydicom")
    (tmp_path / "slice.dcm").write_bytes(dicom(BANDS[..., 0]))
    with pytest.raises(
        UnreadableImageError, match="names no window; give the range of all images, as in --value_range"
    ):
        open_image(tmp_path / "slice.dcm", Reading("window"))
    assert np.array_equal(grey(open_image(tmp_path / "slice.dcm", RANGE)), expected(BANDS[..., 0])), "as advised"


@pytest.mark.parametrize(
    ("module", "extra", "make"),
    [
        ("tifffile", "tiff", lambda: tiff(BANDS, photometric="minisblack", planarconfig="contig")),
        ("pydicom", "dicom", lambda: dicom(BANDS[..., 0])),
    ],
)
def test_a_missing_library_is_named_with_the_file(one_image, tmp_path, without, monkeypatch, module, extra, make):
    """And with it the file is read."""
    pytest.importorskip(module)
    (tmp_path / "slice.dcm").write_bytes(make())
    example = undecoded(one_image(tmp_path / "slice.dcm"))[0]
    without(module)
    with pytest.raises(
        ValueError, match=rf"image 'slice' \(.*slice.dcm\): .* needs {module}: pip install \"cosa-hf\[{extra}\]\"$"
    ):
        read_image(example)
    monkeypatch.undo()
    assert np.array_equal(grey(read_image(example, Reading((0.0, 4095.0), (1,)))), expected(BANDS[..., 0]))


def test_extras_that_errors_name_bring_what_is_missing():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    brought = {
        extra: {Requirement(line).name.replace("-", "_") for line in lines}
        for extra, lines in project["optional-dependencies"].items()
    }
    code = "".join(path.read_text() for path in Path(cosa_hf.__file__).parent.rglob("*.py"))
    named = set(re.findall(r"cosa-hf\[(\w+)\]", code)) | set(re.findall(r'_require\(.*, "(\w+)"\)', code))
    missing = {
        "heif": {"pillow_heif"}, "tiff": {"tifffile"}, "dicom": {"pydicom"}, "coco": {"pycocotools"},
        "onnx": {"onnx", "onnxscript", "onnxruntime"}, "app": {"gradio"}, "trackio": {"trackio"},
    }  # fmt: skip
    assert named == set(missing)
    for extra, modules in missing.items():
        assert modules <= brought[extra]


def test_the_pillow_that_the_error_of_avif_names_has_it():
    """This one, where it is as new; and the package allows it."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    (asked,) = re.findall(r"AVIF needs.*pip install \"(.+)\"'", Path(cosa_hf.data.formats.__file__).read_text())
    asked = Requirement(asked)
    (oldest,) = (part.version for part in asked.specifier)
    for line in (*project["dependencies"], *project["optional-dependencies"]["heif"]):
        if Requirement(line).name == asked.name:
            assert oldest in Requirement(line).specifier
    assert features.check("avif") or PIL.__version__ not in asked.specifier


def test_what_an_error_advises_to_save_otherwise_is_read(tmp_path):
    """A TIFF that lies on its side, and a deflated DICOM."""
    for library in ("tifffile", "pydicom"):
        pytest.importorskip(library)
    options = {"photometric": "minisblack", "planarconfig": "contig"}
    turned, upright = (tiff(BANDS, **options, extratags=[(274, 3, 1, place, True)]) for place in (6, 1))
    plain = dicom(BANDS[..., 0])
    deflated = plain.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99", 1)  # seen before it is inflated
    stored = {
        "field.tif": (turned, "stored turned; save it upright", upright),
        "slice.dcm": (deflated, "save it uncompressed", plain),
    }
    for name, (before, advice, after) in stored.items():
        (tmp_path / name).write_bytes(before)
        with pytest.raises(UnreadableImageError, match=advice):
            open_image(tmp_path / name, Reading((0.0, 4095.0), (1,)))
        (tmp_path / name).write_bytes(after)
        assert open_image(tmp_path / name, Reading((0.0, 4095.0), (1,))).size == (9, 6)


@pytest.mark.parametrize(
    ("format", "advice"),
    [
        ("HEIF", r'HEIC needs pillow_heif: pip install "cosa-hf\[heif\]"'),
        ("AVIF", 'AVIF needs a newer Pillow: pip install "pillow>=11.3"'),
    ],
)
def test_heic_and_avif_are_read_once_their_library_is_there(format, advice, tmp_path, without, monkeypatch):
    if format == "HEIF":
        pytest.importorskip("pillow_heif")
    elif not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    image = Image.new("RGB", (64, 48), (200, 100, 50))
    (tmp_path / "photo").write_bytes(saved(image, format, quality=95))
    without("pillow_heif")
    monkeypatch.setattr(features, "check", lambda name: False)
    monkeypatch.setattr(Image, "OPEN", {name: how for name, how in Image.OPEN.items() if name != format})
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != format])
    with pytest.raises(UnreadableImageError, match=advice):
        open_image(tmp_path / "photo")
    monkeypatch.undo()
    assert np.abs(np.asarray(open_image(tmp_path / "photo")).astype(int) - (200, 100, 50)).max() <= 6


def test_of_several_pages_the_first_is_taken_and_said(tmp_path, caplog):
    first, second = Image.new("RGB", (4, 3), "white"), Image.new("RGB", (4, 3), "black")
    for name in ("frames.gif", "pages.tif", "frames.webp"):
        first.copy().save(tmp_path / name, save_all=True, append_images=[second.copy()])
        assert open_image(tmp_path / name).getpixel((0, 0)) == (255, 255, 255)
        assert f"{name} has several pages or frames: the first is taken" in caplog.text
    caplog.clear()
    first.save(tmp_path / "one.gif")
    first.copy().save(tmp_path / "phone.jpg", "MPO", save_all=True, append_images=[second.copy()])
    open_image(tmp_path / "one.gif")
    open_image(tmp_path / "phone.jpg")
    assert not caplog.text


def test_sizes_are_upright(tmp_path, one_image):
    exif = Image.Exif()
    exif[0x0112] = 6
    image_of(20, 10).save(tmp_path / "photo.jpg", exif=exif)
    example = undecoded(one_image(tmp_path / "photo.jpg"))[0]
    assert upright_size(example) == look_at(example, None).size == (10, 20)


def test_a_file_claims_to_be_huge(tmp_path):
    pytest.importorskip("tifffile")
    content = bytearray(tiff(BANDS, photometric="minisblack", planarconfig="contig"))
    for tag in (b"\x00\x01", b"\x01\x01"):  # ImageWidth and ImageLength
        place = next(at for at in range(8, len(content)) if content[at : at + 2] == tag and content[at + 2] in (3, 4))
        content[place + 2 : place + 12] = b"\x04\x00\x01\x00\x00\x00" + (10**6).to_bytes(4, "little")
    (tmp_path / "field.tif").write_bytes(bytes(content))
    with pytest.raises(UnreadableImageError, match="1000000x1000000 with 5 bands is beyond 179 megapixels"):
        open_image(tmp_path / "field.tif", RANGE)


def test_an_empty_row(one_image, tmp_path):
    for value in (None, {"path": None, "bytes": None}):
        with pytest.raises(UnreadableImageError, match="the row is empty"):
            read_image({"image_id": "a", "image": value})


def test_the_file_is_closed(tmp_path):
    image_of(4, 3).save(tmp_path / "photo.png")
    with open_picture(tmp_path / "photo.png", None, lossless=False) as picture:
        file = picture.image.fp
    assert file.closed
