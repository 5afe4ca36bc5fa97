"""A decoder checkpoint of DALLE2-pytorch's own trainer, and what the original makes of it, for the tests of the import.

Needs DALLE2-pytorch 1.15.6, which nothing else in this project does; in an environment of its own:

    pip install dalle2-pytorch==1.15.6
    python scripts/make_import_golden.py

Two U-Nets are trained for a few steps, and all their numbers are then rounded to four significant bits, which packs
well, before the original goes on with them. In tests/golden_import are then decoder.json; checkpoint.pth.xz and
model.pth.xz, the two kinds of files that it writes; and expected.safetensors with the output of each U-Net, of its
average, and of the U-Net one optimizer step later, with numbers of its parameters then.
"""

import json
import lzma
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from make_unclip_golden import tensor
from safetensors.torch import save_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "tests/golden_import"
CONFIG, CHECKPOINT, MODEL, EXPECTED = "decoder.json", "checkpoint.pth.xz", "model.pth.xz", "expected.safetensors"
STEPS = 3
# Numbers that are kept of each parameter after the last step.
KEPT = 48

UNET: dict[str, Any] = {
    "dim": 4,
    "cond_dim": 4,
    "dim_mults": [1],
    "num_resnet_blocks": 1,
    "resnet_groups": 2,
    "attn_heads": 1,
    "attn_dim_head": 4,
    "num_image_tokens": 2,
    "num_time_tokens": 1,
    "max_text_len": 3,
}
# Small, and as far from the defaults as it can be.
SETTINGS: dict[str, Any] = {
    "decoder": {
        "unets": [
            {**UNET, "image_embed_dim": 6, "text_embed_dim": 5, "cond_on_text_encodings": True},
            {**UNET, "memory_efficient": True, "resnet_weight_standardization": True},
        ],
        "image_sizes": [8, 16],
        "timesteps": 100,
        "learned_variance": True,
        "use_noise_for_lowres_cond": True,
    },
    "data": {
        "webdataset_base_url": "shards/{}.tar",
        "img_embeddings_url": "img_emb",
        "text_embeddings_url": "text_emb",
        "batch_size": 3,
        "end_shard": 3,
        "splits": {"train": 1.0, "val": 0.0, "test": 0.0},
    },
    "train": {"epochs": 4, "lr": 1e-3, "wd": 0.02, "warmup_steps": 2, "ema_beta": 0.9, "epoch_samples": 12},
    "evaluate": {},
    "tracker": {"log": {"log_type": "console"}, "save": [{"save_to": "local", "save_latest_to": "latest.pth"}]},
    "seed": 5,
}


def inputs(index: int) -> dict[str, Tensor]:
    """What U-Net `index` is called with, by the names of our own."""
    size = (3, 3, 8, 8) if index == 0 else (3, 3, 16, 16)
    given = {"sample": tensor(f"sample {index}", size, scale=1.7), "timestep": torch.tensor([0, 41, 99])}
    if index == 0:
        text = tensor("text", (3, 2, 5))
        text[1, 1] = 0  # no token there
        return {**given, "image_embed": tensor("image_embed", (3, 6)), "text_encodings": text}
    return {
        **given,
        "lowres_cond": tensor("lowres_cond", size),
        "lowres_noise_level": torch.tensor([0, 200, 999]),
    }


def output_of(unet: Any, index: int) -> Tensor:
    """What an original U-Net makes of its inputs."""
    names = {"sample": "x", "timestep": "time", "lowres_cond": "lowres_cond_img"}
    given = {names.get(key, key): value.clone() for key, value in inputs(index).items()}
    return unet(**{"image_embed": None, **given})  # type: ignore[no-any-return]


def trained(mask: tuple[bool, ...] = (True, True)) -> Any:
    """The original's config and its trainer after a few steps; networks that are masked out are empty."""
    from dalle2_pytorch.train_configs import TrainDecoderConfig  # only where it is installed
    from dalle2_pytorch.trainer import DecoderTrainer

    random.seed(0)
    torch.manual_seed(0)
    config = TrainDecoderConfig(**SETTINGS)
    train = config.train
    decoder = config.decoder.create()
    with torch.no_grad():
        for unet in decoder.unets:
            unet.to_out.weight.normal_()  # drawn as zeros, with which every network agrees
    for index, wanted in enumerate(mask):
        if not wanted:
            decoder.unets[index] = torch.nn.Identity()
    trainer = DecoderTrainer(
        decoder,
        lr=train.lr,
        wd=train.wd,
        warmup_steps=train.warmup_steps,
        ema_beta=train.ema_beta,
        use_ema=train.use_ema,
    )
    trainer.train()
    for step in range(STEPS):
        image, embed, text = (
            tensor(f"{name} {step}", shape) for name, shape in (("i", (3, 3, 16, 16)), ("e", (3, 6)), ("t", (3, 2, 5)))
        )
        told = {"image_embed": embed, "text_encodings": text} if mask[0] else {"image_embed": embed}
        for number in (number for number, wanted in enumerate(mask, 1) if wanted):
            trainer(image.abs(), **told, unet_number=number)
            trainer.update(number)
    return config, trainer


def rounded(value: Any) -> Any:
    """A state dict whose numbers have four significant bits; counters and noise levels stay as they are."""
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel() > 1:
        mantissa, exponent = torch.frexp(value)
        return torch.ldexp((mantissa * 16).round() / 16, exponent)
    if isinstance(value, dict):
        exact = "noise_schedulers."
        return type(value)((k, item if str(k).startswith(exact) else rounded(item)) for k, item in value.items())
    return value


def save(trainer: Any, config: Any, path: Path) -> None:
    """The checkpoint of the original's trainer, with what its script adds."""
    trainer.save(
        path,
        epoch=2,
        sample=3,
        next_task="train",
        validation_losses=[torch.tensor(0.5)],
        samples_seen=27,
        config=config.model_dump(),
    )


def save_model(trainer: Any, config: Any, path: Path) -> None:
    """The smaller file that the original's tracker writes beside it."""
    from dalle2_pytorch import __version__
    from dalle2_pytorch.trackers import Tracker
    from packaging import version

    tracker = Tracker(str(path.parent / "tracker"))
    tracker.save_metadata = {"version": version.parse(__version__), "config": config.model_dump()}
    tracker._save_state_dict(trainer, "model", path)


def step_further(trainer: Any) -> Iterator[tuple[str, Tensor]]:
    """Move each U-Net by a step whose gradient follows from the fixed inputs alone."""
    for index, unet in enumerate(trainer.decoder.unets):
        output_of(unet, index).square().mean().backward()
        trainer.update(index + 1)
        yield f"{index}.after", output_of(unet, index).detach()
        for name, parameter in unet.named_parameters():
            yield f"{index}.parameter.{name}", parameter.detach().flatten()[:KEPT].clone()


def main() -> None:
    """Write the golden files."""
    GOLDEN.mkdir(exist_ok=True)
    config, trainer = trained()
    with TemporaryDirectory() as folder:
        checkpoint, model = Path(folder) / "checkpoint.pth", Path(folder) / "model.pth"
        save(trainer, config, checkpoint)
        trainer.load_state_dict(rounded(torch.load(checkpoint, weights_only=True)))
        save(trainer, config, checkpoint)
        save_model(trainer, config, model)
        for path, name in ((checkpoint, CHECKPOINT), (model, MODEL)):
            (GOLDEN / name).write_bytes(lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
    expected = {}
    trainer.eval()
    with torch.no_grad():
        for index, (unet, ema) in enumerate(zip(trainer.decoder.unets, trainer.ema_unets, strict=True)):
            expected[f"{index}.online"] = output_of(unet, index)
            expected[f"{index}.average"] = output_of(ema.ema_model, index)
    expected |= dict(step_further(trainer))
    save_file(expected, GOLDEN / EXPECTED)
    (GOLDEN / CONFIG).write_text(json.dumps(SETTINGS, indent=1) + "\n")
    sizes = {path.name: path.stat().st_size for path in sorted(GOLDEN.iterdir())}
    print(sizes, sum(sizes.values()))


if __name__ == "__main__":
    sys.exit(main())
