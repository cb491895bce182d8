"""Beyond one machine: Ray, and merging what many hosts wrote. Knows no HTTP."""
