"""Who calls: API keys, access tokens, an embedder's own authentication, and what comes of them."""
