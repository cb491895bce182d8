"""The Hub: the only room that writes to it. Knows no engine."""
