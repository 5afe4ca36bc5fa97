"""Keys of a DALLE2-pytorch decoder config that have no effect, and why.

Said of keys that are given, unless their value says what happens anyway.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from eclosion.config.dalle2_per_unet import blurs, followed, follows, for_upsamplers, per_unet
from eclosion.config.dalle2_schema import Decoder, DecoderFile

__all__ = ["unused"]

CASCADE = "the place in the cascade decides"
GRADIENTS = "each U-Net exchanges its gradients by itself"
GOES_ON = "a run that is not finished always goes on"
KEPT = "it had none; tracker.save says what is kept"
REFERENCE = "what is known of real images is kept on disk, and is what it would be anew"
GATHERED = "features of all processes are gathered in the order of the images, and scored once"
NONE = object()
METRICS = ("FID", "IS", "KID", "LPIPS")
# How torchmetrics keeps its sums and adds them over processes, and its defaults.
STATES = {"compute_on_cpu": False, "dist_sync_on_step": False, "sync_on_compute": True, "compute_with_cache": True}
# Key -> why it has no effect, and the value that says what happens anyway.
DEAD: dict[str, tuple[str, Any]] = {
    "decoder.unets[].out_dim": ("it had none", NONE),
    "decoder.unets[].channels": ("decoder.channels decides", 3),
    "decoder.unets[].channels_out": ("decoder.learned_variance decides", NONE),
    "decoder.unets[].lowres_cond": (CASCADE, NONE),
    "decoder.unets[].lowres_noise_cond": ("decoder.use_noise_for_lowres_cond decides", NONE),
    "decoder.predict_x_start_for_latent_diffusion": ("a config cannot name an autoencoder", False),
    "decoder.auto_normalize_img": ("images are always in [-1, 1] inside", True),
    "decoder.clip_adapter_overrides": ("the encoder follows from decoder.clip alone", {}),
    "decoder.clip.base_model_kwargs": ("x-clip and coca alone had a use for it", NONE),
    "train.find_unused_parameters": (GRADIENTS, NONE),
    "train.static_graph": (GRADIENTS, NONE),
    "train.save_immediately": ("a grid is always made before the first step", False),
    "train.save_all": (KEPT, NONE),
    "train.save_latest": (KEPT, NONE),
    "train.save_best": (KEPT, NONE),
    "evaluate.FID.input_img_size": ("the network sees 299 x 299 pixels, whatever it is given", [3, 299, 299]),
    **{f"evaluate.{name}.normalize": ("scores are of the pixels of a PNG", False) for name in METRICS},
    **{f"evaluate.{name}.reset_real_features": (REFERENCE, True) for name in ("FID", "KID")},
    **{f"evaluate.{name}.{key}": (GATHERED, value) for name in METRICS for key, value in STATES.items()},
    "tracker.save[].save_all": ("it had none", NONE),
    "tracker.save[].save_latest": ("it had none", NONE),
    "tracker.save[].save_best": ("it had none", NONE),
}
# What belongs to one kind of logger, loader or saver: key -> the option that says the kind, and the kind.
KINDS: dict[str, tuple[str, str]] = {
    "wandb_entity": ("log_type", "wandb"),
    "wandb_project": ("log_type", "wandb"),
    "wandb_run_name": ("log_type", "wandb"),
    "wandb_run_id": ("log_type", "wandb"),
    "file_path": ("load_from", "local"),
    "url": ("load_from", "url"),
    "wandb_file_path": ("load_from", "wandb"),
    "wandb_run_path": ("", "wandb"),
    "huggingface_repo": ("", "huggingface"),
    "huggingface_file_path": ("load_from", "huggingface"),
    "token_path": ("", "huggingface"),
}


def unused(file: DecoderFile, written: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Path and reason of each key without effect.

    Args:
        file: a config in which nothing is wrong.
        written: path -> value of every key that is given and not null, such as "decoder.unets[0].dim".
    """
    for path, value in written.items():
        key = re.sub(r"\[\d+\]", "[]", path)
        for dead, (reason, harmless) in DEAD.items():
            if (key == dead and _plain(value) != harmless) or key.startswith(f"{dead}."):
                yield path, reason
    for path, reason in [*_without_use(file), *_of_other_kinds(file)]:
        if any(given == path or given.startswith(f"{path}.") or path.startswith(f"{given}[") for given in written):
            yield path, reason


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _without_use(file: DecoderFile) -> Iterator[tuple[str, str]]:
    """Keys for which the rest of this config has no use."""
    decoder, data, train = file.decoder, file.data, file.train
    count = len(decoder.unets)
    if decoder.image_sizes is not None:
        yield "decoder.image_size", "decoder.image_sizes decides"
    yield from _unets_without_use(decoder)
    if not follows(file, "image"):
        for path in ("decoder.clip", "data.img_embeddings_url", "decoder.image_cond_drop_prob"):
            yield path, "decoder.unconditional is true"
        yield "train.cond_scale", "decoder.unconditional is true"
    if not follows(file, "text"):
        yield "data.text_embeddings_url", "no U-Net is told text"
        yield "decoder.text_cond_drop_prob", "no U-Net is told text"
    if not any(per_unet(decoder.learned_variance, 1)):
        for key in ("learned_variance_constrain_frac", "vb_loss_weight"):
            yield f"decoder.{key}", "decoder.learned_variance is false"
    if all(per_unet(decoder.predict_v, 1)):
        yield "decoder.predict_x_start", "decoder.predict_v goes before it"
    if not decoder.use_dynamic_thres:
        yield "decoder.dynamic_thres_percentile", "decoder.use_dynamic_thres is false"
    if not any(gamma > 0 for gamma in per_unet(decoder.p2_loss_weight_gamma, 1)):
        yield "decoder.p2_loss_weight_k", "decoder.p2_loss_weight_gamma is 0"
    if not any(steps is not None and steps < decoder.timesteps for steps in per_unet(decoder.sample_timesteps, 1)):
        yield "decoder.ddim_sampling_eta", "no sample_timesteps is below timesteps, so that none is sampled with DDIM"
    yield from _lowres_without_use(decoder, count)
    if any(scale != 1 for scale in per_unet(train.cond_scale, 1)):
        for i in range(1, count):
            if not followed(decoder, i) and isinstance(train.cond_scale, list) and train.cond_scale[i] != 1:
                yield f"train.cond_scale[{i}]", f"decoder.unets[{i}] follows nothing"
    if not train.use_ema:
        yield "train.ema_beta", "train.use_ema is false"
    if data.splits.val == 0:
        yield "train.validation_samples", "data.splits.val is 0"
    if not file.evaluate.metrics:
        yield "evaluate.n_evaluation_samples", "no metric is switched on"


def _unets_without_use(decoder: Decoder) -> Iterator[tuple[str, str]]:
    for i, unet in enumerate(decoder.unets):
        here, kinds = f"decoder.unets[{i}]", followed(decoder, i)
        if "image" not in kinds:
            why = "the first U-Net alone is told the embedding" if i else "decoder.unconditional is true"
            yield f"{here}.image_embed_dim", why
        if unet.cond_on_image_embeds != ("image" in kinds):
            yield f"{here}.cond_on_image_embeds", f"{CASCADE}: the first U-Net alone is told the embedding"
        if "text" not in kinds:
            yield f"{here}.text_embed_dim", "that U-Net is not told text"
            if unet.cond_on_text_encodings:
                yield f"{here}.cond_on_text_encodings", "decoder.unconditional is true"
        other = "init_conv_kernel_size" if unet.init_cross_embed else "init_cross_embed_kernel_sizes"
        yield f"{here}.{other}", f"init_cross_embed is {str(unet.init_cross_embed).lower()}"
        if not unet.cross_embed_downsample:
            yield f"{here}.cross_embed_downsample_kernel_sizes", "cross_embed_downsample is false"


def _lowres_without_use(decoder: Decoder, count: int) -> Iterator[tuple[str, str]]:
    noise, blur = for_upsamplers(decoder.use_noise_for_lowres_cond, count), blurs(decoder)
    if count == 1:
        yield from (
            (f"decoder.{key}", "there is one U-Net, and it sees no smaller image")
            for key in ("use_noise_for_lowres_cond", "use_blur_for_lowres_cond", "lowres_downsample_first")
        )
    if not any(blur):
        for key in ("blur_prob", "blur_sigma", "blur_kernel_size"):
            yield f"decoder.{key}", "no smaller image is blurred"
    if not any(noise):
        yield "decoder.lowres_noise_sample_level", "no smaller image is noised"


def _of_other_kinds(file: DecoderFile) -> Iterator[tuple[str, str]]:
    """Keys of a logger, loader or saver of another kind."""
    tracker = file.tracker
    sections: dict[str, tuple[str, Any]] = {"tracker.load": ("load_from", tracker.load)}
    sections |= {f"tracker.log[{i}]": ("log_type", log) for i, log in enumerate(tracker.log)}
    sections |= {f"tracker.save[{i}]": ("save_to", save) for i, save in enumerate(tracker.save)}
    for path, (option, section) in sections.items():
        kind = getattr(section, option, None)
        for key, (of, wanted) in KINDS.items():
            if of in ("", option) and section is not None and hasattr(section, key) and kind != wanted:
                yield f"{path}.{key}", f"{option} is {kind or 'null'}"
    for i, log in enumerate(tracker.log):
        if log.log_type == "wandb" and not log.resume:
            yield f"tracker.log[{i}].wandb_run_id", "resume is false"
        if log.log_type != "wandb":
            if log.resume:
                yield f"tracker.log[{i}].resume", GOES_ON
            if not log.auto_resume:
                yield f"tracker.log[{i}].auto_resume", GOES_ON
