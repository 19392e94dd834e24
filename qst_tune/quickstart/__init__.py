"""A first run that needs no hub, no key and no GPU: a small model and the data to tune it on."""
