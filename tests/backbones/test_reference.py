"""The Reference prompt: the packed encoding against one sequence per class.

Shape letters: C classes, L prompt vectors, T tokens, E width of the text transformer, D joint embedding.
"""

import logging

import pytest
import torch
from torch import Tensor

from reclip_d2.backbones import separate_texts
from reclip_d2.backbones.packed_texts import packed_attention_mask
from reclip_d2.backbones.reference import ReferencePrompt, cut_name, normalize_reference
from reclip_d2.backbones.text import TextEncoder
from reclip_d2.errors import ReclipError
from tests.helpers import EMBED_DIM, tiny_clip, tiny_tokenizer

NAMES = ["sky", "a very tall old tree", "water", "brick wall", "potted plant"]
INFINITY = float("inf")


def build(names, prompt_length, *, context_length=77, init_std=0.3, custom_text=False):
    """A float64 CLIP, its text encoder and a prompt."""
    clip = tiny_clip(context_length=context_length, custom_text=custom_text).double()
    encoder = TextEncoder(clip, tiny_tokenizer(context_length))
    prompt = ReferencePrompt(encoder, names, prompt_length=prompt_length, init_std=init_std).double()
    return clip, encoder, prompt


def one_sequence_a_class(clip, vectors: Tensor, names: list[str]) -> Tensor:
    """Eq. (1) literally: [SOS] v_1 .. v_L name EOS, padded to the context, through CLIP's own causal transformer."""
    tower = getattr(clip, "text", clip)
    tokenizer, embed = tiny_tokenizer(), tower.token_embedding.weight
    context = tower.positional_embedding.shape[0]
    rows = []
    for name in names:
        tokens = [*tokenizer.encode(name), tokenizer.eot_token_id]
        sequence = torch.cat([embed[[tokenizer.sot_token_id]], vectors, embed[tokens]])
        end = len(sequence) - 1
        padding = embed[[0] * (context - len(sequence))]
        hidden = torch.cat([sequence, padding]) + tower.positional_embedding
        hidden = tower.transformer(hidden[None], attn_mask=tower.attn_mask)[0]
        rows.append(tower.ln_final(hidden)[end] @ tower.text_projection)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("names", "length"),
    [(NAMES, 4), (NAMES, 73), (["sky"], 5), (["a very tall old tree"], 1), (NAMES, 0), (NAMES[:2], 70)],
)
def test_output_and_gradient_equal_one_sequence_a_class(names, length):
    clip, encoder, prompt = build(names, length)
    weights = torch.randn(len(names), EMBED_DIM, dtype=torch.float64)
    got = prompt(encoder)
    assert got.shape == (len(names), EMBED_DIM)
    vectors = prompt.vectors.detach().clone().requires_grad_()
    expected = one_sequence_a_class(clip, vectors, names)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    (got * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(prompt.vectors.grad, vectors.grad, rtol=1e-10, atol=1e-10)
    assert length == 0 or prompt.vectors.grad.abs().max() > 1e-6


def test_a_text_tower_of_its_own():
    clip, encoder, prompt = build(NAMES, 6, custom_text=True)
    torch.testing.assert_close(
        prompt(encoder), one_sequence_a_class(clip, prompt.vectors, NAMES), rtol=1e-10, atol=1e-10
    )


def test_vectors_that_are_word_embeddings_give_the_sentence():
    """With v = the embeddings of "a photo of a", the Reference text is a text that encode_text knows."""
    clip, encoder, prompt = build(NAMES, 4)
    words = tiny_tokenizer().encode("a photo of a")
    assert len(words) == 4
    prompt.vectors.data.copy_(clip.token_embedding.weight[words])
    expected = clip.encode_text(tiny_tokenizer()([f"a photo of a {name}" for name in NAMES]))
    torch.testing.assert_close(prompt(encoder), expected, rtol=1e-10, atol=1e-10)


def test_a_class_does_not_depend_on_the_others():
    _, encoder, prompt = build(NAMES, 4)
    _, _, alone = build(NAMES[3:4], 4)
    alone.vectors.data.copy_(prompt.vectors)
    torch.testing.assert_close(prompt(encoder)[3:4], alone(encoder), rtol=1e-10, atol=1e-10)


def test_only_the_vectors_are_kept_and_train():
    _, _, prompt = build(NAMES, 4)
    assert set(prompt.state_dict()) == {"vectors"}
    assert [name for name, _ in prompt.named_parameters()] == ["vectors"]
    assert prompt.vectors.requires_grad and prompt.vectors.shape == (4, 32)


def test_initial_values():
    _, _, prompt = build(["sky"], 73, init_std=0.02)
    assert prompt.vectors.shape == (73, 32)
    assert prompt.vectors.std().item() == pytest.approx(0.02, rel=0.1)
    assert abs(prompt.vectors.mean().item()) < 0.002


# ---- length ---------------------------------------------------------------------------------------------------


def test_long_name_shortens_the_prompt_and_says_so(caplog):
    encoder = TextEncoder(tiny_clip(), tiny_tokenizer())
    name = "a very tall old tree"  # 5 tokens: 77 - 2 - 5 = 70
    with caplog.at_level(logging.INFO, logger="reclip_d2.backbones.reference"):
        prompt = ReferencePrompt(encoder, ["sky", name], prompt_length=73)
    assert len(encoder.name_tokens(name)) == 5
    assert prompt.vectors.shape[0] == 70
    assert "L = 70 instead of 73" in caplog.text and "5 tokens" in caplog.text


def test_nothing_is_said_when_the_names_fit(caplog):
    encoder = TextEncoder(tiny_clip(), tiny_tokenizer())
    with caplog.at_level(logging.INFO, logger="reclip_d2.backbones.reference"):
        prompt = ReferencePrompt(encoder, ["sky", "brick wall"], prompt_length=73)
    assert prompt.vectors.shape[0] == 73
    assert caplog.text == ""


def test_longest_name_that_fits_and_one_token_more():
    _, encoder, prompt = build(["sky", "tree " * 14], 4, context_length=16)
    assert prompt.vectors.shape[0] == 0
    assert torch.isfinite(prompt(encoder)).all()
    with pytest.raises(ReclipError, match="has 15 tokens, more than the 14"):
        ReferencePrompt(encoder, ["sky", "tree " * 15], prompt_length=4)


@pytest.mark.parametrize("name", ["", "   "])
def test_a_name_without_tokens(name):
    encoder = TextEncoder(tiny_clip(), tiny_tokenizer())
    with pytest.raises(ReclipError, match="has no tokens"):
        ReferencePrompt(encoder, ["sky", name])


@pytest.mark.parametrize("pool", ["argmax", "eos", "first", "last"])
def test_a_text_transformer_that_is_not_causal(pool, monkeypatch):
    """With the embeddings of words as prompt vectors, open_clip's own feature of the text; in batches of two."""
    monkeypatch.setattr(separate_texts, "BATCH", 2)
    text = {"no_causal_mask": True, "pool_type": pool, "eos_id": 49407}
    clip = tiny_clip(custom_text=True, text=text).double()
    encoder = TextEncoder(clip, tiny_tokenizer())
    assert not encoder.is_causal
    prompt = ReferencePrompt(encoder, NAMES, prompt_length=4).double()
    words = torch.tensor(tiny_tokenizer().encode("a photo of a"))
    prompt.vectors.data = encoder.token_embeddings(words).detach().clone()
    got = prompt(encoder)
    expected = clip.encode_text(tiny_tokenizer()([f"a photo of a {name}" for name in NAMES]))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    got.square().sum().backward()
    assert (prompt.vectors.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("options", [{}, {"no_causal_mask": True}, {"correct_cls_mask": True}], ids=str)
def test_a_text_tower_with_a_class_token(options, monkeypatch):
    """CoCa's: as above."""
    monkeypatch.setattr(separate_texts, "BATCH", 2)
    clip = tiny_clip(custom_text=True, text={"embed_cls": True, "no_causal_mask": "no_causal_mask" in options})
    clip.text.correct_cls_mask = "correct_cls_mask" in options
    encoder = TextEncoder(clip.double(), tiny_tokenizer())
    assert encoder.context_length == 77
    prompt = ReferencePrompt(encoder, NAMES, prompt_length=4).double()
    words = torch.tensor(tiny_tokenizer().encode("a photo of a"))
    prompt.vectors.data = encoder.token_embeddings(words).detach().clone()
    expected = clip.encode_text(tiny_tokenizer()([f"a photo of a {name}" for name in NAMES]))
    torch.testing.assert_close(prompt(encoder), expected)


# ---- mask and norm --------------------------------------------------------------------------------------------


def test_attention_mask_by_hand():
    """Prefix of 2 tokens; a name of 2 tokens with its end, a name of 1."""
    x, o = -INFINITY, 0.0
    expected = torch.tensor(
        [
            [o, x, x, x, x],
            [o, o, x, x, x],
            [o, o, o, x, x],
            [o, o, o, o, x],
            [o, o, x, x, o],
        ]
    )
    assert torch.equal(packed_attention_mask(torch.tensor([-1, -1, 0, 0, 1])), expected)


def test_attention_mask_of_one_name_is_causal():
    expected = torch.full((5, 5), -INFINITY).triu(1)
    assert torch.equal(packed_attention_mask(torch.tensor([-1, -1, -1, 0, 0])), expected)


def test_the_mask_is_made_once_unless_the_sequence_is_long(monkeypatch):
    _, _, prompt = build(["sky", "tall tree", "water"], 4)
    mask = prompt.layout.attention_mask()
    assert torch.equal(mask, packed_attention_mask(prompt.layout.owners).to(mask))
    assert mask.data_ptr() == prompt.layout.attention_mask().data_ptr()
    assert mask.stride(0) % 8 == 0 and "layout.mask" not in prompt.state_dict()
    monkeypatch.setattr("reclip_d2.backbones.packed_texts.LONGEST_MASKED", 3)
    _, _, other = build(["sky", "tall tree", "water"], 4)
    assert other.layout.mask is None and torch.equal(other.layout.attention_mask(), mask.float())


def test_norm_of_the_reference_features():
    features = torch.tensor([[3.0, 4.0], [0.0, 12.0]], dtype=torch.float64)
    rows = torch.tensor([[0.6, 0.8], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(normalize_reference(features, "row"), rows)
    torch.testing.assert_close(normalize_reference(features, "matrix"), features / 13.0)  # 9 + 16 + 144 = 169


# ---- names cut as the public code of ReCLIP++ does ------------------------------------------------------------


def literal_cut(clip, vectors: Tensor, names: list[str], limit: int) -> Tensor:
    """[SOS][vectors][tokens 1 to ``limit`` of the padded text], read at the largest id among the name's tokens."""
    embed = clip.token_embedding.weight
    tokens = tiny_tokenizer()(names)[:, 1 : 1 + limit]
    count, context = len(names), 1 + len(vectors) + limit
    start = embed[[tiny_tokenizer().sot_token_id]].expand(count, 1, -1)
    x = torch.cat([start, vectors.expand(count, -1, -1), embed[tokens]], dim=1) + clip.positional_embedding[:context]
    hidden = clip.transformer(x, attn_mask=clip.attn_mask[:context, :context].double())
    read = hidden[torch.arange(count), 1 + len(vectors) + tokens.argmax(-1)]
    return clip.ln_final(read) @ clip.text_projection


def test_three_tokens_a_name():
    names = ["sky", "brick wall", "a tall tree", "chest of drawers", "a very tall old tree"]
    clip = tiny_clip().double()
    encoder = TextEncoder(clip, tiny_tokenizer())
    prompt = ReferencePrompt(encoder, names, prompt_length=73, init_std=0.3, token_limit=3).double()
    assert len(prompt.vectors) == 73  # 1 + 73 + 3 = 77, for any names
    expected = literal_cut(clip, prompt.vectors, names, 3)
    torch.testing.assert_close(prompt(encoder), expected, rtol=0, atol=1e-10)
    assert [len(encoder.name_tokens(name)) for name in names] == [1, 2, 3, 3, 5]


def test_the_cut_by_hand():
    assert cut_name([5, 7, 49407], 3) == [5, 7, 49407]
    assert cut_name([5, 49407], 3) == [5, 49407]
    assert cut_name([5, 9, 7, 49407], 3) == [5, 9]  # the end is cut off: read at the largest id
    assert cut_name([9, 9, 7, 4, 49407], 3) == [9]


def test_a_limit_that_leaves_no_room():
    encoder = TextEncoder(tiny_clip(context_length=8), tiny_tokenizer(8))
    with pytest.raises(ReclipError, match="MODEL.BIAS_HEAD.NAME_TOKENS 7"):
        ReferencePrompt(encoder, ["sky"], prompt_length=4, token_limit=7)
    assert len(ReferencePrompt(encoder, ["sky"], prompt_length=4, token_limit=6).vectors) == 1


# ---- groups of segments against one mask ----------------------------------------------------------------------


@pytest.mark.parametrize("names", [NAMES, ["sky", "tree"], ["a very tall old tree", "sky", "brick wall", "tall tree"]])
def test_groups_of_segments_attend_as_the_mask_says(names, monkeypatch):
    """Values and gradients of both paths; blocks that are not open_clip's usual ones are encoded with the mask."""
    _, encoder, prompt = build(names, 9)
    weights = torch.randn(len(names), EMBED_DIM, dtype=torch.float64)
    results = []
    for usual in (True, False):
        if not usual:
            monkeypatch.setattr("reclip_d2.backbones.packed_texts._is_usual", lambda _: False)
        features = prompt(encoder)
        (gradient,) = torch.autograd.grad((features * weights).sum(), prompt.vectors)
        results.append((features, gradient))
    (features, gradient), (expected, expected_gradient) = results
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-12)


def test_no_attention_between_all_pairs_of_tokens():
    """300 names in float32: no (T, T) matrix in any operator's output, and the rounding of float32."""
    names = [f"{'tall ' * (k % 4)}tree {k}" for k in range(300)]
    _, encoder, prompt = build(names, 30)
    expected = prompt(encoder)
    encoder, prompt = encoder.float(), prompt.float()
    tokens, largest = len(prompt.layout.positions), 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max(largest, out.numel()) if isinstance(out, Tensor) else largest
            return out

    with Watch():
        found = prompt(encoder)
    assert tokens > 1000 and largest < tokens**2 / 5
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
