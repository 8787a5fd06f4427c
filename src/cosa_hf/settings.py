"""Configuration as small dataclasses: a field's type, range, default and meaning stand in one place, the field."""

import dataclasses
import math
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, TypeVar

Kind = TypeVar("Kind")


def setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    infinite: bool = False,
) -> Any:
    """A field of `Settings`.

    Args:
        default: its value where none is given; a list is copied.
        help: what it is, as `--help` shows it.
        least: the lowest value; of a list, of each of its items, as for the other bounds.
        above: a bound that the value must exceed.
        most: the highest value.
        below: a bound that the value must not reach.
        infinite: whether infinity is a value, as of a bound that is to be without effect.
    """
    bounds = {"above": above, "least": least, "below": below, "most": most, "infinite": infinite}
    metadata = {"help": help, "bounds": bounds}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Settings:
    """Base of all configuration: values of the wrong type or outside their range are refused by name.

    Raises:
        ValueError: such a value; the message names field, range and value.

    Example:
        >>> @dataclass(kw_only=True)
        ... class Bakery(Settings):
        ...     temperature: float = setting(200.0, "of the oven, degrees", above=0, most=300)
        >>> Bakery(temperature="2.2e2").temperature
        220.0
        >>> Bakery(temperature=400)
        Traceback (most recent call last):
        ValueError: temperature must be above 0 and at most 300, got 400.0
    """

    parts: ClassVar[tuple[Any, ...]] = ()
    """The groups that the fields of a larger configuration come from, as `--help` shows them."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for spec in dataclasses.fields(self):
            value = _typed(spec.name, getattr(self, spec.name), hints[spec.name])
            setattr(self, spec.name, value)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float):
                    _check_range(spec, number, value)

    def part(self, kind: type[Kind], **changes: Any) -> Kind:
        """Those of the values that are fields of `kind`, as such an object."""
        values = {spec.name: getattr(self, spec.name) for spec in dataclasses.fields(kind)}  # type: ignore[arg-type]
        return kind(**values | changes)


def _check_range(spec: dataclasses.Field, number: float, value: Any) -> None:
    bounds = dict(spec.metadata["bounds"])
    infinite = bounds.pop("infinite")
    holds = {
        "above": lambda bound: number > bound,
        "least": lambda bound: number >= bound,
        "below": lambda bound: number < bound,
        "most": lambda bound: number <= bound,
    }
    finite = math.isfinite(number) or (number == math.inf and infinite)
    if finite and all(holds[name](bound) for name, bound in bounds.items() if bound is not None):
        return
    words = {"above": "above", "least": "at least", "below": "below", "most": "at most"}
    expected = [f"{words[name]} {bound:g}" for name, bound in bounds.items() if bound is not None]
    raise ValueError(f"{spec.name} must be {' and '.join(expected) if finite else 'finite'}, got {value}")


def _typed(name: str, value: Any, hint: Any) -> Any:
    """`value` as the field's type, or a ValueError that names the field.

    YAML reads `2e-4` as a string and `1` as an integer where a float is meant; both are taken as written.
    """
    options = typing.get_args(hint) if typing.get_origin(hint) not in (Literal, list) else ()
    if type(None) in options:
        if value is None:
            return None
        (hint,) = (option for option in options if option is not type(None))
    if typing.get_origin(hint) is Literal:
        if value in typing.get_args(hint):
            return value
        raise ValueError(f"{name} must be one of {', '.join(map(str, typing.get_args(hint)))}, got {value!r}")
    elif typing.get_origin(hint) is list:
        if isinstance(value, list) and value:
            return [_typed(name, item, typing.get_args(hint)[0]) for item in value]
    elif hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    elif type(value) is hint:
        return value
    expected = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
    raise ValueError(f"{name} must be {expected}, got {value!r}")


__all__ = ["Settings", "setting"]
