"""The `hub` section of a config: where the finished pipeline is pushed to."""

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator

from eclosion.redaction import holds_token
from eclosion.registry import part

__all__ = ["HubConfig", "RepoName", "TokenPath", "check_repo_name", "check_token_path"]

_REPO = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]{0,95}/)?[A-Za-z0-9_]([A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


def check_repo_name(name: str) -> str:
    """The name of a repository, as given: "my-model", or "owner/my-model".

    Raises:
        ValueError: if it is none. A token that was given for it is not repeated.
    """
    if holds_token(name):
        raise ValueError("is a token, and must be the name of a repository. Set HF_TOKEN, and make a new token")
    if not _REPO.fullmatch(name) or "--" in name or ".." in name or name.endswith(".git"):
        raise ValueError(f"{name!r} is not the name of a repository, such as 'my-model' or 'owner/my-model'")
    return name


# The field type of a repository's name.
RepoName = Annotated[str, AfterValidator(check_repo_name)]


def check_token_path(path: Path) -> Path:
    """The path of a file with a token, as given.

    Raises:
        ValueError: if it is a token itself, which the message does not repeat.
    """
    if holds_token(str(path)) and not path.exists():
        raise ValueError("is a token, and must be the path of a file with it. Set HF_TOKEN, and make a new token")
    return path


# The field type of a file with a token.
TokenPath = Annotated[Path, AfterValidator(check_token_path)]


@part
class HubConfig:
    """The repository of the Hugging Face hub that gets the finished pipeline."""

    # Its name: "owner/name", or "name" alone for one of your own. It is made if it is not there.
    repo: RepoName
    # Whether only its owner may see it. If the hub says otherwise, nothing is sent.
    private: bool = True
    # A file with the token, for when HF_TOKEN is not set; none takes the one that `hf auth login` writes.
    token_path: TokenPath | None = None
