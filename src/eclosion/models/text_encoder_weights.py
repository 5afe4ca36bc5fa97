"""The text halves of other libraries' CLIPs: where their weights are, and how they make tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from eclosion.errors import ConfigError, EnvironmentProblem, did_you_mean
from eclosion.models.encoder_weights import open_clip_weights
from eclosion.models.libraries import Network, Place, explained, library, quietly, silent_options
from eclosion.models.text_encoder import TextEncoder

__all__ = ["text_of_open_clip", "text_of_transformers"]

# Files of transformers that hold a vocabulary; one is enough.
VOCABULARIES = ("tokenizer.json", "vocab.json")
# Options of a text half of open_clip's that make it something else than CLIP's: its tokens are made by another library,
# see what comes after them, or are not summed up at the end.
UNLIKE_CLIP = ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs", "no_causal_mask", "embed_cls")


class _ProjectedText(Network):
    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        out = self.net(input_ids=tokens)
        return out.last_hidden_state, out.text_embeds


class _OpenCLIPText(Network):
    """A text half of open_clip's, which gives its states to none but those who listen to its last norm."""

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        heard: list[Tensor] = []
        norm = next(module for name, module in self.net.named_modules() if name.rpartition(".")[2] == "ln_final")
        listener = norm.register_forward_hook(lambda _module, _given, states: heard.append(states))
        try:
            embed: Tensor = self.net.encode_text(tokens)  # type: ignore[operator]
        finally:
            listener.remove()
        return heard[0], embed


def text_of_transformers(model: str) -> TextEncoder:
    """The text half of a CLIP that transformers reads.

    Args:
        model: a folder, or a repository of the hub.

    Raises:
        As `ClipEncoder.build_text`.
    """
    transformers = library("transformers", "clip", "clip")
    place = Place("clip", model)
    with place.reading("config.json"):
        config = transformers.AutoConfig.from_pretrained(place.path, trust_remote_code=False)
    if config.model_type not in ("clip", "clip_text_model"):
        what = "the image half of a CLIP alone" if config.model_type == "clip_vision_model" else config.model_type
        raise ConfigError(f"encoder clip: {model!r} is {what}, and captions need the text half of a CLIP.")
    text = getattr(config, "text_config", config)
    text.projection_dim = config.projection_dim  # of a whole CLIP, what stands in its half need not be true
    net = place.weights(transformers.CLIPTextModelWithProjection, config=text)
    tokenizer = _tokenizer_of_transformers(transformers, place, model)
    end = tokenizer.eos_token_id
    if end is None or max(tokenizer.get_vocab().values()) >= text.vocab_size:
        raise ConfigError(
            f"encoder clip: the vocabulary of {model!r} is not its network's: it has {len(tokenizer)} tokens, and the "
            f"network knows {text.vocab_size}. Save the CLIP's own tokenizer beside it."
        )

    def tokens_of(caption: str) -> Sequence[int]:
        # not cut here, so that it can be counted, and no word about it each time
        found: list[int] = tokenizer(caption, truncation=False, padding=False, verbose=False).input_ids
        return found

    return TextEncoder(
        _ProjectedText(net, **silent_options(text), eos_token_id=text.eos_token_id),
        tokens_of,
        end=end,
        dim=text.hidden_size,
        embed_dim=text.projection_dim,
        num_tokens=text.max_position_embeddings,
        vocabulary=tokenizer.backend_tokenizer.to_str(),
    )


def _tokenizer_of_transformers(transformers: Any, place: Place, model: str) -> Any:
    folder = Path(place.path)
    if folder.is_dir() and not any((folder / name).is_file() for name in VOCABULARIES):
        raise EnvironmentProblem(
            f"encoder clip: {model} has no {' or '.join(VOCABULARIES)}, so captions cannot be made into tokens. Save "
            "the tokenizer (CLIPTokenizer) beside the network."
        )
    with place.reading(VOCABULARIES[0]):
        return transformers.CLIPTokenizer.from_pretrained(place.path, trust_remote_code=False)


def text_of_open_clip(model: str, pretrained: str | None) -> TextEncoder:
    """The text half of a CLIP that open_clip reads.

    Args:
        model: an architecture of open_clip.
        pretrained: tag or file of its weights; none takes the last tag.

    Raises:
        As `ClipEncoder.build_text`.
    """
    open_clip = library("open_clip", "clip", "clip")
    if model not in open_clip.list_models():
        hint = did_you_mean(model, open_clip.list_models())
        raise ConfigError(f"encoder clip: open_clip has no architecture {model!r}.{hint}")
    text = open_clip.get_model_config(model)["text_cfg"]
    if unlike := [name for name in UNLIKE_CLIP if text.get(name)] + ["pool_type"] * (text.get("pool_type") == "last"):
        raise ConfigError(
            f"encoder clip: the text half of {model} is none of CLIP's ({unlike[0]} {text[unlike[0]]}), and its "
            "encodings are not known here. Use another model for captions."
        )
    file, facts = open_clip_weights(open_clip, model, pretrained)
    quick_gelu = bool(facts.get("quick_gelu", False))
    with quietly(), explained("clip", file):
        whole = open_clip.create_model(model, pretrained=str(file), force_quick_gelu=quick_gelu)
        tokenizer = open_clip.get_tokenizer(model)
    del whole.visual
    start, end = tokenizer.sot_token_id, tokenizer.eot_token_id
    if text.get("vocab_size", tokenizer.vocab_size) < tokenizer.vocab_size:
        raise ConfigError(
            f"encoder clip: {model} knows {text['vocab_size']} tokens, and open_clip makes {tokenizer.vocab_size} of "
            "captions. Use another model."
        )
    norm = next(module for name, module in whole.named_modules() if name.rpartition(".")[2] == "ln_final")
    return TextEncoder(
        _OpenCLIPText(whole, architecture=model, quick_gelu=quick_gelu),
        lambda caption: [start, *tokenizer.encode(caption), end],
        end=end,
        dim=norm.weight.shape[0],
        embed_dim=open_clip.get_model_config(model)["embed_dim"],
        num_tokens=tokenizer.context_length,
        vocabulary="open_clip SimpleTokenizer",
    )
