"""The peer of S3: DALLE2-pytorch's own trainer, in its own interpreter, for one step whenever it is asked.

    python dalle2_peer.py CONFIG DATA UNET_NUMBER FOLDER

Needs `pip install dalle2-pytorch`, and nothing of eclosion. CONFIG is a JSON file as its training script takes it; DATA
a file of torch.save with "image", float32 [B, 3, H, W] in [0, 1], and "image_embed", float32 [B, E]. Builds decoder and
trainer as that script does, from the config alone. Then writes into FOLDER

    checkpoint.pth      what its trainer saves, with the config, as the script saves it;
    agreement.pt        what its network makes of fixed inputs, for a comparison,

and says on one line of its output, as JSON, what it is. Each line of its input is a number of steps, which it makes; it
answers with the mean of their seconds. It ends with its input.

A step is what the script does with a batch and one U-Net: loss and gradients through the trainer, which reads the loss
to the host; then its update, which clips, steps, follows the schedule and the warm-up, and moves the average, one time
in ten. Left out, in the peer's favour: what the script gathers, counts and logs beside it.
"""

import contextlib
import json
import random
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from accelerate import Accelerator
from dalle2_pytorch.train_configs import TrainDecoderConfig
from dalle2_pytorch.trainer import DecoderTrainer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# So that the last convolution, which begins as zeros, says something in a comparison.
OUTPUT_STD = 0.05


def main(config: str, data: str, unet_number: str, folder: str) -> None:
    """Build everything, say what it is, and make steps until the input ends."""
    out = sys.stdout  # for answers alone: libraries may print
    with contextlib.redirect_stdout(sys.stderr):
        torch.set_num_threads(1)
        settings = json.loads(Path(config).read_text(encoding="utf-8"))
        batch = torch.load(data)
        number = int(unet_number)
        trainer = build(settings)
        unet = trainer.decoder.unets[number - 1]
        with torch.no_grad():
            unet.to_out.weight.normal_(std=OUTPUT_STD)
        trainer.save(str(Path(folder) / "checkpoint.pth"), config=settings)
        with FlopCounterMode(display=False) as counter:
            found = agreement(trainer.decoder, unet, number, batch)
        if number == 1:
            found["loss"] = first_loss(trainer.decoder, batch, found)
        torch.save(found, Path(folder) / "agreement.pt")
        answer(out, facts(unet) | {"gflop_per_step": counter.get_total_flops() / 1e9})
        for line in sys.stdin:
            answer(out, steps(trainer, batch, number, int(line)))


def build(settings: dict[str, Any]) -> DecoderTrainer:
    """The trainer that the script makes of its config."""
    torch.manual_seed(settings.get("seed", 0))
    random.seed(0)
    config = TrainDecoderConfig(**settings)
    trainer = DecoderTrainer(decoder=config.decoder.create(), accelerator=Accelerator(cpu=True), **config.train.dict())
    trainer.train()
    return trainer


def steps(trainer: DecoderTrainer, batch: dict[str, Tensor], number: int, count: int) -> dict[str, float]:
    """Seconds of the processor, in all threads, and on the wall for one step, on average; and the last loss."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        trainer.train()
        loss = trainer(batch["image"], image_embed=batch["image_embed"], unet_number=number)
        trainer.update(unet_number=number)
    seconds = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    return {name: value / count for name, value in seconds.items()} | {"loss": loss}


def facts(unet: nn.Module) -> dict[str, Any]:
    """What this side is."""
    return {
        "version": version("dalle2-pytorch"),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "accelerate": version("accelerate"),
        "parameters": sum(p.numel() for p in unet.parameters()),
        "threads": torch.get_num_threads(),
    }


def agreement(decoder: Any, unet: Any, number: int, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs of the network and its output, nothing hidden; with one backward pass, whose gradients are dropped."""
    image, image_embed = batch["image"], batch["image_embed"]
    size = decoder.image_sizes[number - 1]
    found = {"t": torch.randint(0, 1000, (len(image),)), "noise": torch.randn(len(image), 3, size, size)}
    told = {"image_embed": image_embed}
    if unet.lowres_cond:
        found["lowres"] = told["lowres_cond_img"] = torch.randn(len(image), 3, size, size)
        found["level"] = told["lowres_noise_level"] = torch.randint(0, 1000, (len(image),))
    hidden = {"image_cond_drop_prob": 0.0, "text_cond_drop_prob": 0.0}
    output = unet(found["noise"], found["t"], **told, **hidden)
    output.sum().backward()
    unet.zero_grad()
    return found | {"output": output.detach()}


@torch.no_grad()
def first_loss(decoder: Any, batch: dict[str, Tensor], found: dict[str, Tensor]) -> Tensor:
    """The loss of the first network with given noise, nothing hidden."""
    before, decoder.image_cond_drop_prob = decoder.image_cond_drop_prob, 0.0
    loss: Tensor = decoder.p_losses(
        decoder.unets[0],
        batch["image"],
        found["t"],
        image_embed=batch["image_embed"],
        noise_scheduler=decoder.noise_schedulers[0],
        learned_variance=decoder.learned_variance[0],
        noise=found["noise"],
    )
    decoder.image_cond_drop_prob = before
    return loss


def answer(out: TextIO, what: dict[str, Any]) -> None:
    """One line of JSON."""
    out.write(json.dumps(what) + "\n")
    out.flush()


if __name__ == "__main__":
    # In a thread, as the other side: the main thread's memory is managed otherwise.
    worker = threading.Thread(target=main, args=sys.argv[1:])
    worker.start()
    worker.join()
