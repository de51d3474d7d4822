"""Prompt templates."""

import open_clip
import pytest

from reclip_d2.backbones.prompts import TEMPLATE_SETS, get_templates
from reclip_d2.errors import ReclipError


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
