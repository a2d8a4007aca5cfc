"""Fuzz targets: coverage-guided with atheris where that is installed, random mutations of seeds where it is not.

``python -m tests.fuzz`` lists them; ``python -m tests.fuzz frames --seconds 120`` runs one.
"""
