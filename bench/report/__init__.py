"""Tables and pictures, made from results files and checked.

Never: a measurement, or the benchmarks that make them.
"""
