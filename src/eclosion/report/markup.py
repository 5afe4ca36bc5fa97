"""HTML and SVG elements, put together so that text from data cannot become markup."""

import html
import unicodedata

__all__ = ["Html", "clip", "el", "join", "quiet", "section", "visible"]

_WITHOUT_END = frozenset({"img", "input", "link", "meta"})


class Html(str):
    """Markup that goes into a page as it stands; every other text is escaped on its way in."""

    __slots__ = ()


def el(tag: str, /, *children: object, **attributes: object) -> Html:
    """One element.

    Args:
        tag: name of the element, a word of ours.
        children: `Html` as it stands, anything else as escaped text; None is left out.
        attributes: True writes the bare name, None and False nothing. `class_` means class, `aria_label` aria-label.
    """
    opened = "".join(_attribute(name, value) for name, value in attributes.items())
    return Html(f"<{tag}{opened}>" if tag in _WITHOUT_END else f"<{tag}{opened}>{join(*children)}</{tag}>")


def join(*children: object) -> Html:
    """Pieces of a page, one after the other."""
    return Html("".join(_escaped(child) for child in children if child is not None))


def _attribute(name: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{_escaped(value)}"'


def _escaped(child: object) -> str:
    return child if isinstance(child, Html) else html.escape(visible(str(child)))


def visible(text: str) -> str:
    """The text with control, format and other unseen characters spelled out, as in a Python string.

    They may turn the reading direction, or be half of a character that UTF-8 cannot hold.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_seen(c) else c.encode("unicode_escape").decode() for c in text)


def _is_seen(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def clip(value: object, limit: int = 400) -> str:
    """The value as text of at most `limit` characters, and how long it was if it was longer."""
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]} … ({len(text):,} characters)"


def section(title: str, *children: object, **attributes: object) -> Html:
    """A part of the page under a heading, which links find by the title in small letters."""
    name = title.lower().replace(" ", "-")
    return el("section", el("h2", title, id=name), *children, aria_labelledby=name, **attributes)


def quiet(text: str) -> Html:
    """A remark in small print."""
    return el("p", text, class_="quiet")
