import pytest
import torch
from datasets import Dataset, Value

from cosa_hf.data.tags import class_names, multi_hot, parse_json, parse_tags, tag_features, tag_ids, without_untagged


def _dataset(labels: list[list[int]]) -> Dataset:
    columns = {
        "image": [None] * len(labels),
        "labels": labels,
        "image_id": [f"image{index}" for index in range(len(labels))],
    }
    return Dataset.from_dict(columns, features=tag_features(["cat", "dog", "cow"]))


def test_multi_hot():
    assert torch.equal(multi_hot([], 3), torch.tensor([0.0, 0.0, 0.0]))
    assert torch.equal(multi_hot([0, 2], 3), torch.tensor([1.0, 0.0, 1.0]))


def test_tags_are_compared_in_one_unicode_form():
    assert parse_tags("cafe\u0301, cafe\u0301s") == ["caf\u00e9", "caf\u00e9s"]
    for classes in (["caf\u00e9"], ["cafe\u0301"]):
        assert tag_ids([["cafe\u0301"], ["caf\u00e9"]], classes, ["a", "b"]) == [[0], [0]]


def test_the_tag_that_was_meant_is_one():
    with pytest.raises(ValueError, match=r"'dgo' \(did you mean 'dog'\?\) of 1 image \(a\)\. The classes are cat, dog"):
        tag_ids([["dgo"]], ["cat", "dog"], ["a"])
    assert tag_ids([["dog"]], ["cat", "dog"], ["a"]) == [[1]]


def test_no_key_twice_at_any_depth():
    assert parse_json('[{"a": 1}, {"a": {"a": 2}}]', "x") == [{"a": 1}, {"a": {"a": 2}}]
    with pytest.raises(ValueError, match=r"^x cannot be read: the key 'b' occurs twice: join what they say under one"):
        parse_json('{"a": [{"b": 1, "b": 1}]}', "x")


def test_images_without_a_tag_are_left_out_and_named():
    tagged, dropped = without_untagged(_dataset([[1], [], [0, 2], []]))
    assert tagged["image_id"][:] == ["image0", "image2"]
    assert tagged["labels"][:] == [[1], [0, 2]]
    assert dropped == ["image1", "image3"]
    assert class_names(tagged) == ["cat", "dog", "cow"]


def test_leaving_out_writes_nothing_to_disk():
    tagged, _ = without_untagged(_dataset([[1], [], [0]]))
    assert tagged.cache_files == []


def test_nothing_to_leave_out():
    dataset = _dataset([[1], [2]])
    tagged, dropped = without_untagged(dataset)
    assert tagged is dataset
    assert dropped == []


def test_no_tag_at_all():
    with pytest.raises(ValueError, match="none of the 2 images has a tag"):
        without_untagged(_dataset([[], []]))


def test_class_names_need_class_labels():
    with pytest.raises(ValueError, match=r"'labels'.*\['image', 'image_id'\]"):
        class_names(_dataset([[1]]).remove_columns("labels"))
    with pytest.raises(ValueError, match="ClassLabel"):
        class_names(Dataset.from_dict({"labels": [1]}).cast_column("labels", Value("int32")))
