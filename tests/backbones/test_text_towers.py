"""Text towers with a tokenizer of Hugging Face, and those of transformers: against open_clip's own features.

Those of transformers are tested where the package is installed, as `make env` does.
"""

import importlib.util
import json
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reclip_d2.backbones import text_files
from reclip_d2.backbones.build import build_clip
from reclip_d2.backbones.dense import DenseCLIP
from reclip_d2.backbones.hugging_face_text import HuggingFaceTextEncoder, text_encoder
from reclip_d2.backbones.reference import ReferencePrompt
from reclip_d2.backbones.text import TextEncoder
from reclip_d2.backbones.tokens import text_tokens
from reclip_d2.errors import ReclipError
from tests.helpers import EMBED_DIM, TINY_VISION, tiny_clip
from tests.timm_models import architecture_file

WORDS = ["<pad>", "</s>", "<s>", "<unk>", *"a photo of sky brick wall the water tall tree".split()]
NAMES = ["sky", "brick wall", "a tall tree"]
CONTEXT = 12


class WordTokenizer:
    """As open_clip's ``HFTokenizer``, whose tokenizer splits at spaces."""

    strip_sep_token = False
    tokenizer_mode = ""
    context_length = CONTEXT

    def __init__(self, start: bool = False, padding: int = 1, side: str = "right") -> None:
        def encode(text: str, add_special_tokens: bool = True) -> types.SimpleNamespace:
            ids = [WORDS.index(word) for word in text.split()]
            return types.SimpleNamespace(input_ids=[2] * start + [*ids, 1] if add_special_tokens else ids)

        encode.get_vocab = lambda: {word: k for k, word in enumerate(WORDS)}
        encode.pad_token_id, encode.padding_side, encode.sep_token_id = padding, side, 1
        self.tokenizer = encode
        self.clean_fn = str.lower

    def __call__(self, texts: list[str]) -> torch.Tensor:
        rows = [self.tokenizer(self.clean_fn(text)).input_ids for text in texts]
        return torch.tensor([row + [self.tokenizer.pad_token_id] * (CONTEXT - len(row)) for row in rows])


def check_reference(encoder: TextEncoder, clip: nn.Module, words: str = "a photo of a", **tolerance: float) -> None:
    """With the embeddings of words as prompt vectors, the Reference's features are open_clip's of the texts; and
    batches of texts have the features of single ones."""
    prompt = ReferencePrompt(encoder, NAMES, prompt_length=len(words.split()))
    tokens = torch.tensor(encoder.name_tokens(words))
    prompt.vectors.data = encoder.token_embeddings(tokens).detach().clone()
    texts = [f"{words} {name}" for name in NAMES]
    expected = torch.cat([clip.encode_text(encoder.tokenizer([text])) for text in texts])
    got = prompt(encoder)
    torch.testing.assert_close(got, expected, **tolerance)
    (gradient,) = torch.autograd.grad(got.square().sum(), prompt.vectors)
    assert (gradient.abs().sum(1) > 0).all()
    features = encoder.text_features(texts, batch_size=2)
    torch.testing.assert_close(features, F.normalize(expected.float(), dim=-1).detach(), rtol=0, atol=1e-6)


# ---- open_clip's transformer ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"no_causal_mask": True, "pool_type": "last", "proj_bias": True},  # SigLIP
        {"no_causal_mask": True, "pool_type": "last", "proj_type": "none", "width": EMBED_DIM},  # SigLIP i18n
        {"pool_type": "eos", "eos_id": 1},  # causal: "worldwide"
    ],
    ids=["siglip", "without projection", "causal"],
)
def test_towers_with_other_tokenizers(options, start):
    text = {"vocab_size": len(WORDS), "context_length": CONTEXT, **options}
    clip = tiny_clip(custom_text=True, text=text).double()
    encoder = text_encoder(clip, WordTokenizer(start=start))
    assert type(encoder) is TextEncoder and encoder.context_length == CONTEXT and encoder.end_token == 1
    assert encoder.tokens.start == ((2,) if start else ()) and encoder.tokens.padding == 1
    assert encoder.name_tokens("Brick wall") == [WORDS.index("brick"), WORDS.index("wall")]
    check_reference(encoder, clip, rtol=0, atol=1e-11)


def test_separator_as_padding():
    """CLIPA: the end of a text is replaced by 0."""
    tokenizer = WordTokenizer(start=True, padding=0)
    tokenizer.strip_sep_token = True
    assert text_tokens(tokenizer).end == 0


def test_tokenizers_that_are_refused():
    with pytest.raises(ReclipError, match="pad texts on the right"):
        text_tokens(WordTokenizer(side="left"))
    tokenizer = WordTokenizer()
    tokenizer.tokenizer_mode = "clips"
    with pytest.raises(ReclipError, match="does not end a text with one token"):
        text_tokens(tokenizer)


def test_an_end_to_end_model_with_attention_pooling_and_its_text_tower(tmp_path):
    """SigLIP: image and text towers as one backbone."""
    text = {"vocab_size": len(WORDS), "context_length": CONTEXT, "no_causal_mask": True, "pool_type": "last"}
    clip, _ = build_clip(architecture_file("small_siglip", tmp_path, **text), "random")
    backbone = DenseCLIP(clip, WordTokenizer(), name="siglip")
    query = backbone.text_features(NAMES)
    dense = backbone.dense(torch.randn(1, 3, 42, 56))
    assert torch.einsum("bdhw,cd->bchw", dense, query).abs().max() <= 1 + 1e-5
    prompt = ReferencePrompt(backbone, NAMES, prompt_length=4)
    assert prompt(backbone).shape == query.shape
    same, other = (DenseCLIP(clip, WordTokenizer(start=start), name="siglip") for start in (False, True))
    assert same.fingerprint == backbone.fingerprint != other.fingerprint  # the tokenizer is part of the identity


# ---- files -----------------------------------------------------------------------------------------------------------


def hugging_face_architecture(folder: Path) -> str:
    path = folder / "multilingual.json"
    text = {"hf_model_name": "owner/tower", "hf_tokenizer_name": "owner/tokens", "context_length": CONTEXT,
            "hf_pooler_type": "mean_pooler", "hf_proj_type": "linear"}  # fmt: skip
    path.write_text(json.dumps({"embed_dim": EMBED_DIM, "vision_cfg": TINY_VISION, "text_cfg": text}))
    return str(path)


def test_without_transformers(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ReclipError, match=r"needs the package transformers: pip install 'reclip_d2\[text\]'"):
        build_clip(hugging_face_architecture(tmp_path), "random")


def test_missing_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(text_files.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(text_files, "is_reachable", lambda address: False)
    name = hugging_face_architecture(tmp_path)
    with pytest.raises(ReclipError, match=r"tokenizer of multilingual-.* Face repository owner/tokens .*TEXT_FILES"):
        build_clip(name, "random")
    with pytest.raises(ReclipError, match=r"TEXT_FILES .* has no tokenizer of .* must contain tokenizer\.json or "):
        build_clip(name, "random", str(tmp_path))


# ---- transformers ----------------------------------------------------------------------------------------------------

needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="transformers is not installed"
)


def write_text_files(folder: Path, kind: str) -> None:
    """config.json of a small tower, and a tokenizer that splits at spaces."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    common = {"vocab_size": len(WORDS), "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    configs = {
        "xlm-roberta": lambda: transformers.XLMRobertaConfig(**common, **sizes, max_position_embeddings=32),
        "mt5": lambda: transformers.MT5Config(**common, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2),
        "m2m_100": lambda: transformers.M2M100Config(
            **common, d_model=16, encoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=24, decoder_layers=1,
            decoder_attention_heads=2, decoder_ffn_dim=24, max_position_embeddings=32,
        ),
    }  # fmt: skip
    configs[kind]().save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "$A </s>" if kind == "mt5" else "<s> $A </s>"
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 2), ("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(folder)


@needs_transformers
@pytest.mark.parametrize("kind", ["xlm-roberta", "mt5", "m2m_100"])
def test_towers_of_transformers(kind, tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    write_text_files(folder, kind)
    clip, tokenizer = build_clip(hugging_face_architecture(tmp_path), "random", str(folder))
    with torch.no_grad():
        for parameter in clip.text.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    backbone = DenseCLIP(clip.double(), tokenizer, name=kind)
    encoder = backbone.text_encoder
    assert isinstance(encoder, HuggingFaceTextEncoder)
    assert (encoder.text_width, encoder.embed_dim, encoder.context_length) == (16, EMBED_DIM, CONTEXT)
    assert encoder.tokens.start == (() if kind == "mt5" else (2,)) and encoder.end_token == 1
    check_reference(encoder, clip, rtol=0, atol=1e-6)
    assert backbone.dense(torch.randn(1, 3, 16, 16, dtype=torch.float64)).shape == (1, EMBED_DIM, 2, 2)


@needs_transformers
def test_files_of_another_tower(tmp_path):
    folder = tmp_path / "files"
    folder.mkdir()
    write_text_files(folder, "xlm-roberta")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 3}))
    clip, tokenizer = build_clip(hugging_face_architecture(tmp_path), "random", str(folder))
    with pytest.raises(ReclipError, match=r"pads with id 0, the text tower expects 3.* MODEL\.CLIP\.TEXT_FILES"):
        text_encoder(clip, tokenizer)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ReclipError, match="tokenizer of multilingual-.* cannot be read from"):
        build_clip(hugging_face_architecture(tmp_path), "random", str(folder))
