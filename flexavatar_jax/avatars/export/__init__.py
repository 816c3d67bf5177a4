"""Avatars as files that other programs open: a web page, .ply, .glb, .spz."""
