"""Statistics, figures and HTML pages of finished datasets; knows no models, and writes nothing to the Hub."""
