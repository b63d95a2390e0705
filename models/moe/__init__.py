"""Views, hooks, saliency, pruning and merging of opened mixture-of-experts models."""
