"""What the documentation says is there, is there."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import eclosion
from eclosion.config.load import leaves, load
from eclosion.config.schema import RunConfig
from eclosion.registry import TABLES, describe, dump

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page):
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="session")
def generate():
    """docs/generate.py, which is no package."""
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page, *languages):
    return [text for language, text in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


# --- commands --------------------------------------------------------------------------------------------------------


def command_lines():
    """Each `eclosion ...` of the code blocks, and of the code in running text if it has arguments."""
    for page in PAGES:
        for block in blocks(page, "bash", "text"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line.removeprefix("$ "), comments=True) if "eclosion " in line else []
                if words and words[0] == "torchrun":
                    words = ["eclosion", *words[words.index("eclosion") + 1 :]]
                if words and words[0] == "eclosion" and "[OPTIONS]" not in words:
                    yield pytest.param(words[1:], id=f"{name_of(page)}: {shlex.join(words[1:])}")
        prose = FENCE.sub("", page.read_text(encoding="utf-8"))
        for words in map(shlex.split, re.findall(r"`eclosion ([^`]+)`", prose)):
            yield pytest.param(words, id=f"{name_of(page)}: {shlex.join(words)}")


@pytest.mark.parametrize("words", list(command_lines()))
def test_every_command_is_one_that_the_command_line_takes(words, generate):
    commands = generate.commands()
    words = [word for word in words if word not in ("--debug", "--version")]
    if not words or words == ["--help"] or words[0] == "COMMAND":
        return
    name = " ".join(words[:2]) if " ".join(words[:2]) in commands else words[0]
    assert name in commands, f"eclosion has no command {name!r}"
    rest = words[len(name.split()) :]
    command = commands[name]
    arguments = sum(p.required for p in command.params if p.param_type_name == "argument")
    rest += ["RUN"] * (arguments if not rest else 0)  # named in a sentence, without its arguments
    command.make_context(name, rest)  # raises what the command line would say


def test_the_check_of_commands_refuses_what_is_not_there(generate):
    """The test above must be able to fail."""
    with pytest.raises(Exception, match="--epochs"):
        generate.commands()["train"].make_context("train", ["config.yaml", "--epochs", "3"])


def test_every_command_is_in_the_readme_and_in_the_reference(generate):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    reference = generate.command_reference()
    for name in generate.commands():
        assert f"`eclosion {name}" in readme
        assert f"## {name}\n" in reference


def test_every_overriden_key_in_a_command_exists():
    overridable = {path.partition("=")[0] for p in command_lines() for path in p.values[0] if "=" in path}
    keys = {key for key in overridable if re.fullmatch(r"[a-z_]+(\.[a-z_]+)*", key)}
    wrong_on_purpose = {"data.source.resoluton", "train.batchsize", "data.imagesize"}
    known = {path for path, _ in leaves(dump(load(minimal()).run))} | {"data.source", "sample.sampler", "task.model"}
    known |= {"size", "shard_width"}  # of a source that is named without a config
    assert keys - wrong_on_purpose - known == set()
    assert wrong_on_purpose <= keys


# --- configs ---------------------------------------------------------------------------------------------------------


def minimal():
    return {"output": "runs/x", "data": {"source": "butterflies"}}


def yaml_configs():
    for page in PAGES:
        for i, block in enumerate(blocks(page, "yaml")):
            yield pytest.param(block, id=f"{name_of(page)}: {i}")


@pytest.mark.parametrize("text", list(yaml_configs()))
def test_every_config_is_accepted(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    load(path)


def test_every_config_in_json_is_accepted(tmp_path):
    texts = [t for page in PAGES for t in blocks(page, "json") if '"output"' in t]
    assert texts
    for i, text in enumerate(texts):
        path = tmp_path / f"{i}.json"
        path.write_text(text, encoding="utf-8")
        load(path)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_config_is_accepted(path):
    load(path)


# --- the generated reference -----------------------------------------------------------------------------------------


def test_every_config_key_stands_in_the_reference_with_its_meaning(generate):
    text = generate.config_reference()
    entries = {option.name: option for option in describe(RunConfig)}
    for path, _ in leaves(dump(load(minimal()).run)):
        path, _, _ = path.partition("[")  # whichever of a list it is
        section, _, _ = path.partition(".")
        if section in ("output", "overwrite", "export", "seed", "task"):
            assert f"`{section}`{{#key-{section}}}\n:" in text
            assert entries[section].text in text
        elif path.startswith(("data.source.", "sample.sampler.", "evaluate.sampler.", "evaluate.extractor.")):
            assert f"`{path.rpartition('.')[0]}`{{#" in text
        else:
            anchor = f"key-{path}".replace(".", "-").replace("_", "-")
            assert f"`{path}`{{#{anchor}}}\n: " in text, path


def test_every_part_and_option_stands_in_the_reference(generate):
    from eclosion.registry import resolve

    text = generate.parts_reference()
    for table in TABLES:
        for name in TABLES[table]:
            assert f"### {name}\n" in text
            cls = resolve(table, name)
            for option in describe(cls) if isinstance(cls, type) else []:
                if option.default != "its own defaults":
                    assert f"`{option.name}`\n: " in text, (table, name, option.name)
                    assert option.text in text


def test_no_mark_is_left_in_a_page(generate):
    for page in DOCS.rglob("*.md"):
        for mark in generate.MARK.findall(page.read_text(encoding="utf-8")):
            assert mark in generate.GENERATED, f"{name_of(page)}: {mark}"


# --- links -----------------------------------------------------------------------------------------------------------


def links():
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not target.startswith(("http:", "https:")):
                yield pytest.param(page, target, id=f"{name_of(page)}: {target}")


def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize(("page", "target"), list(links()))
def test_every_link_inside_the_repository_leads_somewhere(page, target, generate):
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    assert there.exists(), f"{name_of(page)} links to {target}"
    if anchor:
        names = set(anchors(there))
        for mark in generate.MARK.findall(there.read_text(encoding="utf-8")):
            names |= {
                re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-")
                for h in re.findall(r"^#+ (.+)$", generate.GENERATED[mark](), re.MULTILINE)
            }
        assert anchor in names, f"{name_of(page)} links to {target}"


def test_every_test_that_is_named_is_there():
    for page in PAGES:
        for path in re.findall(r"`(tests/[\w/.]+)`", page.read_text(encoding="utf-8")):
            assert (ROOT / path).exists(), f"{name_of(page)} names {path}"


# --- python ----------------------------------------------------------------------------------------------------------


def test_the_replay_that_the_manual_shows_finds_the_images(make_config, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(eclosion.UserError, match="is not finite"):
        eclosion.train(make_config(run, optimizer={"learning_rate": 1e30, "lr_warmup_steps": 0}))
    bundle = next(run.glob("replay/step-*/rank-0"))
    code = blocks(DOCS / "how-to" / "when-a-run-fails.md", "python")[0]
    assert "RUN/replay/step-00001234/rank-0" in code
    exec(code.replace("RUN/replay/step-00001234/rank-0", str(bundle)), {})
    assert "tensor([False" in capsys.readouterr().out


def test_every_block_of_python_is_python():
    for page in PAGES:
        for block in blocks(page, "python"):
            compile(block, name_of(page), "exec")


# --- the rest --------------------------------------------------------------------------------------------------------


def test_the_changelog_has_a_section_for_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[({re.escape(eclosion.__version__)}|Unreleased)\]", text, re.MULTILINE)


def test_every_public_name_is_in_the_python_reference():
    text = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    missing = [n for n in eclosion.__all__ if f":: eclosion.{n}\n" not in text and f".errors.{n}\n" not in text]
    assert missing == []


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = {
        t for page in PAGES for t in re.findall(r"\bmake ([a-z]+)\b(?= *$|`| +#)", page.read_text(), re.MULTILINE)
    }
    assert {"demo", "check"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_pages_are_built_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path / "html")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in sorted((tmp_path / "html").rglob("*.html"))}
    config = Text(pages["config.html"])
    assert {"train.micro_batch_size", "checkpoint.keep_every"} <= config.words
    assert "key-train-micro-batch-size" in config.anchors
    assert "<math" in pages["maths.html"]
    assert [name for name, html in pages.items() if "<!-- generated" in html or "<!-- picture" in html] == []
    scripts = {src for html in pages.values() for src in Text(html).scripts}
    assert [src for src in scripts if "//" in src] == [], "a page must not need a network"


class Text(HTMLParser):
    """The words of a page as a reader sees them, its anchors, and the scripts that it loads."""

    def __init__(self, html):
        super().__init__()
        self.words, self.anchors, self.scripts = set(), set(), set()
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if "id" in found:
            self.anchors.add(found["id"])
        if tag == "script" and found.get("src"):
            self.scripts.add(found["src"])

    def handle_data(self, data):
        self.words |= set(data.split())
