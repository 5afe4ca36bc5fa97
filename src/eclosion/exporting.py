"""From a checkpoint to a diffusers pipeline folder, loaded again and compared before it counts as done."""

import json
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eclosion.errors import ConfigError, EnvironmentProblem
from eclosion.models.libraries import without_bars
from eclosion.registry import dump
from eclosion.rng import generator, randn
from eclosion.sampling import TrainedTask, load_trained

__all__ = ["clean_exports", "export", "export_trained", "refuse_untrained"]

ASIDE = ".export-"
# The file that makes a folder a pipeline.
INDEX = "model_index.json"


def export(run: str | Path, out: str | Path, *, pipeline: str | None = None, checkpoint: str | int = "latest") -> Path:
    """Write a checkpoint of a run, on its first average, as a diffusers pipeline.

    Args:
        run: a run folder, or one checkpoint in it.
        out: the folder to write; must be new or empty.
        pipeline: "ddpm" or "ddim" for a network in pixel space, "unclip" for a cascade; none takes the first that
            the task has.
        checkpoint: of a run folder: "latest", "best" as `checkpoint.best` of the run says, or a step.

    Returns:
        The folder, which `from_pretrained` of `DDPMPipeline`, `DDIMPipeline` or `eclosion.UnclipDecoderPipeline` loads.

    Raises:
        ConfigError: if `out` holds something, the task has no such pipeline, or a network was never trained.
        CheckpointError: if the run has no checkpoint.
        UserError: if diffusers has no pipeline for this task.
        EnvironmentProblem: if what was written does not load as the same network.
    """
    target = Path(out)
    if target.exists() and any(target.iterdir()):
        raise ConfigError(f"{target} is not empty. Choose a new folder for the pipeline.")
    return export_trained(load_trained(run, checkpoint=checkpoint, device="cpu"), target, pipeline=pipeline)


def export_trained(trained: TrainedTask, target: Path, *, pipeline: str | None) -> Path:
    """Write a trained task as a pipeline folder.

    It is written aside, loaded again and compared; then its files move into `target`, the one that makes it a
    pipeline last, so that a kill leaves no half of one.
    """
    refuse_untrained(trained.untrained)
    how = trained.run.sample
    wanted = trained.task.pipeline(pipeline, sampler=how.sampler, guidance_scale=how.guidance_scale)
    target.mkdir(parents=True, exist_ok=True)
    aside = target / f"{ASIDE}{uuid.uuid4().hex}"
    try:
        wanted.save_pretrained(aside, safe_serialization=True)
        (aside / "README.md").write_text(_card(wanted, trained), encoding="utf-8")
        _compare(wanted, aside)
        (target / INDEX).unlink(missing_ok=True)
        for path in sorted(aside.iterdir(), key=lambda path: path.name == INDEX):
            old = target / path.name
            if old.is_dir():
                shutil.rmtree(old)
            path.replace(old)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def refuse_untrained(
    names: Sequence[str], *, cure: str = "Train it, or freeze it in a run that starts from its weights (start)."
) -> None:
    """Refuse a pipeline with networks that nothing was trained or loaded into.

    Args:
        names: those networks.
        cure: what to do.

    Raises:
        ConfigError: if there are any.
    """
    if names:
        raise ConfigError(f"{', '.join(names)}: frozen, and never trained, so that a pipeline would make noise. {cure}")


def clean_exports(folder: Path) -> None:
    """Remove what a killed export left behind. Only under the run's lock."""
    for path in folder.glob(f"{ASIDE}*"):
        shutil.rmtree(path)


def _compare(wanted: Any, folder: Path) -> None:
    """The pipeline on disk must be the one in memory: same networks, same noise levels, same settings."""
    with without_bars("diffusers"):
        found = type(wanted).from_pretrained(folder, low_cpu_mem_usage=False)
    ours, theirs = _networks(wanted), _networks(found)
    same = ours.keys() == theirs.keys() and _settings(wanted) == _settings(found)
    if "scheduler" in wanted.components:
        same = same and torch.equal(wanted.scheduler.alphas_cumprod, found.scheduler.alphas_cumprod)
    different = [name for name in ours if not (same and _is_same(ours[name], theirs[name]))]
    if different:
        raise EnvironmentProblem(
            f"{folder}: the pipeline does not load as the network that was written ({', '.join(different)}). "
            "Check the disk."
        )


def _networks(pipeline: Any) -> dict[str, Any]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def _settings(pipeline: Any) -> str:
    """What the pipeline is told besides its parts."""
    told = {k: v for k, v in pipeline.config.items() if not k.startswith("_") and k not in pipeline.components}
    return json.dumps(told, sort_keys=True)


def _is_same(wanted: Any, found: Any) -> bool:
    """Whether two networks have the same weights and give the same output."""
    ours, theirs = wanted.state_dict(), found.state_dict()
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[k].cpu(), theirs[k].cpu()) for k in ours):
        return False
    probe = _probe(wanted)
    was_training = wanted.training
    with torch.no_grad():
        wanted_out = wanted.eval()(**{name: x.to(wanted.device) for name, x in probe.items()})
        found_out = found.eval()(**probe)
    wanted.train(was_training)
    return torch.allclose(_tensor(wanted_out).cpu(), _tensor(found_out), rtol=1e-3, atol=1e-4)


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.sample


def _probe(unet: Any) -> dict[str, torch.Tensor]:
    """What a network is called with to compare it: one image, and all that it was built to be told."""
    rngs, told = [generator(0, "export")], unet.config
    size = told.sample_size if "sample_size" in told else 2 * unet.size_factor
    height, width = (size, size) if isinstance(size, int) else size
    image = (told.in_channels, height, width)
    shapes = {
        "sample": image,
        "image_embed": told.get("image_embed_dim") and (told.image_embed_dim,),
        "text_encodings": told.get("text_embed_dim") and (2, told.text_embed_dim),
        "lowres_cond": told.get("lowres_cond") and image,
    }
    probe = {name: randn(rngs, shape) for name, shape in shapes.items() if shape}
    levels = ("timestep", "lowres_noise_level") if told.get("lowres_noise_cond") else ("timestep",)
    return probe | {name: torch.tensor([1]) for name in levels}


# What a model card shows of a pipeline by its class: a tag of the hub, and how it is used.
USES = {
    "UnclipDecoderPipeline": (
        "image-to-image",
        """from eclosion import UnclipDecoderPipeline

pipeline = UnclipDecoderPipeline.from_pretrained("path/to/this/folder", low_cpu_mem_usage=False)
images = pipeline({call}).images""",
    )
}
USE = (
    "unconditional-image-generation",
    """from diffusers import {kind}

image = {kind}.from_pretrained("path/to/this/folder")().images[0]""",
)


def _card(wanted: Any, trained: TrainedTask) -> str:
    """The model card: what it is, how to use it, what it was made from."""
    kind = type(wanted).__name__
    tag, use = USES.get(kind, USE)
    example = use.format(kind=kind, call=_call(trained.task.wants))
    config = json.dumps(dump(trained.run), indent=2)
    environment = json.dumps(trained.meta["environment"], indent=2)
    return f"""---
library_name: diffusers
pipeline_tag: {tag}
tags: [diffusion, eclosion]
---

# {trained.folder.root.name}

An image diffusion model trained from scratch with eclosion.

```python
{example}
```

| | |
|---|---|
| optimizer steps | {trained.step} |
| images seen | {trained.samples_seen} |
| images in the data set | {trained.meta["facts"]["num_samples"]} |
| fingerprint of the data | `{trained.meta["fingerprint"]}` |

## Config

```json
{config}
```

## Environment

```json
{environment}
```
"""


def _call(wants: Sequence[str]) -> str:
    """How a pipeline is called for two images that follow something."""
    names = {"image_embed": "image_embeds=image_embeds", "text_encodings": "text_encodings=text_encodings"}
    return ", ".join([names[name] for name in wants] or ["num_images=2"])
