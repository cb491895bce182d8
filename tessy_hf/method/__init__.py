"""The method: Algorithm 1 and the paper's data recipes. Knows no datasets, HTTP, retries or files."""
