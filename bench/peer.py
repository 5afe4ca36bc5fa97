"""The training loop of Hugging Face's `train_unconditional.py`, rebuilt from what it does.

Source: https://github.com/huggingface/diffusers/tree/main/examples/unconditional_image_generation, its options at
their defaults but for `--use_ema`. In each step it

    takes a batch from a DataLoader over PIL pictures, which torchvision's transforms turn into tensors;
    draws noise and timesteps from torch's global generator, and mixes noise and images with DDPMScheduler;
    runs the network, under autocast if asked, and takes the mean squared error to the noise;
    backpropagates, clips the norm of the gradients at 1, makes a step of AdamW (as torch builds it by default, not
    fused), a step of the learning rate (cosine, 500 steps of warm-up), and drops the gradients;
    moves diffusers' EMAModel (decay 0.9999 with warm-up, power 3/4), also as built by default;
    reads the loss to the host and shows it, the learning rate and the EMA's decay beside a tqdm bar.

Left out, in the peer's favour: what `accelerate` adds around each of these calls, and the tracker that the script
writes the same numbers to in every step.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from tqdm.auto import tqdm

from bench.turns import Gate
from bench.work import ENDLESS, Network, Pictures
from eclosion.device import autocast, pick_precision

__all__ = ["Batch", "loader", "peer_steps", "peer_work", "preprocess", "train"]

CPU = torch.device("cpu")
# "input": float32 [B, 3, H, W] in [-1, 1]
Batch = dict[str, Tensor]


def preprocess(image_size: int) -> Callable[[Any], Tensor]:
    """From a PIL picture to float32 [3, H, W] in [-1, 1]."""
    return transforms.Compose(
        [
            transforms.Resize(image_size, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(image_size),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )


class _Transformed(Dataset[dict[str, Tensor]]):
    """Pictures in memory or in files, decoded and transformed whenever one is asked for."""

    def __init__(self, images: Sequence[Image.Image | Path], image_size: int) -> None:
        self._images, self._preprocess = images, preprocess(image_size)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image = self._images[index]
        if isinstance(image, Path):
            image = Image.open(image)
        return {"input": self._preprocess(image.convert("RGB"))}


def loader(images: Sequence[Image.Image | Path], image_size: int, batch_size: int) -> DataLoader[dict[str, Tensor]]:
    """Batches in a new order each epoch, made in this thread: the script has no workers by default."""
    return DataLoader(_Transformed(images, image_size), batch_size=batch_size, shuffle=True, num_workers=0)


def train(
    net: nn.Module,
    batches: Iterable[Batch],
    *,
    precision: str,
    on_step: Callable[[], None] = lambda: None,
    num_epochs: int = ENDLESS,
) -> None:
    """Train over and over the same data.

    Args:
        net: a UNet2DModel.
        batches: gone through once per epoch.
        precision: "no" or "bf16".
        on_step: called before each batch is taken.
        num_epochs: how often to go through the data.
    """
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    lr_schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=ENDLESS)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    ema = EMAModel(
        net.parameters(),
        decay=0.9999,
        use_ema_warmup=True,
        inv_gamma=1.0,
        power=0.75,
        model_cls=UNet2DModel,
        model_config=net.config,
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    step = 0
    for epoch in range(num_epochs):
        net.train()
        bar = tqdm(total=None, desc=f"Epoch {epoch}", file=io.StringIO())
        source = iter(batches)
        while True:
            on_step()
            batch = next(source, None)
            if batch is None:
                break
            clean = batch["input"].to(dtype)
            noise = torch.randn(clean.shape, dtype=dtype, device=clean.device)
            t = torch.randint(0, noise_scheduler.config.num_train_timesteps, (clean.shape[0],), device=clean.device)
            noisy = noise_scheduler.add_noise(clean, noise, t)

            with autocast(CPU, pick_precision(precision, CPU)):
                predicted = net(noisy, t).sample
            loss = nn.functional.mse_loss(predicted.float(), noise.float())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            lr_schedule.step()
            optimizer.zero_grad()
            ema.step(net.parameters())

            step += 1
            bar.update(1)
            shown = {"loss": loss.detach().item(), "lr": lr_schedule.get_last_lr()[0], "step": step}
            bar.set_postfix(**shown, ema_decay=ema.cur_decay_value)
        bar.close()


def peer_steps(gate: Gate, network: Network, pictures: Pictures, precision: str) -> None:
    """The peer's loop over pictures in memory, for ever."""
    batches = loader(pictures.images, network.image_size, network.batch_size)
    train(network.build(), _Endless(batches), precision=precision, on_step=gate)


class _Endless:
    """Batches of one epoch after the other, as one: so that a step never ends in an empty batch."""

    def __init__(self, batches: Iterable[Batch]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        while True:
            yield from self._batches


def peer_work(precision: str, *, pictures: str = "decoded in memory") -> dict[str, Any]:
    """What the peer does in each step; `pictures` says where its pictures come from."""
    return {
        "dtype": {"no": "fp32"}.get(precision, precision),
        "optimizer": "AdamW, torch's default",
        "clip": 1.0,
        "ema": "every step, diffusers.EMAModel",
        "lr_schedule": "cosine, 500 steps of warm-up",
        "draws": "torch's global generator",
        "loader": f"DataLoader, 0 workers, pictures {pictures}",
        "log": "tqdm bar every step",
    }
