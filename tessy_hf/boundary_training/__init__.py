"""How a boundary predictor is made: annotate, train, measure. Publishing is in `hub`."""
