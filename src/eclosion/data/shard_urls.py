"""From the URL in a config to the shards that it stands for.

    .../{}.tar                    {} is the shard's number, padded with zeros to shard_width digits
    .../{00000..00099}.tar        these numbers; a range that begins with a zero is padded to its own width
    .../{train,extra}/{}.tar      these words
    .../00000.tar                 one shard

Nothing else in a URL is special: the text is cut and joined, never formatted.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import unquote

from eclosion.data.pipes import check_pipe
from eclosion.data.places import IsFolder, NotFound, one_line, scheme_of, shown
from eclosion.data.remote import listing, stat, stat_all
from eclosion.errors import ConfigError, DataError

__all__ = ["NO_NUMBER", "ShardUrl", "expand"]

# The option that these messages are about.
OPTION = "data.source.webdataset_base_url"
# Number of a shard whose name holds none.
NO_NUMBER = -1
MAX_SHARDS = 1_000_000
# Files that are looked for one by one, at most, where a folder cannot be listed.
MAX_PROBES = 100_000
# From here on, end_shard means "all that there are": configs of DALLE2-pytorch that leave it out have this.
ALL_THERE_ARE = 9_999_999
# To list a folder costs about as much as to look for so many files in it.
FEW = 4
# Missing shards that a message names.
MAX_NAMED = 3

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"([0-9]{1,18})\.\.([0-9]{1,18})(?:\.\.([0-9]{1,9}))?")
# Nothing that a word of a shell command could have between braces: awk '{print $1, $2}' is no list.
_LIST = re.compile(r"[^{}\s'\"$]*,[^{}\s'\"$]*")
_FORMAT = re.compile(r"\w*(![rsa])?(:[^{}]*)?")
_DIGITS = re.compile(r"[0-9]+")
_TAR = re.compile(r"(.*?)([0-9]+)(\.[^0-9/]*tar[^0-9/]*)")


@dataclass(frozen=True, repr=False)
class ShardUrl:
    """Where one shard is.

    Attributes:
        number: the number that was put in for `{}` or a range; else the last digits of the file's name before its
            first dot, as 104 in laion-00104.tar; else `NO_NUMBER`.
        url: for opening; it may hold secrets, so that messages use `shown`.
    """

    number: int
    url: str

    @cached_property
    def shown(self) -> str:
        """The URL without secrets."""
        return shown(self.url)

    def __repr__(self) -> str:
        return f"ShardUrl({self.number}, {self.shown!r})"


def expand(
    base_url: str,
    *,
    start_shard: int = 0,
    end_shard: int | None = None,
    shard_width: int = 6,
    skip_missing: bool = False,
) -> tuple[list[ShardUrl], list[str]]:
    """The shards that a URL stands for and that exist, in the order of their numbers or of its lists.

    Folders are listed where that can be asked for (local, s3 ...); else each shard is asked for, many at a time. What
    a command would write cannot be known before it runs: all shards of `pipe:` URLs count as existing.

    Args:
        base_url: as at the top of this file.
        start_shard: the first number.
        end_shard: the last number, itself included; None, or 9999999 and more, takes all that there are, which needs
            a folder that can be listed.
        shard_width: digits of the number that takes the place of `{}`.
        skip_missing: whether shards that do not exist are left out; else they are an error.

    Returns:
        The shards, and what to call those that are missing.

    Raises:
        ConfigError: if the URL or a number cannot be used, or it is a command and commands are not allowed.
        DataError: if no shard exists, or some are missing; all of them are counted in one message.
        EnvironmentProblem: if a server keeps failing.
    """
    if start_shard < 0 or shard_width < 0:
        raise ConfigError("data.source: start_shard and shard_width are 0 or more.")
    if end_shard is not None and end_shard < start_shard:
        raise ConfigError(
            f"data.source.end_shard: {end_shard} is less than start_shard={start_shard}. Both are included."
        )
    if scheme_of(base_url) == "pipe":
        check_pipe(base_url)
    templates = _templates(base_url)
    if "{}" not in base_url:
        wanted = _selected(base_url, templates, start_shard, end_shard)
        found, missing = _look(base_url, wanted)
    elif end_shard is None or end_shard >= ALL_THERE_ARE:
        return _all_there_are(base_url, templates, start_shard, end_shard, shard_width), []
    else:
        found, missing = _numbered(base_url, templates, range(start_shard, end_shard + 1), shard_width)
    if missing and (not skip_missing or not found):
        raise DataError(_missing(base_url, missing, len(found), shard_width))
    return found, missing


@dataclass(frozen=True)
class _Template:
    """A URL with all its lists filled in.

    Attributes:
        before: the text up to `{}`, or all of it.
        after: the text after `{}`.
        number: the number that was filled in last, or `NO_NUMBER`.
    """

    before: str
    after: str
    number: int

    def url(self, digits: str) -> str:
        return self.before + digits + self.after


def _templates(base_url: str) -> list[_Template]:
    """The URL with each combination of its lists, the last one varying fastest."""
    literals, groups = [""], list[Sequence[str]]()
    for index, text in enumerate(_BRACES.split(base_url)):
        choices = _choices(base_url, text, literals[-1]) if index % 2 else None
        if choices is None:
            literals[-1] += f"{{{text}}}" if index % 2 else text
        else:
            groups.append(choices)
            literals.append("")
    _check(base_url, literals)
    if (count := math.prod(len(choices) for choices in groups)) > MAX_SHARDS:
        raise ConfigError(f"{OPTION}: {shown(base_url)} stands for {count} shards, and the limit is {MAX_SHARDS}.")
    return [_fill(literals, words) for words in itertools.product(*groups)]


def _fill(literals: Sequence[str], words: Sequence[str]) -> _Template:
    filled = literals[0] + "".join(word + text for word, text in zip(words, literals[1:], strict=True))
    before, _, after = filled.partition("{}")
    numbers = [int(word) for word in words if _DIGITS.fullmatch(word) and len(word) <= 18]
    return _Template(before, after, numbers[-1] if numbers else NO_NUMBER)


def _choices(base_url: str, text: str, before: str) -> Sequence[str] | None:
    """What a pair of braces stands for, in order; None if it stands for itself.

    Raises:
        ConfigError: if it looks like something that is not read.
    """
    if text == "":
        return None
    is_command = scheme_of(base_url) == "pipe"
    if is_command and before.endswith("$"):  # a shell's ${variable}
        return None
    if match := _RANGE.fullmatch(text):
        return _Numbers(match[1], match[2], int(match[3] or 1) or 1)
    if _LIST.fullmatch(text):
        return text.split(",")
    if is_command:
        return None
    if _FORMAT.fullmatch(text):
        raise ConfigError(
            f"{OPTION}: write {{}} for the shard's number, without anything inside, and not {{{one_line(text)}}}. "
            "How many digits it has is data.source.shard_width."
        )
    raise ConfigError(
        f"{OPTION}: {{{one_line(text)}}} is neither {{}} nor a range such as {{00000..00099}} nor a list such as "
        "{a,b}."
    )


class _Numbers(Sequence[str]):
    """The numbers of a range as text, made when they are asked for: a range may be too long to be made at all."""

    def __init__(self, first: str, last: str, step: int) -> None:
        low, high = int(first), int(last)
        self._range = range(low, high + 1, step) if low <= high else range(low, high - 1, -step)
        padded = (first.startswith("0") and len(first) > 1) or (last.startswith("0") and len(last) > 1)
        self._width = max(len(first), len(last)) if padded else 0

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return str(self._range[index]).zfill(self._width)


def _check(base_url: str, literals: Sequence[str]) -> None:
    text = "".join(literals)
    if (count := text.count("{}")) > 1:
        raise ConfigError(f"{OPTION}: {shown(base_url)} has {{}} {count} times. Write it once, for the shard's number.")
    if scheme_of(base_url) != "pipe" and re.search("[{}]", text.replace("{}", "")):
        raise ConfigError(f"{OPTION}: {shown(base_url)} has a brace without its partner, or lists within lists.")
    if not base_url.strip() or "\0" in base_url:
        raise ConfigError(f"{OPTION}: is empty. Give a path or URL of shards, such as data/{{}}.tar.")


def _numbered(
    base_url: str, templates: Sequence[_Template], numbers: range, width: int
) -> tuple[list[ShardUrl], list[str]]:
    """Which shards with these numbers exist, and what to call the others."""
    if (count := len(templates) * len(numbers)) > MAX_SHARDS:
        raise ConfigError(
            f"data.source.end_shard: {numbers.start} to {numbers.stop - 1} makes {count} shards of {shown(base_url)}, "
            f"and the limit is {MAX_SHARDS}. Give the last shard that there is, or leave end_shard out."
        )
    found, missing = list[ShardUrl](), list[str]()
    for template in templates:
        existing = _existing(base_url, template, numbers, width)
        found += [ShardUrl(number, template.url(str(number).zfill(width))) for number in existing]
        if len(existing) < len(numbers):
            name, here = shown(template.url("{}")), set(existing)
            missing += [name.replace("{}", str(number).zfill(width)) for number in numbers if number not in here]
    return found, missing


def _existing(base_url: str, template: _Template, numbers: range, width: int) -> Sequence[int]:
    """The numbers of the shards that exist."""
    scheme = scheme_of(base_url)
    if scheme == "pipe":
        return numbers
    if scheme in {"http", "https"} or len(numbers) <= FEW:
        _check_probes(base_url, len(numbers))
        places = stat_all(template.url(str(number).zfill(width)) for number in numbers)
        return [number for number, place in zip(numbers, places, strict=True) if place]
    return [number for number in _listed_numbers(template, width) or () if number in numbers]


def _check_probes(base_url: str, count: int) -> None:
    if count > MAX_PROBES:
        raise ConfigError(
            f"data.source.end_shard: {count} shards of {shown(base_url)} cannot be listed there, and are too many to "
            f"look for one by one (limit {MAX_PROBES}). Give the number of the last one."
        )


def _selected(base_url: str, templates: Sequence[_Template], start: int, end: int | None) -> list[ShardUrl]:
    """The shards of a URL without `{}` whose numbers are asked for."""
    shards = []
    for template in templates:
        number = template.number if template.number != NO_NUMBER else _number_in(template.before)
        shards.append(ShardUrl(number, template.before))
    if start > 0 and any(shard.number == NO_NUMBER for shard in shards):
        raise ConfigError(f"data.source.start_shard: {shown(base_url)} has no number to compare it with. Leave it out.")
    if len(shards) != len({shard.url for shard in shards}):
        raise ConfigError(f"{OPTION}: {shown(base_url)} names a shard twice.")
    last = math.inf if end is None or end >= ALL_THERE_ARE else end
    chosen = [shard for shard in shards if shard.number == NO_NUMBER or start <= shard.number <= last]
    if not chosen:
        raise ConfigError(f"data.source: start_shard={start} and end_shard={end} leave nothing of {shown(base_url)}.")
    return chosen


def _number_in(url: str) -> int:
    """The last digits of a file's name before its first dot."""
    scheme = scheme_of(url)
    if scheme in {"http", "https"}:
        url = re.split("[?#]", url, maxsplit=1)[0]
    if scheme in {"http", "https", "file"}:
        url = unquote(url)
    digits = _DIGITS.findall(url.rpartition("/")[2].partition(".")[0])
    return int(digits[-1]) if digits and len(digits[-1]) <= 18 else NO_NUMBER


def _all_there_are(
    base_url: str, templates: Sequence[_Template], start: int, end: int | None, width: int
) -> list[ShardUrl]:
    """The shards that folders hold, with numbers of `start` and more."""
    shards = []
    for template in templates:
        numbers = _listed_numbers(template, width)
        if numbers is None:
            given = "" if end is None else f", and not {end}"
            raise ConfigError(
                f"data.source.end_shard: how many shards {shown(base_url)} has cannot be listed there. "
                f"Give the number of the last one{given}."
            )
        chosen = [number for number in numbers if number >= start and (end is None or number <= end)]
        shards += [ShardUrl(number, template.url(str(number).zfill(width))) for number in chosen]
    if not shards:
        first = templates[0]
        raise DataError(
            f"{OPTION}: there is no shard {shown(first.url(str(start).zfill(width)))}, and none with a higher number."
            + _width_hint(first, width)
        )
    return shards


def _listed_numbers(template: _Template, width: int) -> list[int] | None:
    """Numbers of the shards that exist, sorted; None where folders cannot be listed."""
    if scheme_of(template.before) == "pipe":
        return None
    folder, prefix, suffix, rest = _around(template)
    try:
        names = listing(folder)
    except NotFound:
        names = []
    if names is None:
        return None
    numbers = sorted(number for name in names if (number := _matched(name, prefix, suffix, width)) is not None)
    if rest:  # {} is the name of a folder: whether it holds the shard must be asked
        places = stat_all(template.url(str(number).zfill(width)) for number in numbers)
        numbers = [number for number, place in zip(numbers, places, strict=True) if place]
    return numbers


def _around(template: _Template) -> tuple[str, str, str, str]:
    """The folder in which `{}` stands, the name's parts before and after it, and what of the path comes below."""
    folder, slash, prefix = template.before.rpartition("/")
    suffix, below, rest = template.after.partition("/")
    if scheme_of(template.before) == "file":
        prefix, suffix = unquote(prefix), unquote(suffix)
    return _folder(folder, slash), prefix, suffix, below + rest


def _folder(folder: str, slash: str) -> str:
    if folder.endswith(":/"):  # the root of a protocol
        return folder + "/"
    return folder or slash or "."


def _matched(name: str, prefix: str, suffix: str, width: int) -> int | None:
    if not name.startswith(prefix) or not name.endswith(suffix):
        return None
    middle = name[len(prefix) : len(name) - len(suffix)]
    if not _DIGITS.fullmatch(middle) or len(middle) > 18 or str(int(middle)).zfill(width) != middle:
        return None
    return int(middle)


def _look(base_url: str, wanted: Sequence[ShardUrl]) -> tuple[list[ShardUrl], list[str]]:
    """Which of the shards exist, and what to call the others."""
    scheme = scheme_of(base_url)
    if scheme == "pipe":
        return list(wanted), []
    if len(wanted) == 1:
        return _look_at_one(wanted[0])
    places = [_split(shard.url) for shard in wanted]
    folders = {folder for folder, _ in places}
    if scheme in {"http", "https"} or len(wanted) < FEW * len(folders):
        _check_probes(base_url, len(wanted))
        exist = [place is not None for place in stat_all(shard.url for shard in wanted)]
    else:
        there = {folder: _names_in(folder) for folder in folders}
        exist = [name in there[folder] for folder, name in places]
    pairs = list(zip(wanted, exist, strict=True))
    return [shard for shard, here in pairs if here], [shard.shown for shard, here in pairs if not here]


def _look_at_one(shard: ShardUrl) -> tuple[list[ShardUrl], list[str]]:
    try:
        if shard.url.endswith("/") and scheme_of(shard.url) in {"http", "https"}:
            raise IsFolder("")
        stat(shard.url)
    except NotFound:
        return [], [shard.shown]
    except IsFolder:
        raise ConfigError(
            f"{OPTION}: {shard.shown} is a folder, and what its shards are called is missing.{_name_hint(shard.url)}"
        ) from None
    return [shard], []


def _split(url: str) -> tuple[str, str]:
    """Folder and name of a file."""
    folder, slash, name = url.rpartition("/")
    return _folder(folder, slash), unquote(name) if scheme_of(url) == "file" else name


def _names_in(folder: str) -> set[str]:
    try:
        return set(listing(folder) or ())
    except NotFound:
        return set()


def _missing(base_url: str, missing: Sequence[str], num_found: int, width: int) -> str:
    num_wanted = num_found + len(missing)
    named = ", ".join(missing[:MAX_NAMED])
    more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
    if num_wanted == 1:
        told = " (404)" if scheme_of(base_url) in {"http", "https"} else ""
        return f"{OPTION}: {named} does not exist{told}."
    if not num_found:
        hint = "".join(_width_hint(template, width) for template in _templates(base_url)[:1] if "{}" in base_url)
        return f"{OPTION}: none of {num_wanted} shards exists: {named}{more}.{hint}"
    return (
        f"{OPTION}: {len(missing)} of {num_wanted} shards do not exist: {named}{more}. Bring them, correct start_shard "
        "and end_shard, or leave them out with data.source.skip_missing_shards."
    )


def _width_hint(template: _Template, width: int) -> str:
    """What to write if the folder has such shards with another number of digits; else what it has."""
    folder, prefix, suffix, _ = _around(template)
    names = sorted(_names_in(folder)) if scheme_of(folder) not in {"http", "https", "pipe"} else []
    if not names:
        return ""
    for name in names:
        for other in range(19):
            if other != width and _matched(name, prefix, suffix, other) is not None:
                return f" But there is {one_line(name)}: set data.source.shard_width={other}."
    return f" The folder has {_such_as(names)}."


def _name_hint(url: str) -> str:
    """What to write for the shards that a folder has, if it has any."""
    names = sorted(_names_in(url)) if scheme_of(url) not in {"http", "https"} else []
    kinds = Counter((m[1], len(m[2]), m[3]) for m in map(_TAR.fullmatch, names) if m)
    where = shown(url).rstrip("/")
    if not kinds:
        return f" Write it as {where}/{{}}.tar." + (f" The folder has {_such_as(names)}." if names else "")
    (prefix, width, suffix), count = kinds.most_common(1)[0]
    return (
        f" Write {where}/{one_line(prefix)}{{}}{one_line(suffix)} with data.source.shard_width={width} for the {count} "
        f"that look like {_such_as([name for name in names if name.startswith(prefix) and _TAR.fullmatch(name)])}."
    )


def _such_as(names: Sequence[str]) -> str:
    return f"{one_line(names[0])}" + (f" and {len(names) - 1} more files" if len(names) > 1 else "")
