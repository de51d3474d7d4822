"""Downloads of data sets and CLIP's weights with checksums: ``python -m reclip_d2.fetch``."""

from reclip_d2.fetch.archives import Archive, fetch_archive, unpack

__all__ = ["Archive", "fetch_archive", "unpack"]
