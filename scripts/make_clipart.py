"""Make the built-in clip art, src/eclosion/data/clipart_pictures/, from two Debian packages.

    apt-get download openclipart-png openclipart-svg
    for package in openclipart-*.deb; do dpkg -x "$package" unpacked; done
    python scripts/make_clipart.py unpacked/usr/share/openclipart

Which drawings are taken, and what is said of each, stands in clipart_subjects.tsv: chosen by looking at every
coloured drawing of the folders for animals, buildings, clothing, containers, food, music, plants, sports, tools, toys,
transport and the unsorted ones, leaving out signs, lettering, maps, flags, diagrams, weapons, outlines, drawings
that are cut off, and near-duplicates. A drawing whose SVG does not state the public domain dedication is refused.

With `--check` nothing is written: what would be written is compared with what is there. The pictures are equal byte
for byte under the Pillow and libwebp that provenance.json names; other versions may compress differently.
"""

import argparse
import csv
import hashlib
import io
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
from PIL import Image, features

HERE = Path(__file__).resolve().parent
OUTPUT = HERE.parent / "src" / "eclosion" / "data" / "clipart_pictures"
PACKAGES = [
    {
        "name": "openclipart-png",
        "version": "1:0.18+dfsg-19",
        "sha256": "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    },
    {
        "name": "openclipart-svg",
        "version": "1:0.18+dfsg-19",
        "sha256": "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5",
    },
]
LICENCE = (
    "Public domain. The metadata of every drawing's SVG names the Creative Commons public domain dedication "
    "(cc:license http://web.resource.org/cc/PublicDomain); the packages' copyright file says the same of the whole "
    "Open Clip Art Library."
)
PUBLIC_DOMAIN = "http://web.resource.org/cc/PublicDomain"

SIZE_PX = 64
MARGIN_PX = 2
QUALITY = 85
# Soft edges coded a little coarser take a fifth off the pack and cost 0.1 dB.
ALPHA_QUALITY = 60

DC = "{http://purl.org/dc/elements/1.1/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


@dataclass(frozen=True)
class Choice:
    """One row of clipart_subjects.tsv: a drawing's path without suffix, its category, and what it shows."""

    path: str
    category: str
    subject: str


def choices() -> list[Choice]:
    """The drawings to take, in the order of their paths."""
    with (HERE / "clipart_subjects.tsv").open(encoding="utf-8", newline="") as file:
        return [Choice(**row) for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)]


def metadata(svg: Path) -> dict[str, Any]:
    """What a drawing says of itself: title, author and keywords.

    Raises:
        SystemExit: if it does not state the public domain dedication.
    """
    work = ElementTree.parse(svg).getroot().find(".//{*}metadata//{*}Work")
    if work is None:
        sys.exit(f"{svg}: has no metadata, so it states no licence. Take it out of clipart_subjects.tsv.")
    licences = [item.get(f"{RDF}resource") for item in work.iter() if item.tag.endswith("}license")]
    if licences != [PUBLIC_DOMAIN]:
        sys.exit(f"{svg}: states the licence {licences}, not the public domain. Take it out of clipart_subjects.tsv.")
    keywords = {_line(item.text).lower() for item in work.findall(f"{DC}subject//{{*}}li")}
    return {
        "title": _line(work.findtext(f"{DC}title")),
        "author": _line(work.findtext(f"{DC}creator//{DC}title")),
        "keywords": sorted(word for word in keywords if word and not word.startswith("hash")),
    }


def _line(text: str | None) -> str:
    return re.sub(r"\s+", " ", text or "").strip()


def picture(png: Path) -> Image.Image:
    """The drawing, cut to what is painted and fitted into a square: RGBA, SIZE_PX wide and high."""
    with Image.open(png) as opened:
        whole = opened.convert("RGBA")
    painted = whole.getchannel("A").point(lambda level: 255 * (level > 8)).getbbox()
    cut = whole.crop(painted)
    scale = (SIZE_PX - 2 * MARGIN_PX) / max(cut.size)
    width, height = (max(1, round(length * scale)) for length in cut.size)
    small = cut.resize((width, height), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (SIZE_PX, SIZE_PX), (255, 255, 255, 0))
    square.paste(small, ((SIZE_PX - width) // 2, (SIZE_PX - height) // 2))
    return square


def packed(square: Image.Image) -> bytes:
    """The picture as WebP, without metadata."""
    buffer = io.BytesIO()
    square.save(buffer, "WEBP", quality=QUALITY, alpha_quality=ALPHA_QUALITY, method=6)
    return buffer.getvalue()


def make(root: Path) -> dict[str, bytes]:
    """The files to ship: name -> content."""
    pack, pictures, origins = bytearray(), [], {}
    for choice in choices():
        png, svg = (root / kind / f"{choice.path}.{kind}" for kind in ("png", "svg"))
        data = packed(picture(png))
        pictures.append(
            {
                "path": choice.path,
                "category": choice.category,
                "caption": f"a clip art picture of {choice.subject}",
                "offset": len(pack),
                "length": len(data),
                "sha256": hashlib.sha256(data).hexdigest(),
            }
        )
        pack += data
        origins[choice.path] = metadata(svg) | {"png_sha256": _sha256(png), "svg_sha256": _sha256(svg)}
    head = {"format": 1, "sha256": hashlib.sha256(pack).hexdigest()}
    origin = {"licence": LICENCE, "packages": PACKAGES, "made_with": _versions()}
    return {
        "pictures.pack": bytes(pack),
        "index.json": _json(head, "pictures", [json.dumps(row) for row in pictures], "[]"),
        "provenance.json": _json(
            origin,
            "pictures",
            [f"{json.dumps(path)}: {json.dumps(row, ensure_ascii=False)}" for path, row in origins.items()],
            "{}",
        ),
    }


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _versions() -> dict[str, str]:
    return {"pillow": PIL.__version__, "libwebp": str(features.version("webp"))}


def _json(head: dict[str, Any], name: str, rows: Sequence[str], brackets: str) -> bytes:
    """JSON with one row per line, so that a change of one picture is a change of one line."""
    begin = json.dumps(head, indent=1)[:-2]
    body = ",\n".join(rows)
    return f'{begin},\n "{name}": {brackets[0]}\n{body}\n {brackets[1]}\n}}\n'.encode()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("root", type=Path, help="folder of the unpacked packages that holds png/ and svg/")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the files would change")
    arguments = parser.parse_args()
    files = make(arguments.root)
    if arguments.check:
        changed = [name for name, data in files.items() if (OUTPUT / name).read_bytes() != data]
        sys.exit(f"These would change: {', '.join(changed)}." if changed else 0)
    OUTPUT.mkdir(exist_ok=True)
    for name, data in files.items():
        (OUTPUT / name).write_bytes(data)
        print(f"{name}: {len(data):,} bytes")


if __name__ == "__main__":
    main()
