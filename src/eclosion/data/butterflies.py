"""Butterflies drawn by this file: any number of them, each with an exact caption.

A butterfly is a value (`Butterfly`) that follows from a seed and an index, and a picture is a function
of that value and a resolution. Shapes are polygons with whole-number corners on a canvas finer than
the picture, so that the same picture comes out on every machine.

Coordinates of a wing: x to the right of the body and y down, where 1 is half the width of the picture.
A place on a wing is (t, r): t counts points along its outline, r goes from 0 at the anchor near the
body to 1 on the outline. Patterns are drawn in (t, r), so they never leave the wing.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter
from pydantic import Field

from eclosion.data.source import Sample
from eclosion.registry import part
from eclosion.rng import Generator, generator

__all__ = ["Butterflies", "ButterfliesSource", "Butterfly", "draw", "hatch"]

# Raised whenever a change here changes any picture, so that a run on older pictures is told apart.
VERSION = 1
# Canvas pixels per picture pixel, in each direction.
SUPERSAMPLE = 4
# Points of an outline per control point.
SUBDIVISION = 5

Colour = tuple[int, int, int]
Points = NDArray[np.float64]  # [N, 2], x and y

WINGS: dict[str, Colour] = {
    "red": (214, 40, 40),
    "orange": (245, 130, 20),
    "yellow": (250, 205, 35),
    "green": (60, 165, 70),
    "blue": (45, 105, 225),
    "purple": (135, 65, 190),
    "pink": (240, 105, 165),
    "white": (245, 243, 238),
}
BACKGROUNDS: dict[str, Colour] = {
    "white": (250, 250, 247),
    "cream": (250, 232, 184),
    "pink": (252, 196, 208),
    "lavender": (206, 190, 244),
    "light blue": (160, 212, 246),
    "turquoise": (92, 200, 196),
    "green": (146, 208, 116),
    "dark blue": (34, 48, 104),
    "dark green": (22, 78, 60),
}
MARKS: dict[str, Colour] = {
    "black": (24, 20, 24),
    "brown": (92, 52, 26),
    "white": (252, 250, 244),
    "yellow": (255, 222, 70),
    "orange": (255, 140, 30),
    "blue": (70, 150, 245),
    "pink": (255, 130, 185),
}
# A wing colour -> backgrounds that hide it, and marks that vanish on it.
HIDING = {
    "yellow": {"cream"},
    "green": {"green", "turquoise", "dark green"},
    "blue": {"dark blue"},
    "purple": {"dark blue"},
    "pink": {"pink"},
    "white": {"white", "cream"},
}
VANISHING = {
    "red": {"brown", "orange", "pink", "blue"},
    "orange": {"orange", "yellow", "pink", "brown", "blue"},
    "yellow": {"yellow", "white", "orange"},
    "green": {"blue", "brown", "black"},
    "blue": {"blue", "black", "brown"},
    "purple": {"blue", "brown", "black", "pink"},
    "pink": {"pink", "orange", "brown"},
    "white": {"white", "yellow", "pink"},
}
PATTERNS = ("plain", "spots", "stripes", "bands", "eyespots")


@dataclass(frozen=True)
class Shape:
    """The two right wings of a family: control points of closed outlines that begin at the body.

    `fore_margin` and `hind_margin` are the first and last control point of the outer margin.
    """

    fore: Points
    fore_margin: tuple[int, int]
    hind: Points
    hind_margin: tuple[int, int]


def _outline(text: str) -> Points:
    """Control points from "x y" pairs in hundredths."""
    return np.array([pair.split() for pair in text.split(",")], np.float64) / 100


SHAPES = {
    "broad-winged": Shape(
        fore=_outline("3 -16, 26 -48, 58 -76, 88 -82, 92 -58, 82 -28, 70 -2, 36 6, 3 4"),
        fore_margin=(3, 6),
        hind=_outline("3 -4, 36 -6, 66 6, 74 32, 62 60, 38 72, 16 54, 3 22"),
        hind_margin=(2, 6),
    ),
    "round-winged": Shape(
        fore=_outline("3 -14, 20 -46, 48 -68, 76 -66, 88 -42, 82 -14, 58 4, 28 8, 3 4"),
        fore_margin=(3, 6),
        hind=_outline("3 -2, 34 -2, 62 8, 74 34, 66 60, 42 72, 18 58, 3 24"),
        hind_margin=(2, 6),
    ),
    "long-winged": Shape(
        fore=_outline("3 -14, 34 -36, 70 -52, 92 -50, 94 -30, 82 -10, 60 4, 30 6, 3 4"),
        fore_margin=(3, 6),
        hind=_outline("3 -2, 36 0, 62 10, 66 30, 52 50, 32 60, 14 50, 3 22"),
        hind_margin=(2, 6),
    ),
    "angle-winged": Shape(
        fore=_outline("3 -16, 30 -54, 60 -74, 86 -74, 78 -52, 88 -30, 72 -12, 66 4, 34 6, 3 4"),
        fore_margin=(3, 7),
        hind=_outline("3 -4, 36 -4, 68 6, 64 26, 76 44, 54 54, 48 78, 32 62, 16 58, 3 22"),
        hind_margin=(2, 7),
    ),
    "swallowtail": Shape(
        fore=_outline("3 -16, 24 -54, 54 -82, 90 -84, 88 -56, 74 -26, 60 -2, 32 6, 3 4"),
        fore_margin=(3, 6),
        hind=_outline("3 -4, 32 -4, 58 6, 66 26, 58 48, 50 62, 52 92, 42 93, 34 64, 16 52, 3 22"),
        hind_margin=(2, 5),
    ),
}


@dataclass(frozen=True)
class Butterfly:
    """What one picture shows.

    Attributes:
        colour: of the wings, a name in `WINGS`.
        shape: family of the wings, a name in `SHAPES`.
        pattern: one of `PATTERNS`.
        mark: colour of the pattern, a name in `MARKS`; None where the pattern is plain.
        border: colour of the wings' outer border, a name in `MARKS`, or None.
        background: a name in `BACKGROUNDS`.
        backdrop: "even", "gradient" or "mottled".
        num_marks: spots or stripes on each wing.
        angle: tangent of the turn against upright; positive turns clockwise.
        span: half the width of the butterfly; 1 fills the picture.
        lift: how far the forewings reach up, against their family.
        jitter: offsets of the control points, forewing then hindwing, [N, 2] each.
        tint: how light the wings are, -1 to 1.
        light: corners of the backdrop, [5, 5] in [0, 1].
    """

    colour: str
    shape: str
    pattern: str
    mark: str | None
    border: str | None
    background: str
    backdrop: str
    num_marks: int
    angle: float
    span: float
    lift: float
    jitter: tuple[Points, Points]
    tint: float
    light: NDArray[np.float64]

    @property
    def caption(self) -> str:
        """Every fact that a reader can see, in one sentence without a full stop."""
        marks = [f"{self.border} borders"] if self.border else []
        marks += [f"{self.mark} {self.pattern}"] if self.mark else []
        kind = self.shape if self.shape == "swallowtail" else f"{self.shape} butterfly"
        article = "an" if self.colour[0] in "aeiou" else "a"
        worn = f" with {' and '.join(marks)}" if marks else ""
        ground = f"{'an' if self.background[0] in 'aeiou' else 'a'} {self.background} background"
        return f"{article} {self.colour} {kind}{worn} on {ground}"


def hatch(seed: int, index: int) -> Butterfly:
    """The butterfly that belongs to a seed and an index."""
    rng = generator(seed, "butterflies", index)
    colour = _pick(rng, list(WINGS))
    shape = _pick(rng, list(SHAPES))
    pattern = _pick(rng, PATTERNS)
    background = _pick(rng, [name for name in BACKGROUNDS if name not in HIDING.get(colour, ())])
    marks = [name for name in MARKS if name not in VANISHING[colour]]
    border = _pick(rng, ["black", "black", "brown", "white"]) if rng.random() < 0.6 else None
    border = None if border in (background, colour) or (colour, border) == ("yellow", "white") else border
    mark = None if pattern == "plain" else _pick(rng, [name for name in marks if name != border])
    family = SHAPES[shape]
    return Butterfly(
        colour=colour,
        shape=shape,
        pattern=pattern,
        mark=mark,
        border=border,
        background=background,
        backdrop=_pick(rng, ("even", "gradient", "mottled")),
        num_marks=int(rng.integers(3, 6)),
        angle=_between(rng, -0.18, 0.18),
        span=_between(rng, 0.82, 0.91),
        lift=_between(rng, 0.92, 1.05),
        jitter=(_offsets(rng, len(family.fore)), _offsets(rng, len(family.hind))),
        tint=_between(rng, -1, 1),
        light=rng.random((5, 5)),
    )


def _pick(rng: Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _between(rng: Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _offsets(rng: Generator, count: int) -> Points:
    return (rng.random((count, 2)) - 0.5) * 0.05


def draw(butterfly: Butterfly, resolution: int) -> Image.Image:
    """The picture of a butterfly, RGB, `resolution` pixels wide and high."""
    side = resolution * SUPERSAMPLE
    pen = _Pen(butterfly, side)
    fore, hind = _wings(butterfly)
    for wing in (hind, fore):
        _draw_wing(pen, butterfly, wing)
    _draw_body(pen, butterfly)
    # The canvas starts in the colour of the edges, so no background shines through a soft edge twice.
    subject, mask = pen.canvas.reduce(SUPERSAMPLE), pen.mask.reduce(SUPERSAMPLE)
    picture = _backdrop(butterfly, resolution)
    _cast_shadow(picture, mask, resolution)
    picture.paste(subject, mask=mask)
    return picture


@dataclass(frozen=True)
class _Wing:
    """One right wing: closed outline [N, 2], the anchor [2], and where its outer margin begins and ends."""

    outline: Points
    anchor: Points
    margin: tuple[int, int]
    tone: float

    def ring(self, r: float) -> Points:
        """The outline shrunk towards the anchor."""
        return self.anchor + r * (self.outline - self.anchor)

    def at(self, share: float, r: float) -> Points:
        """The place at a share of the outer margin, 0 at its front end and 1 at its back end."""
        first, last = self.margin
        t = first + share * (last - first)
        low = min(int(t), last - 1)
        edge = self.outline[low] + (t - low) * (self.outline[low + 1] - self.outline[low])
        return np.asarray(self.anchor + r * (edge - self.anchor))

    def patch(self, begin: float, end: float, inner: float, outer: float) -> Points:
        """A piece of the wing: a share of the margin, between two values of r."""
        shares = [begin + (end - begin) * k / 6 for k in range(7)]
        return np.array([self.at(s, outer) for s in shares] + [self.at(s, inner) for s in reversed(shares)])


def _wings(butterfly: Butterfly) -> tuple[_Wing, _Wing]:
    family = SHAPES[butterfly.shape]
    fore = family.fore + butterfly.jitter[0]
    hind = family.hind + butterfly.jitter[1]
    fore[:, 1] *= butterfly.lift
    return _wing(fore, family.fore_margin, 0.0), _wing(hind, family.hind_margin, 0.16)


def _wing(control: Points, margin: tuple[int, int], tone: float) -> _Wing:
    outline = _spline(len(control)) @ control
    root = (control[0] + control[-1]) / 2
    anchor = root + 0.22 * (control.mean(axis=0) - root)
    first, last = margin
    return _Wing(outline, anchor, (first * SUBDIVISION, last * SUBDIVISION), tone)


@cache
def _spline(count: int) -> Points:
    """Matrix [count * SUBDIVISION, count] that takes control points to a closed Catmull-Rom curve through them."""
    matrix = np.zeros((count * SUBDIVISION, count))
    for i in range(count):
        for k in range(SUBDIVISION):
            u = k / SUBDIVISION
            weights = (-u + 2 * u**2 - u**3, 2 - 5 * u**2 + 3 * u**3, u + 4 * u**2 - 3 * u**3, -(u**2) + u**3)
            for j, weight in enumerate(weights):
                matrix[i * SUBDIVISION + k, (i + j - 1) % count] += weight / 2
    return matrix


class _Pen:
    """Draws shapes of the right side on both sides, turned and scaled, on a canvas and on its mask."""

    def __init__(self, butterfly: Butterfly, side: int) -> None:
        edge = MARKS[butterfly.border] if butterfly.border else _shade(WINGS[butterfly.colour], -0.55)
        self.canvas = Image.new("RGB", (side, side), edge)
        self.mask = Image.new("L", (side, side), 0)
        self._draw, self._draw_mask = ImageDraw.Draw(self.canvas), ImageDraw.Draw(self.mask)
        # Halfway between the middle two pixels: a point and its mirror image then round alike.
        self._middle = (side - 1) / 2
        self.scale = side / 2 * butterfly.span
        slope = butterfly.angle
        cosine = 1 / (1 + slope * slope) ** 0.5
        sine = slope * cosine
        right = np.array([[cosine, sine], [-sine, cosine]]) * self.scale
        self._maps = (right, np.array([[-1.0, 0.0], [0.0, 1.0]]) @ right)

    def _place(self, points: Points, side: Points) -> list[int]:
        # Whole numbers, so that the last bit of a product cannot move a corner.
        flat: list[int] = np.rint(points @ side + self._middle).astype(np.int64).ravel().tolist()
        return flat

    def polygon(self, points: Points, colour: Colour, *, silhouette: bool = False) -> None:
        for side in self._maps:
            corners = self._place(points, side)
            self._draw.polygon(corners, fill=colour)
            if silhouette:
                self._draw_mask.polygon(corners, fill=255)

    def line(self, points: Points, colour: Colour, width: float, *, silhouette: bool = False) -> None:
        pixels = max(1, round(width * self.scale))
        for side in self._maps:
            corners = self._place(points, side)
            self._draw.line(corners, fill=colour, width=pixels, joint="curve")
            if silhouette:
                self._draw_mask.line(corners, fill=255, width=pixels, joint="curve")

    def disc(self, centre: Points, radius: float, colour: Colour, *, silhouette: bool = False) -> None:
        pixels = max(1, round(radius * self.scale))
        for side in self._maps:
            x, y = self._place(centre, side)
            box = (x - pixels, y - pixels, x + pixels, y + pixels)
            self._draw.ellipse(box, fill=colour)
            if silhouette:
                self._draw_mask.ellipse(box, fill=255)


def _shade(colour: Colour, amount: float) -> Colour:
    """A colour made lighter (amount up to 1) or darker (down to -1)."""
    return _mix(colour, (255, 255, 255) if amount > 0 else (0, 0, 0), abs(amount))


def _mix(one: Colour, other: Colour, share: float) -> Colour:
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(one, other, strict=True))
    return red, green, blue


def _draw_wing(pen: _Pen, butterfly: Butterfly, wing: _Wing) -> None:
    # White cannot get lighter and soon looks grey: it is shaded less, and darker where the others are lighter.
    white = butterfly.colour == "white"
    base = _shade(WINGS[butterfly.colour], -0.03 if white else 0.08 * butterfly.tint + 0.6 * wing.tone)
    edge = MARKS[butterfly.border] if butterfly.border else _shade(base, -0.5)
    pen.polygon(wing.outline, edge, silhouette=True)
    inner = 0.8 if butterfly.border else 0.95
    for r, amount in ((inner, -0.12), (0.8 * inner, -0.04), (0.62 * inner, 0.04), (0.42 * inner, 0.14)):
        pen.polygon(wing.ring(r), _shade(base, 0.4 * amount if white else amount))
    vein = _mix(base, edge, 0.5)
    if butterfly.pattern != "stripes":
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            pen.line(np.array([wing.at(share, 0.25), wing.at(share, 0.97)]), vein, 0.012)
    if butterfly.mark:
        _MARKERS[butterfly.pattern](pen, butterfly, wing, inner)


def _draw_spots(pen: _Pen, butterfly: Butterfly, wing: _Wing, inner: float) -> None:
    colour, count = MARKS[butterfly.mark or ""], butterfly.num_marks
    centres = [wing.at((k + 0.5) / count, 0.74 * inner) for k in range(count)]
    # Spots that touch read as a band: leave a quarter of the distance between them free.
    gap = min(float((b - a) @ (b - a)) ** 0.5 for a, b in pairwise(centres))
    for centre in centres:
        pen.disc(centre, min(0.075, 0.37 * gap), colour)
    pen.disc(wing.at(0.5, 0.34 * inner), 0.06, colour)


def _draw_stripes(pen: _Pen, butterfly: Butterfly, wing: _Wing, inner: float) -> None:
    colour, count = MARKS[butterfly.mark or ""], butterfly.num_marks
    for k in range(count):
        share = (k + 0.5) / count
        pen.polygon(wing.patch(share - 0.24 / count, share + 0.24 / count, 0.3 * inner, 0.98 * inner), colour)


def _draw_bands(pen: _Pen, butterfly: Butterfly, wing: _Wing, inner: float) -> None:
    colour = MARKS[butterfly.mark or ""]
    pen.polygon(wing.patch(0.0, 1.0, 0.56 * inner, 0.8 * inner), colour)


def _draw_eyespots(pen: _Pen, butterfly: Butterfly, wing: _Wing, inner: float) -> None:
    colour = MARKS[butterfly.mark or ""]
    centre = wing.at(0.42, 0.62 * inner)
    dark = MARKS["black"] if butterfly.mark != "black" else MARKS["white"]
    pen.disc(centre, 0.17, colour)
    pen.disc(centre, 0.11, dark)
    pen.disc(centre + np.array([0.03, -0.03]), 0.04, colour)


_MARKERS = {"spots": _draw_spots, "stripes": _draw_stripes, "bands": _draw_bands, "eyespots": _draw_eyespots}


def _draw_body(pen: _Pen, butterfly: Butterfly) -> None:
    dark = (44, 30, 26)
    feeler = (230, 215, 190) if butterfly.background.startswith("dark") else dark
    curve = np.array([(0.02, -0.30), (0.07, -0.46), (0.14, -0.58), (0.24, -0.66)])
    pen.line(curve, feeler, 0.03, silhouette=True)
    pen.disc(curve[-1], 0.035, feeler, silhouette=True)
    pen.polygon(np.array(_BODY), dark, silhouette=True)
    pen.disc(np.array([0.0, -0.27]), 0.075, dark, silhouette=True)
    pen.line(np.array([(0.0, -0.2), (0.0, 0.38)]), _shade(dark, 0.22), 0.035)


_BODY = (
    (0.0, -0.30), (0.06, -0.24), (0.075, -0.12), (0.07, 0.0), (0.055, 0.2), (0.045, 0.36), (0.02, 0.47), (0.0, 0.48),
)  # fmt: skip


def _backdrop(butterfly: Butterfly, resolution: int) -> Image.Image:
    base = np.array(BACKGROUNDS[butterfly.background], np.float64)
    if butterfly.backdrop == "even":
        return Image.new("RGB", (resolution, resolution), BACKGROUNDS[butterfly.background])
    light = butterfly.light
    if butterfly.backdrop == "gradient":
        light = np.linspace(0, 1, 5)[:, None] * np.ones(5)
        light = light if butterfly.light[0, 0] < 0.5 else light[::-1]
    # From a deeper tone of the same colour to a paler one: a grey veil would make the caption untrue.
    deep, pale = base * (0.55 + 0.45 * base / 255), base + 0.5 * base * (1 - base / 255)
    shaded = deep + (pale - deep) * light[:, :, None]
    small = Image.fromarray(np.floor(shaded).astype(np.uint8))
    return small.resize((resolution, resolution), Image.Resampling.BICUBIC)


def _cast_shadow(picture: Image.Image, mask: Image.Image, resolution: int) -> None:
    """Darken what lies under the butterfly, a little below it, so that it stands out of its background."""
    shadow = mask.filter(ImageFilter.BoxBlur(resolution / 32)).point(_SHADOW)
    picture.paste((30, 30, 50), (0, resolution // 20), mask=shadow)


_SHADOW = [level * 3 // 8 for level in range(256)]


class Butterflies:
    """An opened set of drawn butterflies."""

    has_captions = True

    def __init__(self, source: "ButterfliesSource") -> None:
        self._source = source
        self.class_names: tuple[str, ...] = _CLASSES[source.label]
        what = repr(("butterflies", VERSION, source.size, source.resolution, source.seed, source.label))
        self.fingerprint = hashlib.sha256(what.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return self._source.size

    def name(self, index: int) -> str:
        """A made-up name: no file holds the picture."""
        return f"butterfly-{self._checked(index):06d}"

    def attributes(self, index: int) -> dict[str, str | None]:
        """What the picture shows: colour, shape, pattern, mark, border and background; None for what it has not."""
        one = hatch(self._source.seed, self._checked(index))
        return {name: getattr(one, name) for name in ("colour", "shape", "pattern", "mark", "border", "background")}

    def read(self, index: int) -> Sample:
        """Draw one butterfly."""
        one = hatch(self._source.seed, self._checked(index))
        label = self.class_names.index(getattr(one, self._source.label))
        return Sample(draw(one, self._source.resolution), self.name(index), one.caption, label)

    def _checked(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"butterfly {index} of {len(self)}")
        return index


_CLASSES = {"colour": tuple(WINGS), "shape": tuple(SHAPES), "pattern": PATTERNS}


@part
class ButterfliesSource:
    """Butterflies seen from above, drawn on the spot: no files, exact captions, the same pictures on every machine."""

    # Pictures in an epoch; more of them are more different ones.
    size: Annotated[int, Field(ge=1)] = 2000
    # Width and height of the pictures in pixels.
    resolution: Annotated[int, Field(ge=8, le=2048)] = 64
    # Another seed gives other butterflies.
    seed: Annotated[int, Field(ge=0)] = 0
    # What the class of a picture is: the colour of the wings, their shape, or the pattern on them.
    label: Literal["colour", "shape", "pattern"] = "colour"

    def open(self) -> Butterflies:
        """The set of pictures; nothing is drawn yet."""
        return Butterflies(self)
