"""The maker of the shipped synthetic people, with data/ on PYTHONPATH (see `make data`). The kit does not import it."""
