"""Settings that all tests share."""

from hypothesis import settings

# The same examples in every run: a check that fails now and then tells a contributor nothing about the change at hand.
settings.register_profile("same every run", deadline=None, derandomize=True, max_examples=60)
# Looks for new ones: pytest --hypothesis-profile search
settings.register_profile("search", deadline=None, max_examples=2000)
settings.load_profile("same every run")
