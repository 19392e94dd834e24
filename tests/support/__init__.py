"""What tests share: tiny models, data and configs, runs of recipes, a hub on this machine."""
