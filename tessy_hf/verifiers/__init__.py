"""Verifiers: whether a finished text is right. Know no models."""
