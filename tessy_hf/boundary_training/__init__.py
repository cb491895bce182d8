"""Train boundary predictors: annotate traces, train, evaluate. Publishing is in `hub`."""
