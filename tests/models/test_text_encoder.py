"""The text half of CLIP: the same encodings as the libraries have it, in the convention of DALLE2-pytorch."""

import json

import pytest
import torch
from torch.nn import functional as F

from eclosion.errors import ConfigError, EnvironmentProblem
from eclosion.models.text_encoder import CHUNK
from eclosion.registry import build

OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 32, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
CAPTIONS = ["a red cat", "", "cat, cat.", "!a", "A  CAT\n?!?", "abcdefghijklmnop", "dog"]


def clip_of(folder, **options):
    return build("encoders", {"name": "clip", "model": str(folder), **options}).build_text()


@pytest.fixture(scope="module")
def open_clip(tmp_path_factory):
    """open_clip with two tiny architectures, and the file of the weights of each."""
    library = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    files = {}
    for name, options in (("text-32", {}), ("textcustom-32", {"custom_text": True})):
        (folder / f"{name}.json").write_text(json.dumps(OPEN_CLIP | options))
        library.add_model_config(folder / f"{name}.json")
        with torch.random.fork_rng():
            torch.manual_seed(2)
            torch.save(library.create_model(name).state_dict(), folder / f"{name}.pt")
        files[name] = folder / f"{name}.pt"
    return library, files


def open_clip_of(files, name):
    options = {"name": "clip", "make": "open_clip", "model": name, "pretrained": str(files[name])}
    return build("encoders", options).build_text()


def hidden_by_the_original(tokens, end):
    """Which tokens DALLE2-pytorch sets to zero, as its section 3.11 tells: after the first end, and number 0."""
    return torch.tensor([[end in row[:i] or row[i] == 0 for i in range(len(row))] for row in tokens.tolist()])


# what comes out


def test_tokens_are_the_states_after_the_last_norm_and_zero_after_the_end(tiny_clip):
    import transformers

    encoder = clip_of(tiny_clip)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tiny_clip)
    model = transformers.CLIPModel.from_pretrained(tiny_clip).eval()
    given = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=12, return_tensors="pt")
    with torch.no_grad():
        theirs = model.text_model(**given)  # with a mask over what is padding, which must make no difference
        pooled = F.normalize(model.text_projection(theirs.pooler_output))
    hidden = hidden_by_the_original(given.input_ids, tokenizer.eos_token_id)
    assert hidden.sum(1).tolist() == [5, 10, 6, 8, 6, 0, 7]
    wanted = theirs.last_hidden_state.masked_fill(hidden[..., None], 0)
    assert (encoder.num_tokens, encoder.dim, encoder.embed_dim) == (12, 16, 24)
    torch.testing.assert_close(encoder.tokens(CAPTIONS), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encoder.pooled(CAPTIONS), pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["text-32", "textcustom-32"])
def test_open_clip_gives_what_its_own_library_gives(open_clip, name):
    library, files = open_clip
    encoder = open_clip_of(files, name)
    captions = [*CAPTIONS, "dog " * 100, "fish &amp; chips"]
    tokens = library.tokenize(captions)
    model = library.create_model(name, pretrained=str(files[name])).eval()
    states = []
    half = model.text if name == "textcustom-32" else model
    half.ln_final.register_forward_hook(lambda _module, _given, out: states.append(out))
    with torch.no_grad():
        pooled = model.encode_text(tokens, normalize=True)
    hidden = hidden_by_the_original(tokens, 49407)
    assert (encoder.num_tokens, encoder.dim, encoder.embed_dim) == (77, 8, 24)
    torch.testing.assert_close(
        encoder.tokens(captions), states[0].masked_fill(hidden[..., None], 0), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(encoder.pooled(captions), pooled, rtol=1e-4, atol=1e-5)
    assert not hidden[-2].any()  # as long as can be


def test_a_token_of_number_0_is_zeros_as_in_the_original(tiny_clip, open_clip):
    _, files = open_clip
    for encoder, caption, place in ((clip_of(tiny_clip), "a !?", 2), (open_clip_of(files, "text-32"), "a !€", 2)):
        assert encoder._row(caption)[place] == 0
        assert (encoder.tokens([caption])[0].abs().sum(1) == 0).nonzero()[0] == place


def test_a_caption_is_the_same_bits_whatever_comes_with_it(tiny_clip, open_clip):
    captions = [f"{a} {b}" for a in ("cat", "a dog", "") for b in ("x", "yy z", "abc", "q", "wet", "")]
    assert len(captions) > 2 * CHUNK["cpu"]
    for encoder in (clip_of(tiny_clip), open_clip_of(open_clip[1], "text-32")):
        for made in (encoder.tokens, encoder.pooled):
            wanted = made(captions)
            assert torch.equal(torch.cat([made([caption]) for caption in captions]), wanted)
            assert torch.equal(made(captions[::-1]), wanted.flip(0))
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(made(captions), wanted)
            assert (wanted.dtype, wanted.requires_grad) == (torch.float32, False)
    assert encoder.tokens([]).shape == (0, 77, 8)
    assert encoder.pooled([]).shape == (0, 24)


def test_the_end_of_a_long_caption_is_cut_off_and_counted(tiny_clip):
    encoder = clip_of(tiny_clip)
    long = "abcdefghijklmnopqrstuvwxyz"
    assert torch.equal(encoder.tokens([long]), encoder.tokens([long[:10] + "zzzz"]))
    assert encoder.num_cut == 2
    assert not torch.equal(encoder.tokens([long]), encoder.tokens([long[:9]]))
    assert encoder.num_cut == 3
    assert encoder._row(long)[-1] == encoder._row("a")[-1]  # it ends as others do


def test_a_fingerprint_is_of_the_weights_and_of_the_vocabulary(tiny_clip, tmp_path):
    import transformers

    assert clip_of(tiny_clip).fingerprint == clip_of(tiny_clip, make="transformers", cache_gb=0).fingerprint
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_clip / name).read_bytes())
    vocabulary = transformers.CLIPTokenizer.from_pretrained(tiny_clip).get_vocab()
    transformers.CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(tmp_path)
    assert clip_of(tmp_path).fingerprint != clip_of(tiny_clip).fingerprint


def test_building_one_moves_no_random_numbers(tiny_clip, open_clip):
    before = torch.get_rng_state()
    clip_of(tiny_clip)
    open_clip_of(open_clip[1], "text-32")
    assert torch.equal(torch.get_rng_state(), before)


# what is refused


def refusal(kind, **options):
    with pytest.raises(kind) as caught:
        build("encoders", {"name": "clip", **options}).build_text()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_clip_without_a_vocabulary_or_with_anothers_is_refused(tiny_clip, tmp_path):
    import transformers

    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny_clip / name).read_bytes())
    said = refusal(EnvironmentProblem, model=str(tmp_path))
    assert "has no tokenizer.json or vocab.json, so captions cannot be made into tokens" in said
    more = {token: i for i, token in enumerate(["<|startoftext|>", "<|endoftext|>", *map(str, range(80))])}
    transformers.CLIPTokenizer(vocab=more, merges=[]).save_pretrained(tmp_path)
    assert "it has 82 tokens, and the network knows 64" in refusal(ConfigError, model=str(tmp_path))


def test_an_image_half_alone_is_refused(tiny_clip, tmp_path):
    config = json.loads((tiny_clip / "config.json").read_text())["vision_config"]
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "clip_vision_model"}))
    said = refusal(ConfigError, model=str(tmp_path))
    assert "is the image half of a CLIP alone, and captions need the text half" in said


def test_text_halves_that_are_no_clips_and_names_that_are_none_are_refused(open_clip):
    said = refusal(ConfigError, make="open_clip", model="roberta-ViT-B-32", pretrained="laion2b_s12b_b32k")
    assert "the text half of roberta-ViT-B-32 is none of CLIP's (hf_model_name roberta-base)" in said
    assert "Did you mean 'ViT-B-32'" in refusal(ConfigError, make="open_clip", model="ViT-B-323")
    assert "neither a model of OpenAI's nor a folder" in refusal(ConfigError, model="ViT-B")
    assert "pretrained is 'x', and is for make=open_clip" in refusal(ConfigError, model="ViT-B/32", pretrained="x")
