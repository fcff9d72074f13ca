"""Other libraries' own training loops, fitted to blocks."""
