"""A run: the event loop, its window of rows, its journal. Knows no text and no Hub."""
