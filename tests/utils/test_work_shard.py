"""Parts of a run's work."""

import pytest

from reclip_d2.errors import ReclipError
from reclip_d2.utils.work_shard import WorkShard


def test_parts_are_disjoint_and_complete():
    items = list("abcdefg")
    parts = [WorkShard.parse(f"{index}/3") for index in (1, 2, 3)]
    assert [part.of(items) for part in parts] == [["a", "d", "g"], ["b", "e"], ["c", "f"]]
    for number in range(7):
        assert [part.holds(number) for part in parts] == [number % 3 == index for index in range(3)]
    assert WorkShard.parse("1/1").of(items) == items and WorkShard.parse("9/9").of(items) == []
    assert WorkShard.parse(" 2/8 ").name == "2-of-8" and str(WorkShard(2, 8)) == "2/8"


WRONG = ("", "0/3", "4/3", "-1/3", "1", "1/0", "a/b", "1/2/3", "1 / 2", "1/9999999", "٣/٤", "x" * 99)


@pytest.mark.parametrize("text", WRONG)
def test_what_is_not_a_part(text):
    with pytest.raises(ReclipError, match="--shard") as caught:
        WorkShard.parse(text)
    assert len(str(caught.value)) < 150 and "\n" not in str(caught.value)
