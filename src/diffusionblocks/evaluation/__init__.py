"""Honest evaluation: accuracy over steps and seeds, memory of a step, tables and figures."""
