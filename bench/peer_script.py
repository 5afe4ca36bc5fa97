"""The peer as a process of its own: what `train_unconditional.py` imports and builds before its first step.

    python peer_script.py FOLDER OPTIONS BATCH_SIZE SIGN

Takes a folder of images, a UNet2DModel's options as JSON, and a file to write when the first step is done. Imports
what that script imports (accelerate left out, in its favour), finds the images with the datasets library as it does,
then trains.
"""

import json
import sys
from pathlib import Path

import datasets
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from torchvision import transforms
from tqdm.auto import tqdm


def main(folder: str, options: str, batch_size: str, sign: str) -> None:
    """Train for one step, and say so by writing a file."""
    torch.set_num_threads(1)
    net = UNet2DModel(in_channels=3, out_channels=3, **json.loads(options))
    size = net.config.sample_size
    ema = EMAModel(net.parameters(), use_ema_warmup=True, power=0.75, model_cls=UNet2DModel, model_config=net.config)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)

    images = datasets.load_dataset("imagefolder", data_dir=folder, split="train")
    preprocess = transforms.Compose(
        [
            transforms.Resize(size, interpolation=transforms.InterpolationMode.BILINEAR),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    images.set_transform(lambda rows: {"input": [preprocess(image.convert("RGB")) for image in rows["image"]]})
    loader = DataLoader(images, batch_size=int(batch_size), shuffle=True)
    lr_schedule = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=1000 * len(loader))

    net.train()
    bar = tqdm(total=len(loader))
    for batch in loader:
        clean = batch["input"]
        noise = torch.randn(clean.shape)
        t = torch.randint(0, noise_scheduler.config.num_train_timesteps, (clean.shape[0],))
        predicted = net(noise_scheduler.add_noise(clean, noise, t), t).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        lr_schedule.step()
        optimizer.zero_grad()
        ema.step(net.parameters())
        bar.update(1)
        bar.set_postfix(loss=loss.detach().item())
        Path(sign).write_text("done", encoding="utf-8")
    DDPMPipeline(unet=net, scheduler=noise_scheduler)  # what the script does with them after an epoch


main(*sys.argv[1:])
