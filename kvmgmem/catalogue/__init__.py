"""The contract and the known kernel bugs, as data."""
