"""What is wrong with a decoder config of DALLE2-pytorch as a whole, when each value is of the right type already."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eclosion.config.dalle2_cascade import problems_of_cascade
from eclosion.config.dalle2_per_unet import followed, per_unet, text_dims
from eclosion.config.dalle2_schema import Decoder, DecoderFile
from eclosion.config.dalle2_tracker import wrong_tracker

__all__ = ["problems_of"]

# What the original takes at most.
MAX_LR = 0.01


def problems_of(file: DecoderFile, unets: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per problem, each with its path.

    Args:
        file: the config.
        unets: the options of each U-Net that the config gives.
    """
    return [
        *problems_of_cascade(file, unets),
        *_wrong_decoder(file.decoder),
        *_wrong_sources(file),
        *_wrong_training(file),
        *_wrong_evaluation(file),
        *wrong_tracker(file.tracker),
    ]


def _wrong_decoder(decoder: Decoder) -> Iterator[str]:
    if decoder.channels != 3:
        yield f"decoder.channels is {decoder.channels}, and images have 3: they are read as RGB."
    if len(dims := text_dims(decoder)) > 1:
        yield f"decoder.unets: text_embed_dim is {' and '.join(map(str, dims))}, and all U-Nets are told the same text."
    if decoder.clip and decoder.clip.make in ("x-clip", "coca"):
        yield (
            f"decoder.clip.make is {decoder.clip.make!r}, which stands for a network without weights. Use openai or "
            "open_clip, or data.img_embeddings_url."
        )


def _wrong_sources(file: DecoderFile) -> Iterator[str]:
    """Embeddings that nothing asks for, or that come from two places."""
    data, clip, text = file.data, file.decoder.clip, any(u.cond_on_text_encodings for u in file.decoder.unets)
    if clip and data.img_embeddings_url and not text:
        yield "decoder.clip and data.img_embeddings_url are both given, and both bring image embeddings. Remove one."
    if clip and text and data.img_embeddings_url and data.text_embeddings_url:
        yield (
            "decoder.clip is given, and data.img_embeddings_url and data.text_embeddings_url bring all embeddings. "
            "Remove decoder.clip."
        )
    if data.text_embeddings_url and not text:
        yield (
            "data.text_embeddings_url is given, and no U-Net is told text. Set cond_on_text_encodings in "
            "decoder.unets[0], or remove it."
        )
    shares = {"train": data.splits.train, "val": data.splits.val, "test": data.splits.test}
    if abs(sum(shares.values()) - 1) > 1e-6:
        said = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        yield f"data.splits: {said} sum to {sum(shares.values()):g}. They must sum to 1."
    if data.splits.train == 0:
        yield "data.splits.train is 0, so that there is nothing to train on."
    if data.end_shard < data.start_shard:
        yield f"data.end_shard is {data.end_shard}, and data.start_shard is {data.start_shard}: no shard is left."
    if data.resample_train and data.shuffle_train:
        yield (
            "data.resample_train draws shards at random, and data.shuffle_train visits each once. Set shuffle_train or "
            "resample_train to false."
        )
    if data.resample_train and file.train.epoch_samples is None:
        yield "data.resample_train has no end of its own. Set train.epoch_samples, the samples in an epoch."


def _wrong_training(file: DecoderFile) -> Iterator[str]:
    train, decoder = file.train, file.decoder
    several = isinstance(train.lr, list)
    for i, lr in enumerate(per_unet(train.lr, 1)):
        if lr > MAX_LR:
            path = f"train.lr[{i}]" if several else "train.lr"
            yield f"{path} is {lr:g}, and must be at most {MAX_LR:g}, as in the original. The default is 1e-4."
    if train.unet_training_mask is not None and not any(train.unet_training_mask):
        yield "train.unet_training_mask is false for every U-Net, so that nothing would be trained."
    for i, scale in enumerate(per_unet(train.cond_scale, len(decoder.unets))):
        if scale != 1 and (kinds := followed(decoder, i)) and not any(_dropped(decoder, kind) for kind in kinds):
            keys = " and ".join(f"decoder.{kind}_cond_drop_prob" for kind in kinds)
            yield (
                f"train.cond_scale is {scale:g} for decoder.unets[{i}], and {keys} is 0, so that it never learns to do "
                "without. Set that to 0.1, or cond_scale to 1."
            )
    if train.device is not None and not re.fullmatch(r"cpu|mps|cuda(:\d+)?", train.device):
        yield f"train.device is {train.device!r}, and must be cpu, mps, cuda or cuda:0."


def _dropped(decoder: Decoder, kind: str) -> bool:
    return bool(getattr(decoder, f"{kind}_cond_drop_prob") > 0)


def _wrong_evaluation(file: DecoderFile) -> Iterator[str]:
    evaluate, count = file.evaluate, file.evaluate.n_evaluation_samples
    kid, score, lpips = evaluate.KID, evaluate.IS, evaluate.LPIPS
    if evaluate.metrics and count < 2:
        yield "evaluate.n_evaluation_samples is 1, and a metric needs at least two images."
    if kid and kid.subset_size > count:
        yield (
            f"evaluate.KID.subset_size is {kid.subset_size}, and evaluate.n_evaluation_samples is {count}: a subset "
            "cannot have more images than there are."
        )
    if score and 2 * score.splits > count:
        yield (
            f"evaluate.IS.splits is {score.splits}, and evaluate.n_evaluation_samples is {count}: each split needs at "
            "least two images."
        )
    if lpips and lpips.reduction not in ("mean", "sum"):
        yield (
            f"evaluate.LPIPS.reduction is {repr(lpips.reduction) if lpips.reduction else 'null'}, which gives a number "
            "for each image, and a score is one number. Use mean or sum."
        )
    if lpips and file.decoder.unconditional:
        yield (
            "evaluate.LPIPS compares images with those that they are made from, and decoder.unconditional is true, so "
            "that they are made from nothing. Remove one of them."
        )
