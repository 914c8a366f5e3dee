"""Measurements and compile checks; imports the package, nothing imports it."""
