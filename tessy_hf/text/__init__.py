"""Text: one tokenizer, one thinking format, one transcript, read exactly. Knows no engines, authors or predictors."""
