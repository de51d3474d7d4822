"""Query text features of the classes: templates, the average over texts, the cache, and class lists.

Shape letters: C classes, D joint embedding.
"""

import open_clip
import pytest
import torch

from reclip_d2.backbones.query import (
    TEMPLATE_SETS,
    cached_query_features,
    check_class_names,
    check_names_fit,
    get_templates,
    query_features,
)
from reclip_d2.backbones.text import TextEncoder
from reclip_d2.data.class_file import parse_classes
from reclip_d2.errors import ReclipError
from tests.helpers import EMBED_DIM, tiny_clip, tiny_dense, tiny_tokenizer

TEMPLATES = ["a photo of a {}.", "the {}", "many {} here"]
NAMES = [["sky"], ["tall tree", "oak", "a birch"], ["water"]]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return tiny_dense().text_encoder


# ---- templates ------------------------------------------------------------------------------------------------


def test_numbers_of_templates():
    assert len(get_templates("imagenet_scene")) == 85
    assert len(get_templates("imagenet")) == 80
    assert get_templates("photo") == ("a photo of a {}.",)


@pytest.mark.parametrize("name", sorted(TEMPLATE_SETS))
def test_each_template_has_one_hole_and_occurs_once(name):
    templates = get_templates(name)
    assert all(template.count("{}") == 1 for template in templates)
    assert all(template.replace("{}", "").count("{") == 0 for template in templates)
    assert len(set(templates)) == len(templates)


def test_imagenet_templates_are_open_clips():
    ours = [template.format("brick wall") for template in get_templates("imagenet")]
    assert ours == [template("brick wall") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def test_five_speak_of_the_scene():
    scene = [template for template in get_templates("imagenet_scene") if template.endswith("in the scene.")]
    assert len(scene) == 5
    assert get_templates("imagenet_scene")[:80] == get_templates("imagenet")


def test_unknown_set():
    with pytest.raises(ReclipError, match=r"MODEL\.CLIP\.TEMPLATES is 'imagenot'; choose one of .*photo"):
        get_templates("imagenot")


# ---- features of the classes ----------------------------------------------------------------------------------


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


def test_more_classes_than_are_encoded_at_once(encoder, monkeypatch):
    names = [[f"thing {index}", *["other thing"] * (index % 3)] for index in range(9)]
    whole = query_features(encoder, names, TEMPLATES)
    monkeypatch.setattr("reclip_d2.backbones.query._CLASSES_AT_ONCE", 4)
    torch.testing.assert_close(query_features(encoder, names, TEMPLATES), whole, rtol=0, atol=1e-6)


# ---- cache ----------------------------------------------------------------------------------------------------


def refuse(*_args, **_kwargs):
    raise AssertionError("the encoder was called")


def test_second_call_reads_the_file(encoder, isolated_cache, monkeypatch):
    first = cached_query_features(encoder, NAMES, TEMPLATES, "finger")
    assert torch.equal(first, query_features(encoder, NAMES, TEMPLATES))
    files = list(isolated_cache.rglob("*"))
    assert [path.suffix for path in files if path.is_file() and path.suffix != ".lock"] == [".safetensors"]
    monkeypatch.setattr(TextEncoder, "text_features", refuse)
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


def test_names_beyond_the_context():
    # The longest template of "photo", "a photo of a .", has 5 tokens in addition to the name; start and end are 2 of
    # 77.
    check_names_fit(parse_classes("a\n" + "b " * 70, "c.txt"), "ViT-B-16-quickgelu", "photo")
    with pytest.raises(ReclipError, match=r"line 2: the name .* has 71 tokens, more than the 70"):
        check_names_fit(parse_classes("a\n" + "b " * 71, "c.txt"), "ViT-B-16-quickgelu", "photo")
    with pytest.raises(ReclipError, match=r"line 2"):  # longer templates
        check_names_fit(parse_classes("a\n" + "b " * 70, "c.txt"), "ViT-B-16-quickgelu", "imagenet_scene")
    check_names_fit(parse_classes("a\n" + "b " * 71, "c.txt"), "unknown to open_clip", "photo")
