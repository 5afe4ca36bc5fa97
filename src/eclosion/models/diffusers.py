"""Any network of the diffusers library, by the name of its class and its options."""

import inspect
from dataclasses import field
from typing import Any, Literal

from torch import nn

from eclosion.errors import ConfigError, did_you_mean
from eclosion.registry import part

__all__ = ["DiffusersModel"]

# size of UNet2DModel -> its options, its number of parameters beside it
PRESETS: dict[str, dict[str, Any]] = {
    # 2.7 M: minutes on a CPU at 32 px
    "tiny": {
        "block_out_channels": (32, 64, 128),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 16,
    },
    # 15.7 M: hours on a CPU at 64 px, minutes on a GPU
    "small": {
        "block_out_channels": (64, 128, 256),
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
    },
    # 113.7 M: the network of the Hugging Face tutorial for 128 px
    "tutorial": {
        "block_out_channels": (128, 128, 256, 256, 512, 512),
        "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
        "layers_per_block": 2,
    },
}


@part
class DiffusersModel:
    """A network from the diffusers library, such as UNet2DModel or DiTTransformer2DModel."""

    # Class of the network in diffusers.
    class_name: str = "UNet2DModel"
    # Size of a UNet2DModel: "tiny" (2.7 M parameters), "small" (15.7 M) or "tutorial" (113.7 M, for 128 px);
    # none takes the class's own defaults.
    preset: Literal["tiny", "small", "tutorial"] | None = "tiny"
    # Options of the class, which win over the preset.
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, *, size: tuple[int, int], channels: int = 3, num_classes: int = 0) -> nn.Module:
        """The network, with weights drawn from torch's global generator.

        Args:
            size: height and width of the images, in pixels.
            channels: channels of the images, in and out.
            num_classes: class embeddings to hold, "no class" included; 0 for a network without classes.

        Raises:
            ConfigError: if the class or an option is unknown, or the options do not fit together.
        """
        cls = self._class()
        options = self._options(cls, size, channels, num_classes)
        try:
            return cls(**options)  # type: ignore[no-any-return]
        except (ValueError, TypeError, NotImplementedError, IndexError) as error:
            raise ConfigError(f"task.model: {self.class_name} refuses its options: {error}") from error

    def _class(self) -> Any:
        import diffusers  # its model classes load torch and more: not at start-up

        cls = getattr(diffusers, self.class_name, None)
        if not (inspect.isclass(cls) and issubclass(cls, diffusers.ModelMixin)):
            models = [n for n in dir(diffusers) if n.endswith(("Model", "UNet")) or "Transformer" in n]
            hint = did_you_mean(self.class_name, models, limit=0)
            raise ConfigError(f"task.model.class_name: diffusers has no model {self.class_name!r}.{hint}")
        return cls

    def _options(self, cls: Any, size: tuple[int, int], channels: int, num_classes: int) -> dict[str, Any]:
        known = list(inspect.signature(cls.__init__).parameters)[1:]
        unknown = sorted(set(self.options) - set(known))
        if unknown:
            owner = f"is not an option of {self.class_name}."
            raise ConfigError(
                [f"task.model.options.{key} {owner}{did_you_mean(key, known, limit=40)}" for key in unknown]
            )
        preset = PRESETS[self.preset] if self.preset and self.class_name == "UNet2DModel" else {}
        from_data: dict[str, Any] = {
            "sample_size": size[0] if size[0] == size[1] else size,
            "in_channels": channels,
            "out_channels": channels,
        }
        if num_classes:
            # UNet2DModel's word, and the transformers'
            key = "num_class_embeds" if "num_class_embeds" in known else "num_embeds_ada_norm"
            if key not in known:
                raise ConfigError(
                    f"task.model: {self.class_name} has no class embeddings. Set task.class_conditional=false."
                )
            from_data[key] = num_classes
        for key in ("sample_size", "in_channels"):
            if key in self.options and self.options[key] != from_data[key]:
                raise ConfigError(
                    f"task.model.options.{key} is {self.options[key]}, and the data has {from_data[key]}. Leave it out."
                )
        return {k: v for k, v in {**preset, **from_data}.items() if k in known} | self.options
