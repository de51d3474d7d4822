"""Numbers as text for people."""

import math

from reclip_d2.utils.text import number


def test_numbers_of_a_table():
    assert number(1.25, 1) == "1.2" and number(-0.5, 2) == "−0.50" and number(0.5, 2, sign=True) == "+0.50"
    assert number(math.nan) == number(None) == number(math.inf) == "–"
