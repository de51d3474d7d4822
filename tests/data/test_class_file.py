"""Class files written by hand, including odd ones."""

import pytest

from reclip_d2.data.class_file import ClassList, check_name_tokens, parse_classes, read_class_file
from reclip_d2.errors import ReclipError
from tests.helpers import tiny_tokenizer


def message_of(text: str) -> str:
    with pytest.raises(ReclipError) as caught:
        parse_classes(text, "c.txt")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("class file c.txt")
    return str(caught.value)


def test_classes_synonyms_comments_and_background():
    text = "# streets\nroad, street ,  asphalt\n\n tall   tree # an oak\nc#\nBackground: sky, brick wall\nperson"
    classes = parse_classes(text, "c.txt")
    assert classes.classes == (("road", "street", "asphalt"), ("tall tree",), ("c#",), ("person",))
    assert classes.background == ("sky", "brick wall")
    assert classes.lines == (2, 4, 5, 7, 6, 6)
    assert classes.model_classes == [
        ["road", "street", "asphalt"], ["tall tree"], ["c#"], ["person"], ["sky"], ["brick wall"],
    ]  # fmt: skip


def test_queries_after_semicolons():
    """Each is a class for the model with the id of its class; lines are those of the class."""
    classes = parse_classes("car; bus, coach ;truck\nsky\nbackground: wall\nperson; rider", "c.txt")
    assert classes.classes == (("car",), ("sky",), ("person",))
    assert classes.queries == ((0, ("bus", "coach")), (0, ("truck",)), (2, ("rider",)))
    assert classes.model_classes == [["car"], ["sky"], ["person"], ["bus", "coach"], ["truck"], ["rider"], ["wall"]]
    assert classes.mask_ids(keep_background=False) == [0, 1, 2, 0, 0, 2, 255]
    assert classes.mask_ids(keep_background=True) == [0, 1, 2, 0, 0, 2, 3]
    assert classes.mask_names(keep_background=True) == ["car", "sky", "person", "background"]
    assert classes.lines == (1, 2, 4, 1, 1, 4, 3)
    assert classes.entries == ["car; bus, coach; truck", "sky", "person; rider"]
    again = parse_classes("\n".join([*classes.entries, "background: wall"]), "c.txt")
    assert again.model_classes == classes.model_classes


def test_the_semicolon_of_an_entity_separates_no_queries():
    text = "rock &amp; sand; stone\nA&B; C\nsea &#38; sky\nbread &amp;amp; butter; toast"
    classes = parse_classes(text, "c.txt")
    assert classes.entries == text.split("\n")
    assert [names for _, names in classes.queries] == [("stone",), ("C",), ("toast",)]


def test_one_class_with_two_queries_is_one_class():
    assert "names only one class" in message_of("cat; kitten")
    assert parse_classes("cat; kitten\nbackground: sky", "c.txt").mask_ids(False) == [0, 0, 255]


def test_too_many_queries():
    many = "; ".join(f"n{i}" for i in range(1025))
    assert len(parse_classes(f"sky\n{many}", "f").queries) == 1024
    assert "line 2: more than 1,024 queries" in message_of(f"sky\n{many}; more")


def test_background_in_masks():
    classes = parse_classes("a\nb\nbackground: sky, wall", "c.txt")
    assert classes.mask_names(keep_background=False) == ["a", "b"]
    assert classes.mask_ids(keep_background=False) == [0, 1, 255, 255]
    assert classes.mask_names(keep_background=True) == ["a", "b", "background"]
    assert classes.mask_ids(keep_background=True) == [0, 1, 2, 2]


def test_without_a_background_line_there_is_none_to_keep():
    classes = parse_classes("a\nbackground", "c.txt")  # here a class as any other
    assert classes.mask_names(keep_background=True) == ["a", "background"]
    assert classes.mask_ids(keep_background=True) == [0, 1]


def test_one_class_beside_the_background():
    assert parse_classes("cat\nbackground: sky", "c.txt").model_classes == [["cat"], ["sky"]]


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_mark(tmp_path, ends, mark):
    path = tmp_path / "classes.txt"
    path.write_bytes((mark + ends.join(["straße", "tree", ""])).encode())
    assert read_class_file(path) == ClassList((("straße",), ("tree",)), (), str(path), (1, 2))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("road\ntree\nRoad", 3, "also in line 1"),
        ("road, street\ntree, Street", 2, "also in line 1"),
        ("road, road\ntree", 1, "also in line 1"),
        ("road\ntree\nbackground: sky, tree", 3, "also in line 2"),
        ("road\ntree,", 2, "empty name"),
        ("road\n, tree", 2, "empty name"),
        ("road\na,,b", 2, "empty name"),
        ("road\nbackground:\n", 2, "empty name"),
        ("road\nbackground: a\nbackground: b", 3, "second"),
        ("road\n1: tree", 2, "unknown key '1'"),
        ("road\ntr\x07ee", 2, "control"),
        ("sky\nroad\tstreet", 2, "contains a tab"),
        ("sky\nroad; Road", 2, "also in line 2"),
        ("sky\nroad;", 2, "remove the comma or semicolon"),
        ("sky\n; road", 2, "empty name"),
        ("sky\ncar; ;bus", 2, "empty name"),
        ("sky\nbackground: wall;wood", 2, "commas between"),
        ("sky\n1;road;(128, 64, 128)", 2, "one class per line"),
        ("background\nroad\nbackground: sky", 1, "rename"),
        ("\n".join(f"class {i}" for i in range(256)), 256, "more than 255"),
    ],
)
def test_what_is_refused_with_its_line(text, line, words):
    message = message_of(text)
    assert f"line {line}" in message and words in message


@pytest.mark.parametrize(("text", "words"), [("", "no class"), ("# a\n\n", "no class"), ("cat", "only one class")])
def test_too_few_classes(text, words):
    assert words in message_of(text)


def test_only_a_background():
    assert "names no class" in message_of("background: sky, wall")


def test_the_most_classes_that_a_mask_can_hold():
    assert len(parse_classes("\n".join(f"c{i}" for i in range(255)), "c.txt").classes) == 255
    names = "\n".join(f"c{i}" for i in range(255))
    assert "more than 255" in message_of(names + "\nbackground: sky")


def test_bad_encoding_names_the_line(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("road\ntree\nstraße\n".encode("latin-1"))
    with pytest.raises(ReclipError, match=r"line 3: not UTF-8"):
        read_class_file(path)
    path.write_text("road\ntree\n", encoding="utf-16")
    with pytest.raises(ReclipError, match="save it as UTF-8"):
        read_class_file(path)


def test_missing_file(tmp_path):
    with pytest.raises(ReclipError, match=r"class file .*none\.txt does not exist: check --classes"):
        read_class_file(tmp_path / "none.txt")
    with pytest.raises(ReclipError, match="is a folder, not a regular file"):
        read_class_file(tmp_path)


def test_a_file_that_is_too_large_for_a_class_list(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes(b"road\n" * 300_000)
    with pytest.raises(ReclipError, match=r"has 1\.4 MiB, more than the 1 MiB allowed: check --classes"):
        read_class_file(path)


def test_name_lengths():
    classes = parse_classes("a b, a b c\nd\nbackground: e, f g h i", "c.txt")

    def words(name: str) -> list[str]:
        return name.split()

    check_name_tokens(classes, words, 4)
    with pytest.raises(ReclipError, match=r"line 3: the name 'f g h i'\.\.\. has 4 tokens, more than the 3"):
        check_name_tokens(classes, words, 3)
    with pytest.raises(ReclipError, match=r"line 1: .*finds nothing in the name 'a b'"):
        check_name_tokens(classes, lambda name: [], 3)


def test_limits():
    """Names, background names and their length; at each limit a list is fine."""
    long = "a" * 300
    assert parse_classes(f"sky\n{long}", "f").classes[1] == (long,)
    assert "line 2: the name 'aaa" in message_of(f"sky\n{long}a") and "301 characters" in message_of(f"sky\n{long}a")
    names = [f"n{i}" for i in range(4096)]
    assert len(parse_classes("sky\nbackground: " + ", ".join(names[:255]), "f").background) == 255
    assert "line 2: more than 255 background names" in message_of("sky\nbackground: " + ", ".join(names[:256]))
    assert len(parse_classes("sky\n" + ", ".join(names[:4095]), "f").classes[1]) == 4095
    assert "line 2: more than 4,096 names" in message_of("sky\n" + ", ".join(names))


# ---- names that CLIP reads alike --------------------------------------------------------------------------------

ALIKE = {
    "composed and decomposed": ("caf\u00e9", "cafe\u0301"),
    "full width": ("road", "\uff52\uff4f\uff41\uff44"),
    "quotes": ("it\u2019s sky", "it's sky"),
    "entity": ("rock & sand", "rock &amp; sand"),
    "entity twice": ("rock & sand", "rock &amp;amp; sand"),
    "spaces about a hyphen": ("t-shirt", "t - shirt"),
    "ligature": ("fire", "\ufb01re"),
    "no-break space": ("red car", "red\u00a0\u00a0car"),
    "capital with a dot": ("stra\u00dfe", "STRA\u1e9eE"),
}


@pytest.mark.parametrize("pair", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize(
    ("text", "lines"),
    [("{}\nsky\n{}", (1, 3)), ("sky\nwood, {}\nroad2, {}", (2, 3)), ("sky\n{}\n\nbackground: wall, {}", (2, 4))],
)
def test_names_with_the_same_tokens(pair, text, lines):
    """As classes, as synonyms and as a background name; both lines are named."""
    try:
        classes = parse_classes(text.format(*pair), "c.txt")
    except ReclipError as error:  # the parser sees some of them
        message = str(error)
    else:
        with pytest.raises(ReclipError) as caught:
            check_name_tokens(classes, tiny_tokenizer().encode)
        message = str(caught.value)
    assert f"line {lines[1]}: " in message and f"in line {lines[0]}" in message


def test_names_that_clip_tells_apart():
    text = "dog\ndogs\nhot dog\nsea, ocean\nsee\nfire engine\nfire-engine\nrock &amp; sand"
    check_name_tokens(parse_classes(text, "c.txt"), tiny_tokenizer().encode)


def test_names_that_look_the_same_are_shown_apart():
    with pytest.raises(ReclipError) as caught:
        check_name_tokens(parse_classes("caf\u00e9\ncafe\u0301", "c.txt"), tiny_tokenizer().encode)
    assert r"line 2: CLIP reads the name 'cafe\u0301' like 'caf\xe9' in line 1" in str(caught.value)


def test_the_same_name_twice_in_a_line():
    with pytest.raises(ReclipError, match="line 1: CLIP reads the name 'it\u2019s' like \"it's\" in line 1"):
        check_name_tokens(parse_classes("it's, it\u2019s\nsky", "c.txt"), tiny_tokenizer().encode)
