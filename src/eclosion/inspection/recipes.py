"""Configs to start from."""

from importlib import resources
from pathlib import Path

from eclosion.errors import ConfigError, EnvironmentProblem, did_you_mean

__all__ = ["recipes", "write_config"]


def recipes() -> dict[str, str]:
    """The text of each recipe by name; its first line is a comment that says what it is for."""
    files = resources.files("eclosion") / "recipes"
    found = {Path(file.name).stem: file.read_text(encoding="utf-8") for file in files.iterdir()}
    return dict(sorted(found.items()))


def write_config(path: str | Path = "config.yaml", *, recipe: str = "folder") -> Path:
    """Write a commented config to start from.

    Args:
        path: the file to write.
        recipe: one of `recipes()`.

    Raises:
        ConfigError: if there is no such recipe, or the file exists.
        EnvironmentProblem: if it cannot be written.
    """
    known, path = recipes(), Path(path)
    if recipe not in known:
        raise ConfigError(f"{recipe!r} is no recipe.{did_you_mean(recipe, known)}")
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"{path}: a recipe is YAML. Give a name that ends in .yaml.")
    if path.exists():
        raise ConfigError(f"{path} exists already, and is left as it is. Give another name.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            file.write(known[recipe])
    except OSError as error:
        raise EnvironmentProblem(f"{path} cannot be written: {error.strerror}.") from error
    return path
