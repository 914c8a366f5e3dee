"""A simulator of the PTX that Triton emits: values, races, fences, bounds and barriers on a CPU."""
