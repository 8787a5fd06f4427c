"""What other tools export, as docs/own-data.md shows it: files, photos, and the table that comes of them."""

import json

from PIL import Image
from PIL.PngImagePlugin import PngInfo

#: Every file of the exports, by its path.
FILES = {
    "roboflow/_classes.csv": "filename, cat, dog\n1.jpg, 1, 0\n2.jpg, 0, 0\n3.jpg, 1, 1\n",
    "openimages/labels.csv": (
        "ImageID,Source,LabelName,Confidence\n"
        "1,verification,/m/01yrx,1\n1,verification,/m/0bt9lr,0\n"
        "2,verification,/m/01yrx,0\n2,verification,/m/0bt9lr,0\n"
        "3,verification,/m/0bt9lr,1\n3,machine,/m/01yrx,0.7\n"
        "4,verification,/m/01yrx,0\n"
    ),
    "openimages/names.csv": "LabelName,DisplayName\n/m/01yrx,Cat\n/m/0bt9lr,Dog\n",
    "kaggle/train.csv": "image_name,tags\n1,haze primary\n2,primary\n3,clear primary water\n",
    "labelstudio/export.json": json.dumps(
        [
            {
                "id": 7,
                "annotations": [
                    {"result": [{"from_name": "choice", "type": "choices", "value": {"choices": ["cat", "dog"]}}]}
                ],
                "data": {"image": "/data/upload/1/0a1b2c3d-1.jpg"},
            },
            {"id": 8, "annotations": [], "data": {"image": "/data/local-files/?d=labelstudio/2.jpg"}},
            {
                "id": 9,
                "annotations": [
                    {"was_cancelled": True, "result": [{"type": "choices", "value": {"choices": ["dog"]}}]},
                    {"result": [{"from_name": "choice", "type": "choices", "value": {"choices": ["cat"]}}]},
                ],
                "data": {"image": "s3://bucket/some/3.jpg"},
            },
        ]
    ),
    "cvat/annotations.xml": (
        "<annotations><version>1.1</version>\n"
        '<image name="1.jpg" subset="Train"><tag label="cat"/><box label="dog" xtl="1"/></image>\n'
        '<image name="sub/2.jpg" subset="Validation"><polygon label="dog" points="1,1"/></image>\n</annotations>'
    ),
    "own-coco/instances.json": (
        '{"categories": [{"id": 4, "name": "cat"}, {"id": 9, "name": "unused"}],\n'
        '"images": [{"id": 1, "file_name": "1.jpg"}, {"id": 2, "file_name": "2.jpg"}],\n'
        '"annotations": [{"id": 1, "image_id": 1, "category_id": 4}]}'
    ),
    "own-voc/Annotations/1.xml": (
        "<annotation><filename>1.jpg</filename>\n<object><name>cat</name><part><name>tail</name></part></object>\n"
        "<object><name>cat</name></object></annotation>"
    ),
    "own-voc/Annotations/renamed.xml": "<annotation><filename>2.jpg</filename></annotation>",
    "hf/train/metadata.jsonl": '{"file_name": "1.jpg", "label": "cat"}\n{"file_name": "2.jpg", "label": "dog"}\n',
    "hf/validation/metadata.jsonl": '{"file_name": "3.jpg", "label": "dog"}\n',
}

#: The table of each directory: image -> (tags, split).
TABLES = {
    "roboflow": {"1.jpg": ("cat", ""), "2.jpg": ("-", ""), "3.jpg": ("cat; dog", "")},
    "openimages": {"1.jpg": ("Cat", ""), "2.jpg": ("-", ""), "3.jpg": ("Dog", ""), "4.jpg": ("", "")},
    "kaggle": {"1.jpg": ("haze; primary", ""), "2.jpg": ("primary", ""), "3.jpg": ("clear; primary; water", "")},
    "labelstudio": {"1.jpg": ("cat; dog", ""), "2.jpg": ("", ""), "3.jpg": ("cat", "")},
    "cvat": {"1.jpg": ("cat; dog", "Train"), "sub/2.jpg": ("dog", "Validation")},
    "own-coco": {"1.jpg": ("cat", ""), "2.jpg": ("", "")},
    "own-voc": {"1.jpg": ("cat", ""), "2.jpg": ("", "")},
    "hf": {"train/1.jpg": ("cat", "train"), "train/2.jpg": ("dog", "train"), "validation/3.jpg": ("dog", "validation")},
    "lightroom": {"1.jpg": ("garden chair; Gänse", ""), "2.png": ("cat", ""), "3.jpg": ("", "")},
}


def xmp(*keywords):
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" '
        f'xmlns:dc="http://purl.org/dc/elements/1.1/"><rdf:Description><dc:subject><rdf:Bag>{items}</rdf:Bag>'
        "</dc:subject></rdf:Description></rdf:RDF></x:xmpmeta>"
    ).encode()


def iptc(content, *keywords):
    """A JPEG with keywords in its IPTC block, as Photoshop puts them there."""
    words = [word.encode() for word in keywords]
    records = b"".join(b"\x1c\x02\x19" + len(word).to_bytes(2, "big") + word for word in words)
    resource = b"8BIM\x04\x04\0\0" + len(records).to_bytes(4, "big") + records + b"\0" * (len(records) % 2)
    block = b"Photoshop 3.0\0" + resource
    return content[:2] + b"\xff\xed" + (len(block) + 2).to_bytes(2, "big") + block + content[2:]


def write_exports(root):
    """All exports with their photos, each in a directory of its own below `root`."""
    for directory, table in TABLES.items():
        for number, file in enumerate(table):
            path = root / directory / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8 + number, 8), (number, len(directory), 0)).save(path)
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content, encoding="utf-8")
    photo = root / "lightroom/1.jpg"
    Image.new("RGB", (8, 8)).save(photo, xmp=xmp("Gänse", "garden chair"))
    photo.write_bytes(iptc(photo.read_bytes(), "garden chair"))
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", xmp("cat").decode())
    Image.new("RGB", (9, 8)).save(root / "lightroom/2.png", pnginfo=info)
