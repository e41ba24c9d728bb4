"""Small worlds in which the right answer is known: the exact one and the demo's."""
