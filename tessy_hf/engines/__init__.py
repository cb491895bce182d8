"""Engines: what turns token ids into more token ids. One provider, one file; :mod:`.base` has what they share."""
