"""What every room may use and what knows none of them: files, formats, messages, ranges of numbers, seeds, registries.

It knows torch, pydantic and the standard library; of a model it knows only that it is a module.
"""
