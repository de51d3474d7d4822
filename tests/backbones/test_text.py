"""The text tower: encoding at each text's own length, sizes and tokens."""

import pytest
import torch

from reclip_d2.backbones.text import TextEncoder
from tests.helpers import tiny_clip, tiny_dense, tiny_tokenizer


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return tiny_dense().text_encoder


def test_encode_in_batches_gives_the_same(encoder):
    texts = [f"a thing number {index}" for index in range(7)]
    torch.testing.assert_close(
        encoder.text_features(texts, batch_size=3), encoder.text_features(texts), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(encoder.text_features(texts).norm(dim=1), torch.ones(7))


def test_sizes_and_tokens(encoder):
    assert (encoder.text_width, encoder.context_length, encoder.is_causal) == (32, 77, True)
    assert encoder.name_tokens("Sky  ") == encoder.name_tokens("sky")
    start, end = tiny_tokenizer().sot_token_id, tiny_tokenizer().eot_token_id
    row = tiny_tokenizer()(["brick wall"])[0].tolist()
    assert row[0] == start and row[1:3] == encoder.name_tokens("brick wall") and row[3] == end


def test_a_clip_with_a_text_tower_of_its_own():
    clip = tiny_clip(custom_text=True)
    encoder = TextEncoder(clip, tiny_tokenizer())
    feature = clip.encode_text(tiny_tokenizer()(["sky"]))[0]
    torch.testing.assert_close(encoder.text_features(["sky"])[0], feature / feature.norm())


# ---- texts at their own length --------------------------------------------------------------------------------

TEXTS = ["a photo of a very tall old oak tree in the park", "sky", "a brick wall.", "sky", "the water", "a b c d e f g"]


class CountTokens:
    """Counts what goes through a text transformer."""

    def __init__(self, transformer: torch.nn.Module) -> None:
        self.shapes = []
        transformer.register_forward_pre_hook(lambda _, inputs: self.shapes.append(tuple(inputs[0].shape[:2])))


@pytest.mark.parametrize("pool", [{}, {"pool_type": "eos", "eos_id": 49407}], ids=["argmax", "eos"])
@pytest.mark.parametrize("custom_text", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-7)])
def test_short_texts_equal_padded_ones(custom_text, pool, dtype, tolerance):
    clip = tiny_clip(custom_text=custom_text, text=pool).to(dtype)
    full = torch.nn.functional.normalize(clip.encode_text(tiny_tokenizer()(TEXTS)).float(), dim=-1)
    encoder = TextEncoder(clip, tiny_tokenizer())
    count = CountTokens(encoder.transformer)
    got = encoder.text_features(TEXTS, batch_size=2)
    torch.testing.assert_close(got, full, rtol=0, atol=tolerance)
    assert count.shapes == [(2, 3), (2, 6), (2, 14)]  # "sky" twice; "the water", "a brick wall."; the long ones


def test_a_text_as_long_as_the_context():
    encoder = TextEncoder(clip := tiny_clip(context_length=8), tokenizer := tiny_tokenizer(8))
    texts = ["one two three four five six", "one two three four five six seven eight", ""]
    torch.testing.assert_close(
        encoder.text_features(texts), torch.nn.functional.normalize(clip.encode_text(tokenizer(texts)))
    )


@pytest.mark.parametrize(
    "text", [{"no_causal_mask": True}, {"embed_cls": True}, {"pool_type": "last"}], ids=lambda text: next(iter(text))
)
def test_a_tower_that_reads_the_padding_gets_it(text):
    clip = tiny_clip(custom_text=True, text=text)
    full = torch.nn.functional.normalize(clip.encode_text(tiny_tokenizer()(TEXTS)))
    encoder = TextEncoder(clip, tiny_tokenizer())
    count = CountTokens(encoder.transformer)
    torch.testing.assert_close(encoder.text_features(TEXTS, batch_size=4), full)
    assert [length for _, length in count.shapes] == [77 + ("embed_cls" in text)] * 2
    assert encoder.is_causal == ("no_causal_mask" not in text)


def test_a_mask_that_lets_tokens_look_ahead_is_not_causal():
    clip = tiny_clip()
    clip.attn_mask[3, 5] = 0
    encoder = TextEncoder(clip, tiny_tokenizer())
    assert not encoder.is_causal
    torch.testing.assert_close(
        encoder.text_features(TEXTS), torch.nn.functional.normalize(clip.encode_text(tiny_tokenizer()(TEXTS)))
    )
