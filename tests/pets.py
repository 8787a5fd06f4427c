"""The classes of the small tagged images that the tests of the exports share."""

CLASSES = ["cat", "dog", "sea horse"]
