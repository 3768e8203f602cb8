"""The token-mixing halves of a layer, one file a kind."""
