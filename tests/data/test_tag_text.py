import pytest

from cosa_hf.data.tag_text import combined_names
from cosa_hf.data.tags import parse_tags


@pytest.mark.parametrize(
    "text",
    [
        "cat,dog", "cat; dog", "cat|dog", "cat\ndog", " cat ,, dog;", "cat\u00a0; \u200bdog\ufeff", ["cat", " dog "],
        "['cat', 'dog']", '["cat", "dog"]', '["cat","dog",]', "('cat', 'dog')", "{'cat', 'dog'}",
        '{"choices": ["cat", "dog"]}', "{'choices': ['cat', 'dog']}", {"choices": ["cat", "dog"]},
    ],
)  # fmt: skip
def test_ways_to_write_two_tags(text):
    assert sorted(parse_tags(text)) == ["cat", "dog"]


@pytest.mark.parametrize("text", [None, "", " ", "[]", "[ ]", "()", [], '{"choices": []}', ",;"])
def test_ways_to_write_none(text):
    assert parse_tags(text) == []


@pytest.mark.parametrize(
    "tag",
    ["garden  chair", "bird (flying)", "rock 'n' roll", "C++", "T-shirt", "7", "猫", "🐈", "dog's", "3.5 mm jack", "-"],
)
def test_what_people_call_classes(tag):
    assert parse_tags(tag) == [" ".join(tag.split())]
    assert parse_tags([tag]) == [" ".join(tag.split())]


def test_a_list_has_commas_in_its_names():
    assert parse_tags('["red, ripe", "caf\\u00e9"]') == ["red, ripe", "café"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[cat, dog]", r"'\[cat' is not a tag: it has brackets; write tags as cat; dog"),
        ("['cat' 'dog']", "it has brackets"),  # as NumPy prints it; to Python it is ['catdog']
        ("['cat', 'dog'", "it has brackets"),
        ('{"cat": 1}', "it has brackets"),
        ('[{"x": 1, "rectanglelabels": ["cat"]}]', "`cosa-hf import`"),
        ("(cat)", "it has brackets"),
        ("(bird (flying))", "it has brackets"),
        ("set()", "it has brackets"),
        ("'cat'", "it has quotes at its ends"),
        ('"cat", "dog"', "it has quotes at its ends"),
        ('"[\\"cat\\"]"', "it has"),
        ("“cat”", "it has quotes at its ends"),
        ("[1, 0]", "it has brackets"),
        ("1 0 1", "are numbers, not tags: write the names of the classes .*one-hot"),
        ("1,0,1", "are numbers, not tags"),
        ("1.0 0.0", "are numbers, not tags"),
        ("12 7", "are numbers, not tags"),
        ("3.0", "it is a number or an id"),
        ("/m/01yrx", "it is a number or an id"),
        ("nan", "leave it empty where an image was not tagged, and write -"),
        ("None", "leave it empty"),
        ("cat; N/A", "'N/A' is not a tag: leave it empty"),
        ("True", "leave it empty"),
        ("a.JPG", "it is the name of a file; are two columns swapped"),
        ("?", "it has neither letters nor digits"),
        ("G\ufffdnse", "damaged"),
        ("cat\x00", "damaged"),
        (float("nan"), "must be text or a list of texts, got nan"),
        ([1, 0, 1], "must be text or a list of texts"),
        ([["cat"]], "must be text or a list of texts"),
        ({"choices": "cat", "x": 1}, "must be text or a list of texts"),
    ],
)
def test_text_that_is_no_tag(text, why):
    with pytest.raises(ValueError, match=why):
        parse_tags(text)


@pytest.mark.parametrize(
    ("text", "advised", "tags"),
    [
        ("[cat, dog]", "cat; dog", ["cat", "dog"]),
        ("'cat'", '["cat"]', ["cat"]),
        ("1,0", ["1", "0"], ["1", "0"]),
        ("nan", "", []),
        ("none", "-", ["-"]),
    ],
)
def test_the_advice_works(text, advised, tags):
    with pytest.raises(ValueError, match=r"write|leave"):
        parse_tags(text)
    assert parse_tags(advised) == tags


def test_classes_made_of_others():
    assert combined_names(["haze", "primary", "haze primary", "garden chair"]) == {"haze primary": ["haze", "primary"]}
    planet = ["clear primary", "clear primary water", "cloudy", "haze primary", "haze primary water"]
    assert list(combined_names(planet)) == [name for name in planet if name != "cloudy"]
    assert combined_names(["dining table", "coffee table", "hot dog", "dog"]) == {}
