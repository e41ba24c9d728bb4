"""The public functions, one module per family: validate, then a kernel chosen by dispatch or the reference."""
