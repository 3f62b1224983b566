"""Mutation: how many deliberate faults of a kernel the selftests notice."""
