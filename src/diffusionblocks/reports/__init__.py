"""Tables, figures and pictures of what `evaluation` measured, and the JSON files that results are kept in."""
