"""One call of an op on a backend against truth: a module for each family, for whoever calls the op."""
