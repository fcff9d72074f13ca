"""Numbers: what is measured of a trained model, and the features and teachers it is measured with.

Tables and figures are in `reports`, which reads these rows; nothing here imports it.
"""
