"""Fixtures of this folder's tests."""

from tests.helpers import isolated_cache

__all__ = ["isolated_cache"]
