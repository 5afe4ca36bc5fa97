"""What the documentation reads from the code when it is built.

A page says where with a line such as

    <!-- generated: config -->
    <!-- picture: images/demo.png: what it shows -->

so that the reference cannot tell of an option that is not there, nor leave one out. A picture that is not made yet
is left out.
"""

import dataclasses
import inspect
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

from eclosion import errors
from eclosion.cli import app
from eclosion.config.changes import kind_of
from eclosion.config.dalle2_schema import DecoderFile
from eclosion.config.schema import RunConfig
from eclosion.data import images
from eclosion.inspection.recipes import recipes
from eclosion.registry import EXTRAS, TABLES, Option, describe, part_of, resolve
from eclosion.rundir import RunDir

__all__ = ["GENERATED", "MARK", "commands", "fill", "outdated"]

DOCS = Path(__file__).parent
MARK = re.compile(r"^<!-- generated: ([\w-]+) -->$", re.MULTILINE)
PICTURE = re.compile(r"^<!-- picture: (\S+): (.+) -->$", re.MULTILINE)
# Table of parts -> its heading, and the key under which a config names its parts.
TABLE_TITLES = {
    "tasks": ("Tasks", "task"),
    "sources": ("Data sources", "data.source"),
    "models": ("Models", "task.model"),
    "encoders": ("Encoders", "task.encoder"),
    "metrics": ("Metrics", "evaluate.metrics"),
    "noise_schedules": ("Noise schedules", "task.noise_schedule"),
    "samplers": ("Samplers", "sample.sampler"),
    "loggers": ("Loggers", "track.log"),
    "savers": ("Savers", "track.save"),
    "loaders": ("Loaders", "start"),
    "dialects": ("Dialects", None),
}


def fill(app: object, docname: str, source: list[str]) -> None:
    """Replace each mark of a page with what it stands for; Sphinx calls this when it has read the page."""
    text = MARK.sub(lambda mark: GENERATED[mark[1]](), source[0])
    source[0] = PICTURE.sub(lambda mark: _picture(docname, mark[1], mark[2]), text)


def outdated(app: object, env: object, added: set[str], changed: set[str], removed: set[str]) -> list[str]:
    """The pages with a mark: they are built each time, since the code may have changed."""
    texts = {page: page.read_text(encoding="utf-8") for page in DOCS.rglob("*.md") if "_build" not in page.parts}
    marked = [page for page, text in texts.items() if MARK.search(text) or PICTURE.search(text)]
    return [page.relative_to(DOCS).with_suffix("").as_posix() for page in marked]


def _picture(docname: str, path: str, text: str) -> str:
    if not (DOCS / path).is_file():
        return ""
    return f"![{text}]({os.path.relpath(path, Path(docname).parent)})"


# --- config and parts ------------------------------------------------------------------------------------------------


def config_reference() -> str:
    """Every key of the fixed sections, with its type, default, class on resume and meaning."""
    top, sections = [], []
    for field in dataclasses.fields(RunConfig):
        section = _section_in(field.type)
        if section is not None:
            entries = "\n".join(_entries(section[0], f"{field.name}.", resume=True))
            sections.append(f"## {field.name}\n\n{inspect.getdoc(section[0])}\n\n{entries}")
        if not dataclasses.is_dataclass(field.type):  # one that may be left out is a key as well
            top.append(_entry(RunConfig, field, "", resume=True))
    return "\n\n".join(["## Top level", "\n".join(top), *sections])


def parts_reference() -> str:
    """Every part of every table, with its documentation and options."""
    return "\n\n".join(_table(table) for table in TABLES)


def _table(table: str) -> str:
    title, key = TABLE_TITLES[table]
    if key is None:
        head = "Configs of other programs, translated when they are read."
        return "\n\n".join([f"## {title}", head, *map(_dialect, TABLES[table])])
    # the name and all options of a part are of one class
    link = f"[{kind_of(f'{key}.name')}](config.md#what-may-change-on-resume)"
    head = f"Named by `{key}`. On resume, names and options are {link} keys."
    return "\n\n".join([f"## {title}", head, *(_part(table, name) for name in TABLES[table])])


def _part(table: str, name: str) -> str:
    cls = resolve(table, name)
    needs = [extra for library, extra in EXTRAS.items() if hasattr(sys.modules[cls.__module__], library)]
    options = "\n".join(_entries(cls, "")) or "It has no options."
    hints = [f'Needs `pip install "eclosion[{extra}]"`.' for extra in needs]
    return "\n\n".join([f"### {name}", inspect.getdoc(cls) or "", *hints, options])


def _dialect(name: str) -> str:
    module = sys.modules[resolve("dialects", name).recognises.__module__]
    settings = [cls for cls in vars(module).values() if inspect.isclass(cls) and cls.__module__ == module.__name__]
    keys = ["\n".join(_entries(cls, "")) for cls in settings] or [f"Its keys: [{name}]({name}.md)."]
    return "\n\n".join([f"### {name}", inspect.getdoc(module) or "", *keys])


def dalle2_reference() -> str:
    """Every key of DALLE2-pytorch's decoder configs, section by section."""
    return "\n\n".join(_sections(DecoderFile, ""))


def _sections(cls: Any, path: str) -> Iterator[str]:
    """A section with its own keys, then the sections inside it."""
    inside = {field.name: _section_in(field.type) for field in dataclasses.fields(cls)}
    entries = []
    for key in describe(cls):
        default = {"required": "required", "none": "default `null`"}.get(key.default, f"default `{key.default}`")
        entries.append(f"`{key.name}`\n: {key.type.replace(' or none', ' or null')} · {default}\n\n  {key.text}\n")
    yield "\n\n".join([f"## {path or 'The file'}", inspect.getdoc(cls) or "", "\n".join(entries)])
    for name, section in inside.items():
        if section is not None:
            many = "[]" if section[1] else ""
            yield from _sections(section[0], f"{path}.{name}{many}" if path else f"{name}{many}")


def _section_in(annotation: Any) -> tuple[Any, bool] | None:
    """The section that a key holds, and whether it holds a list of them; None for a plain value."""
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return annotation, False
    found = [inside for one in get_args(annotation) if (inside := _section_in(one))]
    return (found[0][0], get_origin(annotation) is list or found[0][1]) if found else None


def _entries(cls: Any, prefix: str, *, resume: bool = False) -> Iterator[str]:
    """The options of a section or part, those of a section inside it included."""
    for field in dataclasses.fields(cls):
        section = None if get_origin(field.type) is dict else _section_in(field.type)
        if not dataclasses.is_dataclass(field.type):
            yield _entry(cls, field, prefix, resume=resume)
        if section is not None:
            many = "[]" if section[1] else ""
            yield from _entries(section[0], f"{prefix}{field.name}{many}.", resume=resume)


def _entry(cls: Any, field: Any, prefix: str, *, resume: bool) -> str:
    """One definition: the key, then its type, default and class on resume, then its meaning."""
    option = next(option for option in describe(cls) if option.name == field.name)
    key = f"{prefix}{option.name}"
    facts = [_type(option, field.type), "required" if option.default == "required" else f"default `{option.default}`"]
    facts += [kind_of(key)] if resume else []
    anchor = f"{{#key-{key.replace('.', '-').replace('_', '-')}}}" if resume else ""
    return f"`{key}`{anchor}\n: {' · '.join(facts)}\n\n  {option.text}\n"


def _type(option: Option, annotation: Any) -> str:
    """What a value may be, with a link where it is a part."""
    held = next((found for item in (annotation, *get_args(annotation)) if (found := part_of(item))), None)
    if held is None:
        return option.type
    return f"{option.type} ([these](parts.md#{TABLE_TITLES[held.table][0].lower().replace(' ', '-')}))"


# --- commands --------------------------------------------------------------------------------------------------------


def command_reference() -> str:
    """Every command with its arguments and options, as the command line itself knows them."""
    return "\n\n".join(_command(name, command) for name, command in commands().items())


def commands() -> dict[str, Any]:
    """Each command by the words that call it, such as "data show"."""
    found = {}
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        inner = getattr(command, "commands", None)
        found |= {name: command} if inner is None else {f"{name} {word}": below for word, below in inner.items()}
    return found


def _command(name: str, command: Any) -> str:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    words = [_argument(p) if p.required else f"[{_argument(p)}]" for p in arguments]
    usage = " ".join(["eclosion", name, *(["[OPTIONS]"] if options else []), *words])
    types = get_type_hints(inspect.unwrap(command.callback))
    entries = [f"`{_argument(p)}`\n: {_meaning(p, types)}\n" for p in arguments]
    entries += [f"{', '.join(f'`{o}`' for o in p.opts + p.secondary_opts)}\n: {_meaning(p, types)}\n" for p in options]
    text = " ".join(inspect.cleandoc(command.help or "").split())
    return "\n\n".join([f"## {name}", text, f"```text\n{usage}\n```", "\n".join(entries)])


def _argument(parameter: Any) -> str:
    return str(parameter.metavar or parameter.name.upper()) + ("..." if parameter.nargs == -1 else "")


def _meaning(parameter: Any, types: dict[str, Any]) -> str:
    """The help of an argument or option, then what it may be if that is a choice, then its default."""
    words = [parameter.help]
    if get_origin(types[parameter.name]) is Literal:
        words.append(f"One of {', '.join(f'`{choice}`' for choice in get_args(types[parameter.name]))}.")
    default = parameter.default
    if isinstance(default, int | float | str | Path) and not isinstance(default, bool) and not parameter.required:
        words.append(f"Default: `{default}`.")
    return " ".join(words)


# --- the rest --------------------------------------------------------------------------------------------------------


def exit_codes() -> str:
    """Each class of error with its exit code and meaning."""
    head = ["| exit code | error | meaning |", "|---|---|---|", "| 0 | | The command did what it was asked to. |"]
    found = [cls for name in errors.__all__ if inspect.isclass(cls := getattr(errors, name))]
    codes = {cls: "130, 143" if cls is errors.Interrupted else str(cls.exit_code) for cls in found}
    order = sorted(found, key=lambda cls: (len(codes[cls]), codes[cls], cls.__name__))
    return "\n".join(head + [f"| {codes[cls]} | `{cls.__name__}` | {_first_paragraph(cls)} |" for cls in order])


def _first_paragraph(documented: object) -> str:
    return (inspect.getdoc(documented) or "").partition("\n\n")[0].replace("\n", " ")


def run_folder() -> str:
    """Each path of a run folder, in the words of `rundir.py`."""
    run = RunDir(Path("RUN"))
    paths = {getattr(run, name): prop for name, prop in vars(RunDir).items() if isinstance(prop, property)}
    paths |= {run.checkpoint(1000): RunDir.checkpoint, run.sample_grid(1000): RunDir.sample_grid}  # type: ignore[dict-item]
    paths |= {run.follower("LOGGER"): RunDir.follower}  # type: ignore[dict-item]
    files = ("lock", *(path.name for path in paths if path.suffix))
    rows = [
        f"| `{path.relative_to(run.root)}{'' if path.name in files else '/'}` | {_first_paragraph(documented)} |"
        for path, documented in sorted(paths.items())
    ]
    return "\n".join(["| path | holds |", "|---|---|", *rows])


def recipe_list() -> str:
    """The recipes of `eclosion init`, with what each is for."""
    rows = [f"| `{name}` | {text.partition(chr(10))[0].lstrip('# ')} |" for name, text in recipes().items()]
    return "\n".join(["| recipe | what it is for |", "|---|---|", *rows])


def image_rules() -> str:
    """The rules for image files, from the top of the file that keeps them: a word, and its rule from column 12 on."""
    entries: list[list[str]] = []
    for line in (inspect.getdoc(images) or "").partition("\n\n")[2].splitlines():
        word, rule = line[:12].strip(), line[12:].strip()
        if word:
            entries.append([word, rule])
        else:
            entries[-1][1] += f" {rule}"
    text = "\n".join(f"**{word}**\n: {rule}\n" for word, rule in entries)
    return text.replace("`MAX_PIXELS`", f"{images.MAX_PIXELS:,}")


def layers() -> str:
    """The layers of the code, top first, as import-linter checks them."""
    project = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    return "\n".join(["```text", *project["tool"]["importlinter"]["contracts"][0]["layers"], "```"])


GENERATED: dict[str, Callable[[], str]] = {
    "commands": command_reference,
    "config": config_reference,
    "dalle2": dalle2_reference,
    "exit-codes": exit_codes,
    "image-rules": image_rules,
    "layers": layers,
    "parts": parts_reference,
    "recipes": recipe_list,
    "run-folder": run_folder,
}
