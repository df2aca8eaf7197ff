"""From the original files to today's names."""
