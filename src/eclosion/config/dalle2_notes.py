"""What the user of a DALLE2-pytorch decoder config should know of its translation, one line each."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from eclosion.config.dalle2_data import arrival, clip_side
from eclosion.config.dalle2_per_unet import encodes, followed, follows, per_unet, schedules
from eclosion.config.dalle2_schema import DecoderFile, Evaluate
from eclosion.config.dalle2_unused import unused

__all__ = ["notes_of"]

# Files of weights by the names that they are published and looked for under.
INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
BACKBONES = {
    "alex": "alexnet-owt-7be5be79.pth",
    "vgg": "vgg16-397923af.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


def notes_of(file: DecoderFile, written: Mapping[str, Any], *, world_size: int) -> list[str]:
    """The notes, in the order of the file.

    Args:
        file: a config in which nothing is wrong.
        written: path -> value of every key that is given and not null, such as "decoder.unets[0].dim".
        world_size: processes that share the work.
    """
    return [
        *_readme(file, written),
        *_decoder(file, written),
        *_embeddings(file),
        *_data(file, world_size),
        *_training(file),
        *_tracker(file),
        *_evaluation(file),
        *_dead(file, written),
    ]


def _readme(file: DecoderFile, written: Mapping[str, Any]) -> Iterator[str]:
    """Defaults that the README and the code tell differently, where they are used."""
    several = len(file.decoder.unets) > 1 and file.decoder.beta_schedule is not None
    used = {
        "decoder.beta_schedule": "is cosine for every U-Net (linear for the last)" if several else "",
        "train.ema_beta": "is 0.99 (0.999)" if file.train.use_ema else "",
        "tracker.data_path": "is ./.tracker-data (.tracker_data)",
    }
    said = [f"{key} {text}" for key, text in used.items() if text and key not in written]
    if said:
        yield f"Defaults are those of the README, in brackets those of the original's code: {', '.join(said)}."


def _decoder(file: DecoderFile, written: Mapping[str, Any]) -> Iterator[str]:
    decoder = file.decoder
    if written.get("decoder.learned_variance") and decoder.learned_variance is True and len(decoder.unets) > 1:
        yield (
            "decoder.learned_variance true is for the first U-Net alone, as in the original. Give a list for others: "
            f"[{', '.join(['true'] * len(decoder.unets))}]."
        )
    for key, kind in (("image_cond_drop_prob", "image"), ("text_cond_drop_prob", "text")):
        if getattr(decoder, key) == 1 and any(kind in followed(decoder, i) for i in range(len(decoder.unets))):
            yield f"decoder.{key} is 1: in training no U-Net is ever told the {kind}, so images will not follow it."
    if "jsd" in per_unet(decoder.beta_schedule, 1):
        yield "decoder.beta_schedule jsd ends in noise alone, which gave NaN in the original; here it works."
    for name in sorted({"linear", "quadratic"} & set(schedules(decoder)) if decoder.timesteps == 20 else ()):
        yield f"decoder.timesteps 20 makes {name} end in noise alone, which gave NaN in the original; here it works."
    works = "had no effect in the original, and has one here"
    for key in ("clip_denoised", "clip_x_start"):
        if not getattr(decoder, key):
            yield f"decoder.{key} {works}: estimates are not kept in [-1, 1] in sampling."
    if still := [i for i, unet in enumerate(decoder.unets) if not unet.attend_at_middle]:
        yield f"{_unets(still, 'attend_at_middle')} {works}: the bottleneck has no self-attention."
    if any(scale != 1 for scale in per_unet(file.train.cond_scale, 1)) and not decoder.unconditional:
        yield f"train.cond_scale {works}: grids are sampled with it, and what metrics look at."


def _unets(which: list[int], key: str) -> str:
    return " and ".join(f"decoder.unets[{i}].{key}" for i in which)


def _embeddings(file: DecoderFile) -> Iterator[str]:
    data, clip = file.data, file.decoder.clip
    if follows(file, "image") and not clip and not data.img_embeddings_url:
        yield (
            "data.img_embeddings_url and decoder.clip are not given, so image embeddings are read from the shards "
            "(.img_emb.npy or .npy)."
        )
    if follows(file, "text") and not data.text_embeddings_url:
        yield (
            "data.text_embeddings_url is not given, so text encodings are read from the shards (.text_emb.npy)"
            + ("; where they hold none, decoder.clip makes them of the captions (.txt)." if clip else ".")
        )


def _data(file: DecoderFile, world_size: int) -> Iterator[str]:
    if world_size > 1:
        yield (
            f"data.batch_size counts the images of one process: {file.data.batch_size} on each of {world_size} makes "
            f"train.batch_size={file.data.batch_size * world_size}."
        )
    found = arrival(file)
    if found.added:
        yield (
            "data.preprocessing leaves images of different sizes, so they are scaled and cropped to "
            f"{found.size[1]}x{found.size[0]} pixels (data.image_size); each U-Net gets its own from them."
        )
    if found.size[0] != found.size[1]:
        yield (
            f"data.preprocessing makes images of {found.size[1]}x{found.size[0]} pixels, and U-Nets make square ones: "
            "their sides are scaled to the same length, as in the original, so that what is in them looks stretched. "
            f'Make them square there, such as by "CenterCrop": {{"size": {min(found.size)}}}.'
        )
    if file.decoder.clip and encodes(file) and min(found.size) < (side := clip_side(file.decoder.clip)):
        yield (
            f"data.preprocessing makes images of {min(found.size)} pixels, which are enlarged to {side} for "
            "decoder.clip."
        )


def _training(file: DecoderFile) -> Iterator[str]:
    train = file.train
    if train.epoch_samples is not None and not file.data.resample_train:
        yield (
            "train.epochs x train.epoch_samples is the length of the run, "
            f"{train.epochs * train.epoch_samples} samples. Passes over the data "
            "go on where they stood after epoch_samples, so that none is left out; the original began anew."
        )
    if train.epoch_samples is None or train.save_every_n_samples < train.epoch_samples:
        yield (
            f"train.save_every_n_samples {train.save_every_n_samples} counts the samples of the whole run; where an "
            "epoch has fewer, checkpoints and grids are made once an epoch. The original counted anew in each epoch, "
            "and made them at its end as well."
        )
    if train.use_ema:
        yield (
            f"train.ema_beta {train.ema_beta:g} is applied at every step; in the original at every tenth, which is "
            f"{train.ema_beta**0.1:.4g} here."
        )
    if (index := re.fullmatch(r"cuda:(\d+)", train.device or "")) and int(index[1]) > 0:
        yield f"train.device {train.device} is taken as cuda. Which one it is says CUDA_VISIBLE_DEVICES={index[1]}."
    if file.data.splits.val == 0:
        yield "data.splits.val is 0, so there is no validation, and no best checkpoint."


def _tracker(file: DecoderFile) -> Iterator[str]:
    tracker, load = file.tracker, file.tracker.load
    if load and load.load_from and not load.only_auto_resume:
        yield (
            "tracker.load is for a run that has no checkpoint of its own; one that is started again goes on from its "
            "newest."
        )
    if any(save.save_latest_to or save.save_best_to for save in tracker.save):
        yield "tracker.save writes folders, whatever their names, for `eclosion sample`, `export` and tracker.load."
    if file.data.splits.val > 0 and any(save.save_best_to for save in tracker.save):
        yield (
            "A checkpoint is the best when its validation loss is below that of the best before by more than the "
            "uncertainty of their difference; in the original by any amount."
        )
    if any(save.save_to == "huggingface" for save in tracker.save):
        yield (
            "tracker.save keeps repositories at huggingface for their owner alone, and refuses one that others see. "
            "For such a one give the override track.save[0].private=false."
        )


def _evaluation(file: DecoderFile) -> Iterator[str]:
    evaluate, part = file.evaluate, "val" if file.data.splits.val > 0 else "train"
    if compared := [f"evaluate.{name}" for name in ("FID", "KID") if name in evaluate.metrics]:
        yield (
            f"{' and '.join(compared)} {'compares' if len(compared) == 1 else 'compare'} with all images of the {part} "
            "part, over all processes; the original with as many as were made, on each process by itself."
        )
    if evaluate.LPIPS and part == "train" and not compared:
        yield "evaluate.LPIPS compares with images of the train part: data.splits.val is 0."
    if evaluate.IS:
        yield "evaluate.IS is of the images that are made; in the original it was of the real ones."
    if evaluate.IS and evaluate.IS.feature != "logits_unbiased":
        yield (
            f"evaluate.IS.feature {evaluate.IS.feature} takes features for what a classifier says, as the original "
            "does, and that is no inception score. The default is logits_unbiased."
        )
    yield from _weights(evaluate)


def _weights(evaluate: Evaluate) -> Iterator[str]:
    """Where weights of the networks come from that no path is given for, and which metrics can be given one."""
    fetched = {
        f"evaluate.{name}": INCEPTION
        for name in ("FID", "IS", "KID")
        if (options := getattr(evaluate, name)) and not getattr(options, "feature_extractor_weights_path", None)
    }
    if evaluate.LPIPS:
        fetched["evaluate.LPIPS"] = BACKBONES[evaluate.LPIPS.net_type]
    if fetched:
        named = [f"{metric}.feature_extractor_weights_path" for metric in fetched if metric.endswith("ID")]
        other = f", give the path of Inception's as {' and '.join(named)}" if named else ""
        files = " and ".join(dict.fromkeys(fetched.values()))
        yield (
            f"{_listed(list(fetched))} computed with weights from torch's hub cache, ~/.cache/torch/hub/checkpoints "
            f"unless TORCH_HOME says otherwise, and fetched if need be: {files}. "
            f"Without a network put them there{other}, or set the metric to null."
        )


def _dead(file: DecoderFile, written: Mapping[str, Any]) -> Iterator[str]:
    """Keys that are given and have no effect, together with others for the same reason."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in unused(file, written):
        paths = by_reason.setdefault(reason, [])
        paths += [path] if path not in paths else []
    for reason, paths in by_reason.items():
        yield f"{_listed(paths)} accepted, and {_has(paths)} no effect: {reason}."


def _listed(paths: list[str]) -> str:
    said = " and ".join([", ".join(paths[:-1]), paths[-1]] if len(paths) > 1 else paths)
    return f"{said} {'is' if len(paths) == 1 else 'are'}"


def _has(paths: list[str]) -> str:
    return "has" if len(paths) == 1 else "have"
