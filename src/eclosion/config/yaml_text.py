"""YAML as people write it in configs: 1e-3 is a number, no is a word, and no key stands twice."""

import re
from collections.abc import Hashable
from typing import Any

import yaml

__all__ = ["parse_yaml", "yaml_problem"]


def parse_yaml(text: str) -> Any:
    """The value that a YAML text describes.

    Raises:
        yaml.YAMLError: if it is no YAML, names a key twice in one mapping, or uses an alias.
    """
    return yaml.load(text, _Loader)


def yaml_problem(error: yaml.YAMLError) -> str:
    """What is wrong with a YAML text and where, on one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}."
    return " ".join(str(error).split())


class _Refused(yaml.MarkedYAMLError):
    """YAML that we do not read."""

    def __init__(self, problem: str, mark: Any) -> None:
        super().__init__(problem=problem, problem_mark=mark)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which builds nothing from names, with those differences and without aliases."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            event: yaml.AliasEvent = self.peek_event()  # type: ignore[no-untyped-call]
            # A page of aliases of aliases unfolds to more than any memory holds.
            raise _Refused(f"aliases such as *{event.anchor} are not read", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise _Refused(f"the key {key.value!r} stands here twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


# PyYAML reads YAML 1.1, where `mixed_precision: no` is false, and 1e-3 is a text for want of a dot.
_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile(r"(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"[-+]?\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+$"), list("-+0123456789"))
