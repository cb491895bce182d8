"""Dataset rows: prompts in, columns and Parquet out. Knows no event loop and no Hub."""
