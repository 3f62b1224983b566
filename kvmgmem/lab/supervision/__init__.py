"""The supervisor: one boot after another, what each ended of, and the account over all of them."""
