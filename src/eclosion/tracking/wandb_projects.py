"""Who may see a project at Weights & Biases."""

import json
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from eclosion.errors import ConfigError

__all__ = ["check_private"]

# Seconds that a question without a key may take, and the question.
ASK_SECONDS = 10.0
PROJECT = "query ($project: String!, $entity: String!) { project(name: $project, entityName: $entity) { id } }"


def check_private(base_url: str, entity: str, project: str) -> None:
    """Ask for a project as a stranger would.

    Args:
        base_url: of wandb's server.
        entity, project: which it is.

    Raises:
        ConfigError: if it is shown.
        OSError: if the server does not answer.
    """
    asked = {"query": PROJECT, "variables": {"project": project, "entity": entity}}
    request = Request(
        f"{base_url.rstrip('/')}/graphql", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urlopen(request, timeout=ASK_SECONDS) as answer:
            shown = (json.load(answer).get("data") or {}).get("project")
    except HTTPError as error:
        if error.code not in (401, 403, 404):
            raise
        return
    if shown:
        raise ConfigError(
            f"everybody can see the project {entity}/{project}, and nothing was sent. Set its visibility to Team "
            "there, or set public=true where the config names wandb."
        )
