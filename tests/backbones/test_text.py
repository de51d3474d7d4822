"""Text features of the classes, and their cache.

Shape letters: C classes, D joint embedding.
"""

import pytest
import torch

from reclip_d2.backbones.text import TextEncoder, cached_query_features, check_class_names, query_features
from reclip_d2.errors import ReclipError
from tests.helpers import EMBED_DIM, tiny_clip, tiny_dense, tiny_tokenizer

TEMPLATES = ["a photo of a {}.", "the {}", "many {} here"]
NAMES = [["sky"], ["tall tree", "oak", "a birch"], ["water"]]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return tiny_dense().text_encoder


def literal_query_features(clip, names, templates):
    """Each text by itself: normalise; average over all texts of the class; normalise."""
    rows = []
    for class_names in names:
        total, count = torch.zeros(EMBED_DIM, dtype=torch.float64), 0
        for name in class_names:
            for template in templates:
                text = tiny_tokenizer()([template.replace("{}", name)])
                feature = clip.encode_text(text)[0].double()
                total += feature / feature.square().sum().sqrt()
                count += 1
        mean = total / count
        rows.append(mean / mean.square().sum().sqrt())
    return torch.stack(rows)


def test_query_features_against_a_loop(encoder):
    got = query_features(encoder, NAMES, TEMPLATES)
    assert got.shape == (3, EMBED_DIM) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), literal_query_features(tiny_clip(), NAMES, TEMPLATES), rtol=0, atol=1e-5)


def test_one_class_and_one_template(encoder):
    got = query_features(encoder, [["sky"]], ["{}"])
    torch.testing.assert_close(got.double(), literal_query_features(tiny_clip(), [["sky"]], ["{}"]), rtol=0, atol=1e-5)


def test_synonyms_matter_and_their_order_does_not(encoder):
    alone = query_features(encoder, [["oak"]], TEMPLATES)
    both = query_features(encoder, [["oak", "birch"]], TEMPLATES)
    turned = query_features(encoder, [["birch", "oak"]], TEMPLATES)
    assert not torch.allclose(alone, both, atol=1e-3)
    torch.testing.assert_close(both, turned)


def test_encode_in_batches_gives_the_same(encoder):
    texts = [f"a thing number {index}" for index in range(7)]
    torch.testing.assert_close(encoder.encode(texts, batch_size=3), encoder.encode(texts), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoder.encode(texts).norm(dim=1), torch.ones(7))


def test_sizes_and_tokens(encoder):
    assert (encoder.width, encoder.context_length, encoder.is_causal) == (32, 77, True)
    assert encoder.name_tokens("Sky  ") == encoder.name_tokens("sky")
    start, end = tiny_tokenizer().sot_token_id, tiny_tokenizer().eot_token_id
    row = tiny_tokenizer()(["brick wall"])[0].tolist()
    assert row[0] == start and row[1:3] == encoder.name_tokens("brick wall") and row[3] == end


def test_a_clip_with_a_text_tower_of_its_own():
    clip = tiny_clip(custom_text=True)
    encoder = TextEncoder(clip, tiny_tokenizer())
    feature = clip.encode_text(tiny_tokenizer()(["sky"]))[0]
    torch.testing.assert_close(encoder.encode(["sky"])[0], feature / feature.norm())


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
    got = encoder.encode(TEXTS, batch_size=2)
    torch.testing.assert_close(got, full, rtol=0, atol=tolerance)
    assert count.shapes == [(2, 3), (2, 6), (2, 14)]  # "sky" twice; "the water", "a brick wall."; the long ones


def test_a_text_as_long_as_the_context():
    encoder = TextEncoder(clip := tiny_clip(context_length=8), tokenizer := tiny_tokenizer(8))
    texts = ["one two three four five six", "one two three four five six seven eight", ""]
    torch.testing.assert_close(encoder.encode(texts), torch.nn.functional.normalize(clip.encode_text(tokenizer(texts))))


@pytest.mark.parametrize(
    "text", [{"no_causal_mask": True}, {"embed_cls": True}, {"pool_type": "last"}], ids=lambda text: next(iter(text))
)
def test_a_tower_that_reads_the_padding_gets_it(text):
    clip = tiny_clip(custom_text=True, text=text)
    full = torch.nn.functional.normalize(clip.encode_text(tiny_tokenizer()(TEXTS)))
    encoder = TextEncoder(clip, tiny_tokenizer())
    count = CountTokens(encoder.transformer)
    torch.testing.assert_close(encoder.encode(TEXTS, batch_size=4), full)
    assert [length for _, length in count.shapes] == [77 + ("embed_cls" in text)] * 2
    assert encoder.is_causal == ("no_causal_mask" not in text)


def test_a_mask_that_lets_tokens_look_ahead_is_not_causal():
    clip = tiny_clip()
    clip.attn_mask[3, 5] = 0
    encoder = TextEncoder(clip, tiny_tokenizer())
    assert not encoder.is_causal
    torch.testing.assert_close(
        encoder.encode(TEXTS), torch.nn.functional.normalize(clip.encode_text(tiny_tokenizer()(TEXTS)))
    )


def test_more_classes_than_are_encoded_at_once(encoder, monkeypatch):
    names = [[f"thing {index}", *["other thing"] * (index % 3)] for index in range(9)]
    whole = query_features(encoder, names, TEMPLATES)
    monkeypatch.setattr("reclip_d2.backbones.text._CLASSES_AT_ONCE", 4)
    torch.testing.assert_close(query_features(encoder, names, TEMPLATES), whole, rtol=0, atol=1e-6)


# ---- cache ----------------------------------------------------------------------------------------------------


def refuse(*_args, **_kwargs):
    raise AssertionError("the encoder was called")


def test_second_call_reads_the_file(encoder, isolated_cache, monkeypatch):
    first = cached_query_features(encoder, NAMES, TEMPLATES, "finger")
    assert torch.equal(first, query_features(encoder, NAMES, TEMPLATES))
    files = list(isolated_cache.rglob("*"))
    assert [path.suffix for path in files if path.is_file() and path.suffix != ".lock"] == [".safetensors"]
    monkeypatch.setattr(TextEncoder, "encode", refuse)
    assert torch.equal(cached_query_features(encoder, NAMES, TEMPLATES, "finger"), first)


@pytest.mark.parametrize(
    ("names", "templates", "fingerprint"),
    [
        (NAMES, TEMPLATES, "other"),
        (NAMES, TEMPLATES[:2], "finger"),
        (NAMES, TEMPLATES[::-1], "finger"),
        ([["sky"], ["tall tree", "oak"], ["water"]], TEMPLATES, "finger"),
        (NAMES[::-1], TEMPLATES, "finger"),
        ([["sky"], ["tall tree"], ["oak", "a birch"], ["water"]], TEMPLATES, "finger"),
    ],
    ids=["fingerprint", "fewer templates", "order of templates", "synonym", "order of classes", "other grouping"],
)
def test_another_input_computes_anew(encoder, isolated_cache, names, templates, fingerprint):
    cached_query_features(encoder, NAMES, TEMPLATES, "finger")
    got = cached_query_features(encoder, names, templates, fingerprint)
    assert torch.equal(got, query_features(encoder, names, templates))
    assert len(list(isolated_cache.rglob("*.safetensors"))) == 2


@pytest.mark.parametrize("damage", ["cut", "rubbish", "empty", "other"])
def test_a_damaged_cache_is_made_anew(encoder, isolated_cache, damage):
    import safetensors.torch

    first = cached_query_features(encoder, NAMES, TEMPLATES, "finger")
    (path,) = isolated_cache.rglob("*.safetensors")
    if damage == "other":
        safetensors.torch.save_file({"something_else": torch.zeros(1)}, path)
    else:
        path.write_bytes({"cut": path.read_bytes()[:-8], "rubbish": b"x" * 400, "empty": b""}[damage])
    assert torch.equal(cached_query_features(encoder, NAMES, TEMPLATES, "finger"), first)
    assert torch.equal(safetensors.torch.load_file(path)["query_features"], first)


def test_clips_that_differ_only_in_their_activation_do_not_share_a_cache():
    """The same weights with QuickGELU and with GELU are two models."""
    usual, quick = tiny_dense(name="tiny"), tiny_dense(name="tiny-quickgelu", quick_gelu=True)
    rows = [cached_query_features(dense.text_encoder, NAMES, TEMPLATES, dense.key) for dense in (usual, quick)]
    assert torch.equal(rows[1], query_features(quick.text_encoder, NAMES, TEMPLATES))
    assert not torch.equal(rows[0], rows[1])


# ---- class lists ----------------------------------------------------------------------------------------------


def test_good_class_lists():
    check_class_names([["sky"]])
    check_class_names([["sky", "heaven"], ["water"], ["oak", "oak"]])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "class list is empty"),
        ([["sky"], [""]], "class 1 has an empty name"),
        ([["sky"], ["  "]], "class 1 has an empty name"),
        ([["sky", ""]], "class 0 has an empty name"),
        ([["sky"], []], "class 1 has"),
        ([["sky"], ["water"], ["sky"]], "classes 0 and 2 share the name 'sky'"),
        ([["sky"], ["Sky "]], "classes 0 and 1 share the name"),
        ([["sky", "heaven"], ["heaven"]], "classes 0 and 1 share the name 'heaven'"),
    ],
)
def test_bad_class_lists(names, message):
    with pytest.raises(ReclipError, match=message) as caught:
        check_class_names(names)
    assert "\n" not in str(caught.value)


def test_classes_that_clip_reads_alike():
    """Any class list, and any tokenizer: composed and decomposed letters, curly quotes."""
    encode = tiny_tokenizer().encode
    check_class_names([["caf\u00e9", "cafe\u0301"], ["sky"]], encode)  # of one class
    for names, classes in (
        ([["caf\u00e9"], ["sky"], ["cafe\u0301"]], "of class 0 and .* of class 2"),
        ([["sky", "it's sky"], ["road", "it\u2019s sky"]], "of class 0 and .* of class 1"),
    ):
        with pytest.raises(ReclipError, match=f"CLIP reads the names .* {classes} alike: rename one"):
            check_class_names(names, encode)
