"""The feed-forward halves of a layer, one file a kind."""
