"""Drawing the embedded demo set: what a scene of shapes is and how it becomes pixels and ids."""

import colorsys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

SHAPES_CLASSES = ("disc", "square", "triangle", "star", "ring", "cross", "boat", "train")
SHAPES_COEXISTENCE = ("boat", "train")

Array = np.ndarray
Color = tuple[float, float, float]  # 0..255
Range = tuple[float, float]

_OVERSAMPLING = 2
_REFERENCE = 96  # texture periods are in pixels of an image of this side, whatever the size it is rendered at
_SURROUNDING_COLORS: dict[str, tuple[Range, Range, Range]] = {  # hue, saturation, value
    "boat": ((0.50, 0.58), (0.45, 0.75), (0.5, 0.8)),
    "train": ((0.04, 0.10), (0.2, 0.45), (0.3, 0.5)),
}


@dataclass(frozen=True)
class Thing:
    """One object; lengths are in units of the image side."""

    class_id: int
    center: tuple[float, float]
    radius: float
    angle: float
    light: Color
    dark: Color
    surroundings: Color
    period: float  # texture period relative to the class's usual one
    phase: float

    @property
    def name(self) -> str:
        return SHAPES_CLASSES[self.class_id]


@dataclass(frozen=True)
class Ground:
    """What fills the image behind the things."""

    kind: int
    light: Color
    dark: Color
    angle: float
    period: float
    coarse: Array  # (8, 8), smooth variation
    fine: Array  # (96, 96), grain


@dataclass(frozen=True)
class Scene:
    """A ground and one to three things of different classes, painted in this order."""

    ground: Ground
    things: list[Thing]

    @property
    def class_ids(self) -> list[int]:
        return sorted(thing.class_id for thing in self.things)

    def render(self, image_size: int) -> Image.Image:
        """RGB, (image_size, image_size)."""
        side = image_size * _OVERSAMPLING
        canvas = _paint_ground(self.ground, side)
        # All surroundings first: none may hide a thing that the tags name.
        for thing in self.things:
            if thing.name in _SURROUNDINGS:
                _blend(canvas, thing, _SURROUNDINGS[thing.name], reach=2.4)
        for thing in self.things:
            _blend(canvas, thing, _paint_thing, reach=1.1)
        pixels = np.clip(canvas + 0.5, 0, 255).astype(np.uint8).transpose(1, 2, 0)
        return Image.fromarray(pixels).reduce(_OVERSAMPLING)

    def render_mask(self, image_size: int) -> Image.Image:
        """Class ids (mode "L"), sampled at the centre of each pixel; surroundings are background."""
        ids = np.zeros((image_size, image_size), dtype=np.uint8)
        for thing in self.things:
            window, u, v = _local_grid(thing, image_size, reach=1.1)
            ids[window][_OUTLINES[thing.name](u, v)] = thing.class_id + 1
        return Image.fromarray(ids)


def draw_scene(rng: np.random.Generator) -> Scene:
    """Draw a random scene: bright things of a colour typical for their class, on muted grounds."""
    hue = rng.uniform()
    near = (hue - 0.06, hue + 0.06)
    ground = Ground(
        kind=int(rng.integers(len(_GROUNDS))),
        light=_draw_color(rng, near, (0.00, 0.18), (0.60, 0.85)),
        dark=_draw_color(rng, near, (0.05, 0.22), (0.35, 0.55)),
        angle=rng.uniform(0, np.pi),
        period=rng.uniform(0.8, 1.3),
        coarse=rng.uniform(size=(8, 8)),
        fine=rng.uniform(size=(_REFERENCE, _REFERENCE)),
    )
    things: list[Thing] = []
    for class_id in rng.choice(len(SHAPES_CLASSES), size=rng.integers(1, 4), replace=False):
        thing = _draw_thing(rng, int(class_id))
        # Apart enough that each stays partly visible: a tag must not name what cannot be seen.
        if all(
            np.hypot(*np.subtract(thing.center, other.center)) > 0.7 * (thing.radius + other.radius) for other in things
        ):
            things.append(thing)
    return Scene(ground, things)


def _draw_thing(rng: np.random.Generator, class_id: int) -> Thing:
    name = SHAPES_CLASSES[class_id]
    upright = name in SHAPES_COEXISTENCE
    hue = class_id / len(SHAPES_CLASSES) + rng.uniform(-0.04, 0.04)
    x, y = rng.uniform(0.18, 0.82, size=2)
    return Thing(
        class_id=class_id,
        center=(float(x), float(y)),
        radius=rng.uniform(0.15, 0.27) * (1.15 if upright else 1.0),
        angle=rng.uniform(-0.2, 0.2) if upright else rng.uniform(0, 2 * np.pi),
        light=_draw_color(rng, (hue, hue), (0.30, 0.60), (0.88, 1.00)),
        dark=_draw_color(rng, (hue, hue), (0.70, 1.00), (0.35, 0.65)),
        surroundings=_draw_color(rng, *_SURROUNDING_COLORS[name]) if upright else (0.0, 0.0, 0.0),
        period=rng.uniform(0.85, 1.2),
        phase=rng.uniform(),
    )


def _draw_color(rng: np.random.Generator, hue: Range, saturation: Range, value: Range) -> Color:
    red, green, blue = colorsys.hsv_to_rgb(rng.uniform(*hue) % 1, rng.uniform(*saturation), rng.uniform(*value))
    return 255 * red, 255 * green, 255 * blue


# Painting. (u, v) are coordinates in a thing's own frame, in units of its radius, v pointing down;
# (p, q) are the same in reference pixels, for textures.


def _local_grid(thing: Thing, side: int, reach: float) -> tuple[tuple[slice, slice], Array, Array]:
    """The window of a (side, side) image within `reach` radii of a thing, and (u, v) at its pixel centres."""
    axes, window = [], []
    for middle in reversed(thing.center):  # rows first
        low = max(0, int((middle - reach * thing.radius) * side))
        high = min(side, int((middle + reach * thing.radius) * side) + 1)
        window.append(slice(low, high))
        axes.append(((np.arange(low, high, dtype=np.float32) + 0.5) / side - middle) / thing.radius)
    y, x = axes[0][:, None], axes[1][None, :]
    cos, sin = float(np.cos(thing.angle)), float(np.sin(thing.angle))
    return (window[0], window[1]), cos * x + sin * y, cos * y - sin * x


def _blend(canvas: Array, thing: Thing, paint: Callable, reach: float) -> None:
    window, u, v = _local_grid(thing, canvas.shape[-1], reach)
    alpha, color = paint(thing, u, v)
    painted = canvas[:, *window]
    painted += alpha * (color - painted)


def _mix(dark: Color | Array, light: Color | Array, amount: Array) -> Array:
    """(3, h, w) between two colours; amount 0 is dark, 1 light."""
    low, high = np.asarray(dark, np.float32)[:, None, None], np.asarray(light, np.float32)[:, None, None]
    return low + np.clip(amount, 0, 1) * (high - low)


def _wave(phase: Array, sharpness: float = 2.5) -> Array:
    """A square wave with soft edges, in [0, 1], of period 1."""
    return np.clip(0.5 + sharpness * np.sin(2 * np.pi * phase), 0, 1)


def _paint_thing(thing: Thing, u: Array, v: Array) -> tuple[Array, Array]:
    outline = _OUTLINES[thing.name]
    inside = outline(u, v)
    scale = thing.radius * _REFERENCE / thing.period
    amount = _TEXTURES[thing.name](u, v, u * scale + thing.phase, v * scale + thing.phase)
    color = _mix(thing.dark, thing.light, amount)
    rim = inside & ~outline(1.09 * u, 1.09 * v)
    color[:, rim] = 0.6 * np.asarray(thing.dark, np.float32)[:, None]
    return inside.astype(np.float32), color


def _star_outline(u: Array, v: Array) -> Array:
    # Fold the plane into one tenth of the star; there it is one straight edge from the tip to the notch.
    sector = np.pi / 5
    angle = np.abs((np.arctan2(u, -v) + sector) % (2 * sector) - sector)
    radius = np.hypot(u, v)
    x, y = radius * np.cos(angle), radius * np.sin(angle)
    notch_x, notch_y = 0.5 * np.cos(sector), 0.5 * np.sin(sector)
    return (notch_x - 1.0) * y - notch_y * (x - 1.0) >= 0


def _boat_outline(u: Array, v: Array) -> Array:
    hull = (v >= 0.25) & (v <= 0.72) & (np.abs(u) <= 0.98 - 0.75 * (v - 0.25))
    sail = (v <= 0.15) & (v >= -0.95) & (u >= 0.07) & (u <= 0.07 + 0.66 * (v + 0.95))
    jib = (v <= 0.15) & (v >= -0.75) & (u <= -0.07) & (u >= -0.07 - 0.6 * (v + 0.75))
    mast = (np.abs(u) <= 0.07) & (np.abs(v + 0.35) <= 0.62)
    return hull | sail | jib | mast


def _train_outline(u: Array, v: Array) -> Array:
    body = (np.abs(u) <= 0.98) & (v >= -0.30) & (v <= 0.35)
    cabin = (u >= 0.35) & (u <= 0.98) & (v >= -0.70) & (v <= 0.0)
    chimney = (np.abs(u + 0.62) <= 0.14) & (v >= -0.65) & (v <= 0.0)
    return body | cabin | chimney | _wheels(u, v)


def _wheels(u: Array, v: Array) -> Array:
    around = (u + 0.98) % 0.49 - 0.245
    return (np.hypot(around, v - 0.38) <= 0.2) & (np.abs(u) <= 0.98)


_OUTLINES: dict[str, Callable[[Array, Array], Array]] = {
    "disc": lambda u, v: np.hypot(u, v) <= 0.95,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.8,
    "triangle": lambda u, v: (np.abs(u) <= 0.58 * (v + 1.0)) & (v <= 0.65),
    "star": _star_outline,
    "ring": lambda u, v: np.abs(np.hypot(u, v) - 0.72) <= 0.26,
    "cross": lambda u, v: (np.minimum(np.abs(u), np.abs(v)) <= 0.33) & (np.maximum(np.abs(u), np.abs(v)) <= 0.95),
    "boat": _boat_outline,
    "train": _train_outline,
}


def _boat_texture(u: Array, v: Array, p: Array, q: Array) -> Array:
    planks = _wave(q / 4.5) * 0.6
    sails = 1.0 - 0.25 * _wave(q / 9.0)
    return np.where(v > 0.2, planks, np.where(np.abs(u) <= 0.07, 0.1, sails))


def _train_texture(u: Array, v: Array, p: Array, q: Array) -> Array:
    pane = (np.abs((u + 0.98) % 0.49 - 0.245) <= 0.15) & (np.abs(v + 0.06) <= 0.13)
    cabin_pane = (np.abs(u - 0.67) <= 0.17) & (np.abs(v + 0.48) <= 0.12)
    stripe = np.abs(v - 0.2) <= 0.05
    return np.where(_wheels(u, v), 0.0, np.where(pane | cabin_pane | stripe, 1.0, 0.3))


_TEXTURES: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "disc": lambda u, v, p, q: _wave(p / 6),  # stripes
    "square": lambda u, v, p, q: np.clip(0.5 + 4 * np.sin(np.pi * p / 5) * np.sin(np.pi * q / 5), 0, 1),  # checker
    "triangle": lambda u, v, p, q: np.clip(2.2 - np.hypot(p % 6 - 3, q % 6 - 3), 0, 1),  # dots
    "star": lambda u, v, p, q: _wave(np.hypot(u, v) * 2.6),  # concentric
    "ring": lambda u, v, p, q: _wave(4 * np.arctan2(v, u) / np.pi),  # segments
    "cross": lambda u, v, p, q: np.clip(1.6 - np.minimum(np.abs(p % 5.5 - 2.7), np.abs(q % 5.5 - 2.7)), 0, 1),  # mesh
    "boat": _boat_texture,
    "train": _train_texture,
}


def _paint_water(thing: Thing, u: Array, v: Array) -> tuple[Array, Array]:
    scale = thing.radius * _REFERENCE / thing.period
    crests = _wave(v * scale / 5 + 0.22 * np.sin(2 * np.pi * (u * scale / 12 + thing.phase)), sharpness=1.2)
    depth = 1 - (u / 2.0) ** 2 - ((v - 0.75) / 0.62) ** 2
    color = np.asarray(thing.surroundings, np.float32)
    return np.clip(3 * depth, 0, 1), _mix(0.7 * color, 0.55 * color + 110, 0.75 * crests)


def _paint_rails(thing: Thing, u: Array, v: Array) -> tuple[Array, Array]:
    scale = thing.radius * _REFERENCE / thing.period
    bed = np.clip(8 * (0.24 - np.abs(v - 0.74)), 0, 1) * np.clip(4 * (2.2 - np.abs(u)), 0, 1)
    color = np.asarray(thing.surroundings, np.float32)
    painted = _mix(0.55 * color, 0.6 * color + 90, _wave(u * scale / 6 + thing.phase))
    painted[:, np.minimum(np.abs(v - 0.62), np.abs(v - 0.86)) <= 0.035] = [[205], [205], [215]]
    return bed, painted


_SURROUNDINGS: dict[str, Callable] = {"boat": _paint_water, "train": _paint_rails}


def _upsampled(values: Array, side: int) -> Array:
    image = Image.fromarray(values.astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))


_GROUNDS: tuple[Callable[[Array, Array, Array, Array], Array], ...] = (
    lambda p, q, coarse, fine: coarse,  # clouds
    lambda p, q, coarse, fine: 0.4 * coarse + 0.6 * fine,  # sand
    lambda p, q, coarse, fine: 0.5 + 0.5 * np.sin(2 * np.pi * (p / 16 + 1.2 * coarse)),  # grain of wood
    lambda p, q, coarse, fine: 0.4 * coarse + 0.6 * (np.minimum(p % 22, q % 22) > 1.5),  # tiles
    lambda p, q, coarse, fine: 0.5 * coarse + 0.7 * (fine > 0.72),  # gravel
)


def _paint_ground(ground: Ground, side: int) -> Array:
    """(3, side, side) float32: each step runs over whole planes, which is much faster than over colours of 3."""
    axis = (np.arange(side, dtype=np.float32) + 0.5) * (_REFERENCE / side / ground.period)
    x, y = axis[None, :], axis[:, None]
    cos, sin = float(np.cos(ground.angle)), float(np.sin(ground.angle))
    fine = _upsampled(ground.fine, side)
    amount = _GROUNDS[ground.kind](cos * x + sin * y, cos * y - sin * x, _upsampled(ground.coarse, side), fine)
    return _mix(ground.dark, ground.light, amount + 0.12 * (fine - 0.5))
