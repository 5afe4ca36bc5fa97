"""The parts of the reference that are read from the code when the documentation is built.

A page says where one goes with a line such as

    <!-- generated: config -->

so that the reference cannot tell of an option that is not there, nor leave one out.
"""

import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_type_hints

import typer

from eclosion import errors
from eclosion.cli import app
from eclosion.config.changes import kind_of
from eclosion.config.schema import RunConfig
from eclosion.inspection.recipes import recipes
from eclosion.registry import EXTRAS, TABLES, describe, part_of, resolve
from eclosion.rundir import RunDir

__all__ = ["GENERATED", "MARK", "fill", "outdated"]

MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
DOCS = Path(__file__).parent
# What a table of parts is called, and the key under which a config names one of them.
TITLES = {
    "tasks": ("Tasks", "task"),
    "sources": ("Data sources", "data.source"),
    "models": ("Models", "task.model"),
    "noise_schedules": ("Noise schedules", "task.noise_schedule"),
    "samplers": ("Samplers", "sample.sampler"),
    "loggers": ("Loggers", "track.log"),
    "dialects": ("Dialects", ""),
}
ON_RESUME = {
    "identity": "identity",
    "schedule": "schedule",
    "free": "free",
}


def fill(app: object, docname: str, source: list[str]) -> None:
    """Replace each mark of a page with what it stands for; Sphinx calls this when it has read the page."""
    source[0] = MARK.sub(lambda mark: GENERATED[mark[1]](), source[0])


def outdated(app: object, env: object, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """The pages with a mark: they are built each time, since the code may have changed."""
    pages = DOCS.rglob("*.md")
    return [
        page.relative_to(DOCS).with_suffix("").as_posix()
        for page in pages
        if "_build" not in page.parts and MARK.search(page.read_text(encoding="utf-8"))
    ]


# --- config ----------------------------------------------------------------------------------------------------------


def config_reference() -> str:
    """Every key of the fixed sections, with its type, default and class on resume."""
    top, sections = [], []
    for field in _fields(RunConfig):
        if dataclasses.is_dataclass(field.type):
            sections.append(
                f"## {field.name}\n\n{_doc(field.type)}\n\n" + "\n".join(_entries(field.type, f"{field.name}."))
            )
        else:
            top.append(_entry(RunConfig, field.name, ""))
    return "## Top level\n\n" + "\n".join(top) + "\n" + "\n\n".join(sections) + "\n"


def _fields(cls: Any) -> list[Any]:
    return [field for field in dataclasses.fields(cls) if field.init]


def _entries(cls: Any, prefix: str) -> Iterator[str]:
    """The options of a section or part, those of a dataclass inside it included."""
    for field in _fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from _entries(field.type, f"{prefix}{field.name}.")
        else:
            yield _entry(cls, field.name, prefix)


def _entry(cls: Any, name: str, prefix: str) -> str:
    """One definition: the key, then its type, default, class on resume and meaning."""
    option = next(option for option in describe(cls) if option.name == name)
    annotation = next(field.type for field in _fields(cls) if field.name == name)
    held = part_of(annotation) or next((found for item in _inside(annotation) if (found := part_of(item))), None)
    facts = [option.type if held is None else f"{option.type}: [see there](parts.md#{_anchor(held.table)})"]
    facts.append("required" if option.default == "required" else f"default `{option.default}`")
    if prefix != "-":
        facts.append(ON_RESUME[kind_of(f"{prefix}{name}")])
    key = f"{prefix}{name}".removeprefix("-")
    return f"[`{key}`]{{#{_slug(prefix, name)}}}\n: {' · '.join(facts)}\n\n  {option.text}\n"


def _inside(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", ())


def _slug(prefix: str, name: str) -> str:
    return f"key-{prefix}{name}".replace(".", "-").replace("_", "-").replace("--", "-").lower()


def _anchor(table: str) -> str:
    return TITLES[table][0].lower().replace(" ", "-")


def _doc(documented: object) -> str:
    return inspect.getdoc(documented) or ""


# --- parts -----------------------------------------------------------------------------------------------------------


def parts_reference() -> str:
    """Every part of every table, with its documentation and options."""
    return "\n\n".join(_table(table) for table in TABLES)


def _table(table: str) -> str:
    title, key = TITLES[table]
    if not key:
        return f"## {title}\n\nConfigs of other programs, translated when they are read.\n\n" + "\n\n".join(
            _dialect(name) for name in TABLES[table]
        )
    kind = kind_of(f"{key}.name")
    head = f"## {title}\n\nNamed by `{key}`. On resume their names and options are {_resume_link(kind)} keys."
    return head + "\n\n" + "\n\n".join(_part(table, name, key) for name in TABLES[table])


def _resume_link(kind: str) -> str:
    return f"[{kind}](config.md#what-may-change-on-resume)"


def _part(table: str, name: str, key: str) -> str:
    cls = resolve(table, name)
    needs = [extra for library, extra in EXTRAS.items() if hasattr(sys.modules[cls.__module__], library)]
    lines = [f"### {name}", "", _doc(cls), ""]
    lines += [f'Needs `pip install "eclosion[{extra}]"`.\n' for extra in needs]
    options = list(_entries_of_part(cls, table, name, key))
    return "\n".join([*lines, *(options or ["It has no options."])])


def _entries_of_part(cls: Any, table: str, name: str, key: str, below: str = "") -> Iterator[str]:
    for field in _fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from _entries_of_part(field.type, table, name, key, f"{below}{field.name}.")
            continue
        option = next(option for option in describe(cls) if option.name == field.name)
        held = part_of(field.type)
        what = option.type if held is None else f"{option.type}: [see there](#{_anchor(held.table)})"
        default = "required" if option.default == "required" else f"default `{option.default}`"
        slug = f"{table}-{name}-{below}{field.name}".replace(".", "-").replace("_", "-").lower()
        yield f"[`{below}{field.name}`]{{#{slug}}}\n: {what} · {default}\n\n  {option.text}\n"


def _dialect(name: str) -> str:
    module = sys.modules[resolve("dialects", name).recognises.__module__]
    settings = [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]
    keys = [entry for cls in settings for entry in _dialect_keys(cls)]
    return f"### {name}\n\n{_doc(module)}\n\n" + "\n".join(keys)


def _dialect_keys(cls: Any) -> Iterator[str]:
    for option in describe(cls):
        yield f"`{option.name}`\n: {option.type} · default `{option.default}`\n\n  {option.text}\n"


# --- the rest --------------------------------------------------------------------------------------------------------


def command_reference() -> str:
    """Every command with its arguments and options, as the command line itself knows them."""
    return "\n\n".join(_command(name, command) for name, command in commands())


def commands() -> Iterator[tuple[str, Any]]:
    """Each command by the words that call it, such as "data show"."""
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        below = getattr(command, "commands", None)
        if below is None:
            yield name, command
        else:
            yield from ((f"{name} {inner}", inside) for inner, inside in below.items())


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    words = [_argument(p) if p.required else f"[{_argument(p)}]" for p in arguments]
    usage = " ".join(["eclosion", name, *(["[OPTIONS]"] if options else []), *words])
    lines = [f"## {name}", "", " ".join(inspect.cleandoc(command.help or "").split()), "", "```text", usage, "```", ""]
    for p in arguments:
        lines += [f"`{_argument(p)}`", f": {p.help}{_default(p)}", ""]
    for p in options:
        names = ", ".join(f"`{name}`" for name in [*p.opts, *p.secondary_opts])
        lines += [names, f": {p.help}{_default(p)}", ""]
    return "\n".join(lines)


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper()) + ("..." if parameter.nargs == -1 else "")


def _default(parameter: Any) -> str:
    default = parameter.default
    if parameter.required or default is None or isinstance(default, bool) or not isinstance(default, int | float | str | Path):
        return ""
    return f" Default: `{default}`."


def exit_codes() -> str:
    """Each class of error with its exit code and meaning."""
    rows = ["| exit code | error | meaning |", "|---|---|---|", "| 0 | | The command did what it was asked to. |"]
    classes = [getattr(errors, name) for name in errors.__all__]
    found = [cls for cls in classes if inspect.isclass(cls)]
    codes = {cls: "130 or 143" if cls is errors.Interrupted else str(cls.exit_code) for cls in found}
    for cls in sorted(found, key=lambda cls: (len(codes[cls]), codes[cls], cls.__name__)):
        summary = _doc(cls).partition("\n\n")[0].replace("\n", " ")
        rows.append(f"| {codes[cls]} | `{cls.__name__}` | {summary} |")
    return "\n".join(rows)


def run_folder() -> str:
    """Each path of a run folder, in the words of `rundir.py`."""
    root = RunDir(Path("RUN"))
    fixed = {name: prop for name, prop in vars(RunDir).items() if isinstance(prop, property)}
    rows = ["| path | holds |", "|---|---|"]
    for name, prop in fixed.items():
        path = getattr(root, name)
        slash = "" if path.suffix or name == "lock" else "/"
        rows.append(f"| `{path.relative_to(root.root)}{slash}` | {_doc(prop)} |")
    rows.append(f"| `{root.checkpoint(1000).relative_to(root.root)}/` | {_doc(RunDir.checkpoint)} |")
    rows.append(f"| `{root.sample_grid(1000).relative_to(root.root)}` | {_doc(RunDir.sample_grid)} |")
    return "\n".join(rows)


def recipe_list() -> str:
    """The recipes of `eclosion init`, with what each is for."""
    rows = ["| recipe | what it is for |", "|---|---|"]
    rows += [f"| `{name}` | {text.partition(chr(10))[0].lstrip('# ')} |" for name, text in recipes().items()]
    return "\n".join(rows)


GENERATED: dict[str, Callable[[], str]] = {
    "commands": command_reference,
    "config": config_reference,
    "exit-codes": exit_codes,
    "parts": parts_reference,
    "recipes": recipe_list,
    "run-folder": run_folder,
}
