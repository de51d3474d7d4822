"""Fixtures of this folder's tests."""

from tests.helpers import datasets, isolated_cache

__all__ = ["datasets", "isolated_cache"]
