"""Avatars of people: encoding, decoding, rendering, films."""
