"""Numbers and long values as readable text."""

import math

from reclip_d2.utils.text import number, shorten


def test_numbers_of_a_table():
    assert number(1.25, 1) == "1.2" and number(-0.5, 2) == "−0.50" and number(0.5, 2, sign=True) == "+0.50"
    assert number(math.nan) == number(None) == number(math.inf) == "–"


def test_long_values_are_cut():
    assert shorten("a" * 60) == "a" * 60 and shorten("a" * 61) == "a" * 57 + "..."
    assert shorten([1, 2, 3], 6) == "[1,..." and shorten("tall tree", 6, "…") == "tall…"
    assert shorten("short", 10) == "short" and shorten("much too long", 8, "…") == "much to…"
