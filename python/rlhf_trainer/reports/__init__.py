"""HTML reports and estimates with intervals."""
