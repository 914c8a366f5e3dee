"""Archives beside single-process predictions. Never: the service."""
