"""Reading data: files, records, rows of tokens, rankings."""
