import numpy as np
import pytest
from images_of import image_of
from PIL import Image

from cosa_hf.data.images import read_confidence, read_image, read_mask, undecoded


@pytest.fixture
def jpeg(tmp_path):
    path = tmp_path / "photo.jpg"
    image_of(64, 48).save(path, quality=95)
    return path


def _mask_of(tmp_path, ids) -> str:
    path = tmp_path / "mask.png"
    Image.fromarray(np.asarray(ids, dtype=np.uint8)).save(path)
    return path


def test_reads_what_pillow_reads(jpeg, one_image):
    expected = np.asarray(Image.open(jpeg))
    dataset = one_image(jpeg)
    assert np.array_equal(read_image(undecoded(dataset)[0]), expected)
    assert np.array_equal(read_image(dataset[0]), expected), "of a decoded row"


@pytest.mark.parametrize("damage", ["truncated", "empty", "no image", "gone"])
def test_a_broken_file_is_named(jpeg, one_image, damage):
    content = jpeg.read_bytes()
    if damage == "gone":
        jpeg.unlink()
    else:
        jpeg.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "no image": b"hello"}[damage])
    with pytest.raises(ValueError, match=rf"cannot read the image of image 'photo' \({jpeg}\)"):
        read_image(undecoded(one_image(jpeg))[0])


def test_broken_bytes_are_named(one_image, jpeg):
    example = undecoded(one_image(jpeg))[0] | {"image": {"path": None, "bytes": b"\x89PNG"}}
    with pytest.raises(ValueError, match="image 'photo'"):
        read_image(example)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_every_mode_becomes_rgb(tmp_path, one_image, mode):
    path = tmp_path / ("photo.tif" if mode == "CMYK" else "photo.png")
    gray = np.full((6, 9), 128, dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(gray.astype(np.uint16) * 257)
    elif mode == "CMYK":
        image = Image.fromarray(np.stack([gray * 0, gray * 0, gray * 0, 255 - gray], axis=2), mode="CMYK")
    else:
        image = Image.fromarray(gray).convert(mode)
    image.save(path)
    read = read_image(undecoded(one_image(path))[0])
    assert (read.mode, read.size) == ("RGB", (9, 6))
    if mode != "1":  # dithering keeps the mean only
        assert np.abs(np.asarray(read).astype(int) - 128).max() <= 2


def test_mask_agrees_with_the_upright_image(tmp_path, one_image):
    path = tmp_path / "photo.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: stored 20 x 10, shown 10 x 20
    image_of(20, 10).save(path, exif=exif)
    upright = undecoded(one_image(path, _mask_of(tmp_path, np.ones((20, 10)))))[0]
    assert read_image(upright).size == (10, 20)
    assert read_mask(upright, read_image(upright).size, num_classes=2).size == (10, 20)
    lying = undecoded(one_image(path, _mask_of(tmp_path, np.ones((10, 20)))))[0]
    with pytest.raises(ValueError, match="20x10"):
        read_mask(lying, read_image(lying).size, num_classes=2)


@pytest.mark.parametrize("palette", [False, True])
def test_mask_ids_are_kept(tmp_path, one_image, jpeg, palette):
    ids = np.array([[0, 1, 2], [255, 2, 0]], dtype=np.uint8)
    mask = Image.fromarray(ids)
    if palette:
        mask.putpalette([10 * value % 256 for value in range(768)])
        assert mask.mode == "P"
    mask.save(tmp_path / "mask.png")
    read = read_mask(undecoded(one_image(jpeg, tmp_path / "mask.png"))[0], (3, 2), num_classes=2)
    assert read.mode == "L"
    assert np.array_equal(read, ids)


def test_mask_of_another_size(tmp_path, one_image, jpeg):
    example = undecoded(one_image(jpeg, _mask_of(tmp_path, np.zeros((48, 63)))))[0]
    with pytest.raises(ValueError, match=r"'photo' is 63x48 \(width x height\), its image is 64x48"):
        read_mask(example, read_image(example).size, num_classes=2)


def test_mask_with_unknown_ids(tmp_path, one_image, jpeg):
    example = undecoded(one_image(jpeg, _mask_of(tmp_path, [[0, 1, 2, 3, 77, 255]])))[0]
    with pytest.raises(ValueError, match=r"'photo' holds the ids \[3, 77\]: expected 0 .*, 1\.\.2"):
        read_mask(example, (6, 1), num_classes=2)
    with pytest.raises(ValueError, match=r"the ids \[3, 255\]"):
        read_mask(example, (6, 1), num_classes=2, ignore_index=77)


@pytest.mark.parametrize("num_classes", [2, 254, 255, 1000])
def test_masks_of_sixteen_bits_are_read_whatever_the_number_of_classes(tmp_path, one_image, jpeg, num_classes):
    ids = np.array([[0, 1, num_classes, 65535]])
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "mask.png")
    read = read_mask(undecoded(one_image(jpeg, tmp_path / "mask.png"))[0], (4, 1), num_classes)
    assert np.asarray(read).tolist() == [[0, 1, num_classes, 255 if num_classes < 255 else 65535]]


def test_255_in_eight_bits_is_not_taken_for_one_of_many_classes(tmp_path, one_image, jpeg):
    example = undecoded(one_image(jpeg, _mask_of(tmp_path, [[0, 254, 255]])))[0]
    with pytest.raises(ValueError, match=r"255 in 8 bits, .*: save it in 16 bits, where 65535 means ignore"):
        read_mask(example, (3, 1), num_classes=1000)
    Image.fromarray(np.array([[0, 254, 65535]], dtype=np.uint16)).save(tmp_path / "mask.png")  # as it says
    assert np.asarray(read_mask(example, (3, 1), num_classes=1000)).tolist() == [[0, 254, 65535]]


def test_mask_in_colour_is_refused(tmp_path, one_image, jpeg):
    image_of(64, 48).save(tmp_path / "mask.png")
    example = undecoded(one_image(jpeg, tmp_path / "mask.png"))[0]
    with pytest.raises(ValueError, match="'photo' has mode 'RGB': expected class ids in a grayscale or palette PNG"):
        read_mask(example, (64, 48), num_classes=2)
    for mode in ("L", "P", "I;16"):
        Image.new(mode, (64, 48), 1).save(tmp_path / "mask.png")
        assert np.unique(read_mask(example, (64, 48), num_classes=2)).tolist() == [1], "as it says"


def test_confidence_is_a_grey_image_of_the_images_size():
    grey = Image.new("L", (4, 3), 7)
    assert read_confidence({"image_id": "photo", "confidence": grey}, (4, 3)) == grey
    for image, size in ((grey, (3, 4)), (Image.new("RGB", (4, 3)), (4, 3))):
        with pytest.raises(ValueError, match=r"confidence of image 'photo' has mode .*: expected a grey image of"):
            read_confidence({"image_id": "photo", "confidence": image}, size)
