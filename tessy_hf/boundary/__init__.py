"""Boundary prediction: where one author's kind of text ends."""
