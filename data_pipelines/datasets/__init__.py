"""Data sets people hold under licences of their own, read from disk as they were published.

A module here has a `CaptureSet` for `python -m data_pipelines.prepare`; DATASETS.md says where each
data set comes from. Monocular ones share `tracked_videos`, multi-view ones `multi_view`.
"""
