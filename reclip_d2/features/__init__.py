"""The feature store: frozen image features of a few fixed views of each training image, written once and read by all
trainings (not in the papers, whose training draws fresh crops and runs the frozen tower on every one).

:mod:`~reclip_d2.features.views` says which views an image has, :mod:`~reclip_d2.features.shards` keeps their features
on disk, and :mod:`~reclip_d2.features.store` makes what is missing and reads what a batch needs.
"""
