"""What a decoder config of DALLE2-pytorch calls options of ours, for problems that are found after it was read."""

from collections.abc import Mapping

from eclosion.config.dalle2_schema import DecoderFile
from eclosion.config.dalle2_unet import RENAMED

__all__ = ["keys_of"]

KEYS = {
    "output folder": "tracker.data_path",
    "overwrite": "tracker.overwrite_data_path",
    **{
        f"data.source.{key}": f"data.{key}"
        for key in (
            "webdataset_base_url",
            "img_embeddings_url",
            "text_embeddings_url",
            "start_shard",
            "end_shard",
            "shard_width",
            "index_width",
            "splits",
        )
    },
    "data.image_size": "what data.preprocessing makes",
    "data.shuffle": "data.shuffle_train",
    "data.resample": "data.resample_train",
    "data.num_threads": "data.num_workers",
    "train.batch_size": "data.batch_size",
    "train.duration": "train.epochs",
    "train.freeze": "train.unet_training_mask",
    "train.mixed_precision": "train.amp",
    "task.encoder": "decoder.clip",
    "task.unconditional": "decoder.unconditional",
    "task.image_dropout": "decoder.image_cond_drop_prob",
    "task.text_dropout": "decoder.text_cond_drop_prob",
    "task.image_embed_dim": "decoder.unets[0].image_embed_dim",
    "task.text_embed_dim": "decoder.unets[0].text_embed_dim",
    "model.text_conditioned": "cond_on_text_encodings of a U-Net",
    "sample.num_images": "train.n_sample_images",
    "sample.guidance_scale": "train.cond_scale",
    "validate.num_samples": "train.validation_samples",
    "evaluate.num_samples": "evaluate.n_evaluation_samples",
}


def keys_of(file: DecoderFile) -> Mapping[str, str]:
    """Option, as problems name it -> what the file calls it, where that is something else."""
    found = dict(KEYS)
    if file.train.device:
        found["train.device"] = f'"{file.train.device}", and auto is null'
    for i in range(len(file.decoder.unets)):
        found[f"task.unets[{i}].image_size"] = f"decoder.image_sizes[{i}]"
        found[f"task.unets[{i}].crop_size"] = f"decoder.random_crop_sizes[{i}]"
        found[f"task.unets[{i}].lowres.blur_kernel_size"] = "decoder.blur_kernel_size"
        found |= {f"task.unets[{i}].model.{new}": f"decoder.unets[{i}].{old}" for old, new in RENAMED.items() if new}
    return found
