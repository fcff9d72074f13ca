"""What conversion adds to a model's layers."""
