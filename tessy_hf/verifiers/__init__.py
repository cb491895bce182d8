"""Check whether finished answers are right; knows no models."""
