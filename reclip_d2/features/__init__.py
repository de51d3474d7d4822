"""The feature store: frozen image features of a few fixed views of each training image, computed once and shared by
training runs (not in the papers, whose training draws new crops and runs the frozen tower on each of them).

:mod:`~reclip_d2.features.views` defines the views of an image, :mod:`~reclip_d2.features.shards` stores their features
on disk, and :mod:`~reclip_d2.features.store` computes missing features and reads those of a batch.
"""
