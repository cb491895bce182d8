"""The `tessy` command: arguments in, one call, words for people out."""
